"""Help, mistyped commands and recipes with mistakes answer without heavy libraries."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "accelerate", "transformers", "webdataset")
RUN = """
import sys
from {package}.cli import run
sys.argv[1:] = {argv!r}
try:
    run()
except SystemExit:
    pass
print(*(name for name in {heavy!r} if name in sys.modules))
"""


@pytest.mark.parametrize(
    ("package", "argv"),
    [
        ("simmim", []),
        ("simmim", ["--help"]),
        ("simmim", ["pretrian"]),
        ("simmim", ["finetune", "--help"]),
        ("simmim", ["import", "--help"]),
        ("simmim", ["doctor", "--help"]),
        ("simmim", ["bench", "memory", "--help"]),
        ("simmim", ["bench", "memory", "--devices", "0"]),
        ("simmim", ["pretrain", "--help-fields"]),
        ("simmim", ["pretrain", "--config", "jobs/finetune/cifar10.yaml"]),
        ("simmim", ["pretrain", "--config", "jobs/pretrain/cifar10.yaml", "--mask.ratoi", "0.5"]),
        ("simmim", ["finetune", "--config", "jobs/finetune/cifar10.yaml", "--data.scael", "1"]),
        (
            "simmim",
            [
                "finetune",
                "--config",
                "jobs/finetune/segmentation-camvid.yaml",
                "--head.kind",
                "fcn",
            ],
        ),
        (
            "simmim",
            ["finetune", "--config", "jobs/finetune/detection-camvid.yaml", "--head.kind", "yolo"],
        ),
        ("simmim", ["finetune", "--config", "jobs/finetune/video-tiny.yaml", "--data.views", "0"]),
        ("simmim", ["probe", "--config", "jobs/probe/cifar10.yaml", "--knn.k", "0"]),
        ("simmim", ["doctor", "--config", "jobs/pretrain/cifar10.yaml", "--mask.ratio", "2"]),
        ("data_prep", ["--help"]),
        ("data_prep", ["shrad"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_help_and_mistakes_load_nothing_heavy(package: str, argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(package=package, argv=argv, heavy=HEAVY)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""
    assert len(done.stdout.splitlines()) + len(done.stderr.splitlines()) > 1
