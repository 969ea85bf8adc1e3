"""Who may import whom: the rules of the house, read from the source and tried on the packages."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"swinv2", "data_prep", "simmim", "jobs", "tests"}
ALLOWED = {
    "swinv2": {"torch", "einops", "safetensors", "numpy"},
    "data_prep": {"fsspec", "numpy", "PIL", "simplejpeg", "tqdm"},
    "simmim": {
        "PIL",
        "accelerate",
        "einops",
        "numpy",
        "psutil",
        "pydantic",
        "safetensors",
        "simplejpeg",
        "torch",
        "tqdm",
        "typing_extensions",  # torch brings it
        "yaml",
    },
}
"""What a package may import at the top of its files, besides Python's own modules and itself."""
OPTIONAL = {
    "av",
    "bitsandbytes",
    "imagehash",
    "onnxruntime",
    "pyarrow",
    "pycocotools",
    "ray",
    "timm",
    "transformers",
}
"""What an extra brings: imported where it is used, inside a function."""
FORMAT_AUTHORITY = {"webdataset"}
"""Installed with us though none of us imports it: it says what a shard is, and people read shards
with it; our tests hold what we write and read to it."""
FROM_DATA_PREP = ("data_prep.format.", "data_prep.images.")
"""The folders of data_prep that hold the formats it writes and training reads."""
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}


@dataclass(frozen=True, kw_only=True)
class Import:
    """One import statement."""

    file: Path
    line: int
    module: str
    inside_function: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def find_imports(file: Path) -> Iterator[Import]:
    yield from _walk(ast.parse(file.read_text(encoding="utf-8")), file, inside_function=False)


def _walk(tree: ast.AST, file: Path, *, inside_function: bool) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        for module in _modules(node, file):
            yield Import(
                file=file,
                line=getattr(node, "lineno", 0),
                module=module,
                inside_function=inside_function,
            )
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(node, file, inside_function=inside_function or function)


def _modules(node: ast.AST, file: Path) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [name.name for name in names]
        case ast.ImportFrom(module=str(module), names=names, level=0):
            # `from data_prep import manifest` names a module, `from swinv2 import SwinV2` does not.
            return [
                f"{module}.{name.name}" if _is_module(f"{module}.{name.name}") else module
                for name in names
            ]
        case ast.ImportFrom(level=level) if level > 0:
            raise AssertionError(f"{file}: relative imports hide who imports whom")
        case ast.Call(func=ast.Name(id="__import__") | ast.Attribute(attr="import_module")):
            return ["a name made at run time"]
    return []


def _is_module(name: str) -> bool:
    place = ROOT / Path(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def imports_of(package: str) -> list[Import]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} has no files"
    return [found for file in files for found in find_imports(file)]


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    allowed = ALLOWED[package] | set(sys.stdlib_module_names) | {package} | OURS
    refused = [
        str(found)
        for found in imports_of(package)
        if found.package not in allowed
        and not (found.package in OPTIONAL and found.inside_function)
    ]
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize("package", ["swinv2", "data_prep"])
def test_encoder_and_data_preparation_import_nothing_of_ours(package: str) -> None:
    refused = [str(found) for found in imports_of(package) if found.package in OURS - {package}]
    assert not refused, "\n".join(refused)


def test_of_data_preparation_the_pipeline_imports_the_formats_alone() -> None:
    refused = [
        str(found)
        for found in imports_of("simmim")
        if found.package in OURS - {"simmim", "swinv2"}
        and not f"{found.module}.".startswith(FROM_DATA_PREP)
    ]
    assert not refused, "\n".join(refused)


def test_outside_formats_are_the_business_of_the_bridges() -> None:
    refused = [
        str(found)
        for found in imports_of("swinv2")
        if found.package in OPTIONAL and "bridges" not in found.file.parts
    ]
    assert not refused, "\n".join(refused)


def test_what_is_imported_is_what_is_installed_with_us_no_more_and_no_less() -> None:
    core = {
        re.split(r"[^\w-]", requirement)[0].lower()
        for requirement in requires("simmim") or []
        if "extra ==" not in requirement  # read from what is installed
    }
    imported = {
        DISTRIBUTIONS.get(found.package, found.package)
        for package in ALLOWED
        for found in imports_of(package)
        if found.package not in set(sys.stdlib_module_names) | OURS | OPTIONAL
    }
    assert core >= FORMAT_AUTHORITY
    assert imported - {"typing_extensions"} == core - FORMAT_AUTHORITY


def test_the_walk_sees_every_form_of_import(tmp_path: Path) -> None:
    file = ROOT / "seen.py"
    source = (
        "import a.b\n"
        "from data_prep import cli, __version__\n"
        "if True:\n"
        "    import c\n"
        "class K:\n"
        "    import d\n"
        "    def f(self):\n"
        "        from e.f import g\n"
        "        importlib.import_module('h')\n"
    )
    found = [
        (one.module, one.inside_function)
        for one in _walk(ast.parse(source), file, inside_function=False)
    ]
    assert found == [
        ("a.b", False),
        ("data_prep.cli", False),
        ("data_prep", False),
        ("c", False),
        ("d", False),
        ("e.f", True),
        ("a name made at run time", True),
    ]
    with pytest.raises(AssertionError, match="relative imports"):
        list(_walk(ast.parse("from . import a"), file, inside_function=False))


IMPORT_ALL = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Refuse())
package = importlib.import_module({package!r})
names = [found.name for found in pkgutil.walk_packages(package.__path__, {package!r} + ".")]
for name in names:
    if not name.endswith(".__main__"):
        importlib.import_module(name)
print(len(names))
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


@pytest.mark.parametrize(
    ("package", "refused"),
    [
        ("swinv2", OPTIONAL | {"simmim", "data_prep"}),
        ("data_prep", OPTIONAL | {"simmim", "swinv2", "torch"}),
        ("simmim", OPTIONAL),
    ],
)
def test_everything_imports_without_the_extras_and_prints_nothing(
    package: str, refused: set[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL.format(package=package, refused=refused)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        start_new_session=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    count, loaded = done.stdout.splitlines()
    assert int(count) >= 3
    assert not refused & set(loaded.split())
