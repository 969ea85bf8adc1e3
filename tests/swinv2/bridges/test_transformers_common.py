"""The common tests of transformers pass on the backbone.

They are in the source distribution of transformers only. Unpack that of the installed version
(`pip download --no-deps --no-binary :all: transformers==VERSION`), install parameterized, which
they import, name the unpacked folder by SIMMIM_TRANSFORMERS_SDIST, and run with `-m slow`.
"""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path

import pytest

FOLDER = os.environ.get("SIMMIM_TRANSFORMERS_SDIST")
ROOT = Path(__file__).parents[3]
STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
}
"""Modules that the common tests import, and the distribution lacks: exporters, text generation."""

SKIPPED = {
    "test requires|test is slow": "the machine has no such device or library",
    "attentions|sdpa": "the encoder returns no attention weights, and chooses its own kernels",
    "position embeddings|inputs_embeds|decoder|sequence-to-sequence|test_resize_embeddings|router"
    "|experts|grouped_mm|base_model_class": "it is not a language model",
    "TP plan": "it has no plan of tensor parallelism",
    "No conversion found": "its weights are stored as they are",
    "composite|subconfigs": "it consists of one model",
    "_keep_in_fp32_modules": "all of its modules work in low precision",
    "not in MODEL_MAPPING|Not a prioritized model": "it is not part of transformers",
    "capture": "it returns its hidden states itself, without their hooks",
    "No model with a differentiable loss": "its embedding, of patches, has no weight of its own",
}
"""Patterns of the reasons that they give for what they leave out, and why that is right."""


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.timeout(1800)
def test_the_common_tests_pass(tmp_path: Path) -> None:
    if not FOLDER:
        pytest.skip("SIMMIM_TRANSFORMERS_SDIST does not name an unpacked source distribution")
    for name in ("transformers", "parameterized"):
        pytest.importorskip(name)
    source = Path(FOLDER)
    assert re.search(
        rf"^Version: {version('transformers')}$", (source / "PKG-INFO").read_text(), re.M
    )
    package = tmp_path / "tests"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, text in STAND_INS.items():
        (package / name).parent.mkdir()
        (package / name).with_name("__init__.py").touch()
        (package / name).write_text(text)
    for file in (source / "tests").glob("*.py"):
        if file.name != "__init__.py":
            (package / file.name).symlink_to(file.resolve())
    ours = Path(__file__).with_name("backbone_common_tests.py")
    (package / "test_backbone.py").write_text(ours.read_text())

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--rootdir=.", "--junitxml=results.xml", "tests/test_backbone.py"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        timeout=1500,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    cases = list(ET.parse(tmp_path / "results.xml").iter("testcase"))
    skipped = [one.get("message", "") for case in cases for one in case.findall("skipped")]
    patterns = re.compile("|".join(SKIPPED))
    assert [reason for reason in skipped if not patterns.search(reason)] == []
    assert len(cases) - len(skipped) >= 71
