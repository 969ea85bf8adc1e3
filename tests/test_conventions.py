"""Conventions that keep what may change in one place, read from the source.

Environment variables and private names of other libraries have one module in each package, and what
differs between tasks is declared by the task.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("swinv2", "data_prep", "simmim")
TASKS = ("pretrain", "classification", "segmentation", "detection", "video", "probe")
ENVIRONMENT = {"simmim": "environment.py", "data_prep": "commands.py"}
"""The module of each package that reads or changes environment variables."""


@pytest.mark.parametrize("package", PACKAGES)
def test_one_module_reads_the_environment(package: str) -> None:
    found = {
        file.relative_to(ROOT / package).as_posix()
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if _names_the_environment(node)
    }
    assert found == ({ENVIRONMENT[package]} if package in ENVIRONMENT else set())


def _names_the_environment(node: ast.AST) -> bool:
    """Return whether a node is `os.environ`, `os.getenv`, or an import of one of them."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    match node:
        case ast.Attribute(value=ast.Name(id="os"), attr=name):
            return name in names
        case ast.ImportFrom(module="os", names=imported):
            return any(one.name in names for one in imported)
    return False


DOCUMENTED = {"_exit", "_current_frames", "_replace", "_fields", "_field_defaults"}
"""Names with an underscore that Python documents: of `os`, `sys` and named tuples."""
TYPES_ONLY = {"_Decompress"}
"""Names in annotations that exist for type checkers."""


@pytest.mark.parametrize("package", PACKAGES)
def test_private_names_of_other_libraries_are_in_one_module(package: str) -> None:
    trees = {
        file: ast.parse(file.read_text(encoding="utf-8"))
        for name in PACKAGES
        for file in sorted((ROOT / name).rglob("*.py"))
    }
    known = DOCUMENTED | TYPES_ONLY
    known |= {name for tree in trees.values() for node in ast.walk(tree) for name in _defined(node)}
    found = [
        f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} {name}"
        for file, tree in trees.items()
        if file.is_relative_to(ROOT / package) and file != ROOT / package / "compat.py"
        for node in ast.walk(tree)
        for name in _private_names(node)
        if name not in known
    ]
    assert not found, "\n".join(found)


def _defined(node: ast.AST) -> list[str]:
    """Return the names that a statement of ours defines."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Name(id=name, ctx=ast.Store()):
            return [name]
        case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
            return [name]
    return []


def _private_names(node: ast.AST) -> list[str]:
    """Return the private names that an expression or an import uses."""
    match node:
        case ast.Attribute(attr=name):
            names = [name]
        case ast.Call(
            func=ast.Name(id="getattr" | "setattr" | "hasattr"),
            args=[_, ast.Constant(value=str(name)), *_],
        ):
            names = [name]
        case ast.Import(names=imported):
            names = [part for one in imported for part in one.name.split(".")]
        case ast.ImportFrom(module=str(module), names=imported) if (
            module.split(".")[0] not in PACKAGES
        ):
            names = [*module.split("."), *(one.name for one in imported)]
        case _:
            return []
    return [name for name in names if re.match(r"_(?!_)", name)]


def test_nobody_asks_for_the_class_of_a_recipe_or_a_stage() -> None:
    """Only the folder of a task may: what differs between tasks is declared by the task."""
    kinds = {
        node.name
        for file in (ROOT / "simmim").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Recipe", "Stage"))
    }
    assert {"TaskRecipe", "PretrainRecipe", "ClassificationStage"} <= kinds
    asking = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in sorted((ROOT / "simmim").rglob("*.py"))
        if file.parent.name not in TASKS
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("isinstance", "issubclass")
        and kinds & {one.id for one in ast.walk(node.args[1]) if isinstance(one, ast.Name)}
    ]
    assert not asking, "\n".join(asking)
