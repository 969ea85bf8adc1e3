"""The architecture: who may import whom, and how large a folder may be.

Rules are read from the source, and some are tried on the packages in fresh processes.
"""

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
TASKS = ("pretrain", "classification", "segmentation", "detection", "video", "probe")
OURS = {"swinv2", "data_prep", "simmim", "jobs", "tests"}
ALLOWED = {
    "swinv2": {"torch", "einops", "safetensors", "numpy"},
    "data_prep": {
        "PIL",
        "annotated_types",
        "braceexpand",
        "cyclopts",
        "fsspec",
        "numpy",
        "pydantic",
        "simplejpeg",
        "tqdm",
    },
    "simmim": {
        "PIL",
        "accelerate",
        "annotated_types",
        "cyclopts",
        "einops",
        "numpy",
        "psutil",
        "pydantic",
        "safetensors",
        "simplejpeg",
        "torch",
        "tqdm",
        "typing_extensions",  # torch brings it
        "webdataset",
        "yaml",
    },
}
"""What a package may import at the top of its files, besides Python's own modules and itself."""
OPTIONAL = {
    "aiohttp",
    "av",
    "bitsandbytes",
    "imagecodecs",
    "imagehash",
    "onnxruntime",
    "pyarrow",
    "pycocotools",
    "ray",
    "scipy",
    "tifffile",
    "timm",
    "transformers",
}
"""What an extra brings: imported where it is used, inside a function."""
STREAMS = {"simmim/data/datasets/stream.py", "simmim/data/loader/stream_batches.py"}
"""The only files that import webdataset, inside functions."""
WEBDATASET = {"DataPipeline", "WebLoader", "shuffle", "split_by_worker"}
"""What is used of it: nothing that opens URLs, which runs commands, or decodes, which unpickles."""
DISTRIBUTIONS = {"PIL": "pillow", "annotated_types": "annotated-types", "yaml": "pyyaml"}


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


ROOMS: dict[str, tuple[str, ...]] = {
    "swinv2.kernels": (),
    "swinv2": ("swinv2.kernels",),
    "swinv2.bridges": ("swinv2",),
    "data_prep.format": (),
    "data_prep.executors": (),
    "data_prep.images": ("data_prep.format",),
    "data_prep.sources": ("data_prep.format", "data_prep.images"),
    "data_prep.inspect": ("data_prep.format", "data_prep.images", "data_prep.executors"),
    "data_prep.write": ("data_prep.sources", "data_prep.executors"),
    "data_prep": ("data_prep.inspect", "data_prep.write"),
    "simmim.recipe": ("data_prep.format",),
    "simmim.method": ("simmim.recipe",),
    "simmim.data.order": ("simmim.recipe",),
    "simmim.data.datasets": ("simmim.data.order", "data_prep.format"),
    "simmim.data.transforms": ("simmim.data.datasets", "data_prep.images"),
    "simmim.data.loader": ("simmim.data.transforms",),
    "simmim.data": ("simmim.data.loader",),
    "simmim.engine.checkpoint": ("simmim.recipe",),
    "simmim.engine.distributed": ("simmim.engine.checkpoint", "simmim.method", "simmim.data"),
    "simmim.engine.monitor": ("simmim.engine.distributed",),
    "simmim.engine": ("simmim.engine.monitor",),
    "simmim.report": ("simmim.engine", "simmim.method"),
    "simmim.tasks": ("simmim.report", "swinv2", "swinv2.bridges"),
    "simmim.tasks.probe": ("simmim.tasks",),
    "simmim.tasks.pretrain": ("simmim.tasks", "simmim.tasks.probe"),
    "simmim.tasks.classification": ("simmim.tasks",),
    "simmim.tasks.video": ("simmim.tasks", "simmim.tasks.classification"),
    "simmim.tasks.segmentation": ("simmim.tasks",),
    "simmim.tasks.detection": ("simmim.tasks", "simmim.tasks.segmentation"),
    "simmim.bench": ("simmim.tasks", "simmim.tasks.pretrain", "swinv2"),
    "simmim.export": ("simmim.tasks", *(f"simmim.tasks.{task}" for task in TASKS)),
    "simmim.doctor": ("simmim.bench", "simmim.tasks", *(f"simmim.tasks.{task}" for task in TASKS)),
    "simmim": ("simmim.export", "simmim.doctor", "data_prep"),
}
"""Which rooms a room may import, besides itself and what those may import."""
IN_ROOM = {
    "data_prep.bounds": "data_prep.format",
    "data_prep.channels": "data_prep.format",
    "data_prep.validation": "data_prep.format",
    "swinv2.compat": "swinv2.kernels",
    "simmim.compat": "simmim.recipe",
    "simmim.disk": "simmim.recipe",
    "simmim.environment": "simmim.recipe",
    "simmim.fields": "simmim.recipe",
    "simmim.recipe_text": "simmim.recipe",
    "simmim.stop_signals": "simmim.recipe",
}
"""Modules that belong to a room of another name."""
STRICT = {"swinv2", "data_prep", "simmim"}
"""Rooms whose folders may not import them. Elsewhere a folder's own files and its subfolders may
import each other, as long as there are no circles between files."""
LARGEST_ROOM = 16


def room_of(module: str) -> str:
    """Return the room of a module: the longest name in ROOMS that it begins with."""
    module = IN_ROOM.get(module, module)
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next(name for name in names if name in ROOMS)


def may_import(room: str) -> set[str]:
    """Return the rooms that a room may import, directly or through others."""
    found = {room}
    for other in ROOMS[room]:
        found |= may_import(other)
    return found


def is_same_folder(room: str, other: str) -> bool:
    """Tell whether one room is a subfolder of the other, and these may import each other."""
    inside = f"{room}.".startswith(f"{other}.") or f"{other}.".startswith(f"{room}.")
    return inside and not STRICT & {room, other}


def our_imports() -> dict[str, set[str]]:
    """Return for each module the modules of ours that it imports, at the top or in a function."""
    found: dict[str, set[str]] = {}
    for package in ALLOWED:
        for file in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            targets = (one.module for one in find_imports(file) if one.package in ALLOWED)
            found[name] = {target for target in targets if target != name}
    return found


def test_rooms_import_only_what_they_may() -> None:
    refused = [
        f"{module} imports {target}: {room_of(module)} may not import {room_of(target)}"
        for module, targets in our_imports().items()
        for target in targets
        if room_of(target) not in may_import(room_of(module))
        and not is_same_folder(room_of(module), room_of(target))
    ]
    assert not refused, "\n".join(refused)


def test_no_circles_between_files() -> None:
    imports = our_imports()
    circles = [circle for circle in strongly_connected(imports) if len(circle) > 1]
    assert not circles, "\n".join(" <-> ".join(sorted(circle)) for circle in circles)


@pytest.mark.parametrize("depth", [2, 3])
def test_no_circles_between_sibling_folders(depth: int) -> None:
    folders: dict[str, set[str]] = {}
    for module, targets in our_imports().items():
        folder = folder_of(module, depth)
        for target in targets:
            other = folder_of(target, depth)
            if folder and other and folder != other:
                folders.setdefault(folder, set()).add(other)
                folders.setdefault(other, set())
    circles = [circle for circle in strongly_connected(folders) if len(circle) > 1]
    assert not circles, "\n".join(" <-> ".join(sorted(circle)) for circle in circles)


def folder_of(module: str, depth: int) -> str | None:
    """Return the folder of so many names that a module is in, if it is in one."""
    folder = ".".join(module.split(".")[:depth])
    return folder if (ROOT / folder.replace(".", "/")).is_dir() else None


def strongly_connected(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the strongly connected components of a graph (Tarjan)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for other in graph.get(node, set()):
            if other not in index:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], index[other])
        if lowest[node] == index[node]:
            component: set[str] = set()
            while node not in component:
                component.add(stack.pop())
            components.append(component)

    for node in graph:
        if node not in index:
            visit(node)
    return components


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"d"}}
    assert {frozenset(part) for part in strongly_connected(graph) if len(part) > 1} == {
        frozenset("abc")
    }


def test_folders_hold_at_most_sixteen_modules() -> None:
    counts: dict[str, int] = {}
    for package in ALLOWED:
        for file in (ROOT / package).rglob("*.py"):
            if file.name != "__init__.py":
                folder = str(file.parent.relative_to(ROOT))
                counts[folder] = counts.get(folder, 0) + 1
    crowded = {folder: count for folder, count in counts.items() if count > LARGEST_ROOM}
    assert not crowded


def test_one_place_calls_backward() -> None:
    calls = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for package in ("simmim", "swinv2")
        for file in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "backward"
    ]
    assert len(calls) == 1, calls
    assert calls[0].startswith("simmim/engine/loop.py")


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
    assert imported - {"typing_extensions"} == core


def test_webdataset_neither_opens_nor_decodes_for_us() -> None:
    found = [one for one in imports_of("simmim") if one.package == "webdataset"]
    assert {str(one.file.relative_to(ROOT)) for one in found} == STREAMS
    assert {(one.module, one.inside_function) for one in found} == {("webdataset", True)}
    used = {
        node.attr
        for name in STREAMS
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "webdataset"
    }
    assert used == WEBDATASET


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
