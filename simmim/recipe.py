"""Recipes: typed, strict settings read from one YAML file.

Each component owns the schema of its settings, a class made with `settings`; a recipe is a class
of such classes. Everything that is wrong with a file is listed at once, before anything starts.
"""

import dataclasses
import difflib
import hashlib
import json
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import dataclass_transform

Settings = TypeVar("Settings")


class RecipeError(ValueError):
    """A recipe that cannot be used; the text lists every mistake in it."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[Settings]) -> type[Settings]:
    """Make a class of fields into frozen, keyword-only, strictly validated settings.

    A docstring below each field says what it is and its unit; it is shown by `--help`.
    """
    cls.__pydantic_config__ = ConfigDict(  # type: ignore[attr-defined]
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    return dataclass(frozen=True, kw_only=True)(cls)


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-4` is a number and a key given twice is a mistake."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        # Here the file is as written; later on merge keys (<<) bring in what it says only once.
        node = super().compose_mapping_node(anchor)
        line = node.start_mark.line + 1
        keys = []
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"below line {line}, a key is a list or a mapping; use a name.")
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"  # also a key that looks like a number or a date
            keys.append(key.value)
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise RecipeError(f"below line {line}, given twice: {', '.join(twice)}. Keep one.")
        return node


class _Dumper(yaml.SafeDumper):
    """The inverse of the loader: text that it would take for a number is quoted."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def read_values(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe file and lay `--a.b value` arguments over it, without checking either.

    Raises:
        RecipeError: the file is missing or not YAML, or an argument is not of that form.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise RecipeError(
            f"recipe {path} cannot be read: {reason}. Give the path of a YAML recipe, "
            "one of jobs/ for example."
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {error}") from None
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path} must be a mapping of keys to values.")
    for keys, value in _parse_overrides(overrides):
        _assign(values, keys, value)
    return values


def _parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise RecipeError(f"{argument!r} is not understood: overrides read --key.key value.")
        name, separator, text = argument[2:].partition("=")
        if not separator:
            if not rest:
                raise RecipeError(f"--{name} has no value: overrides read --key.key value.")
            text = rest.pop(0)
            if text.startswith("--"):
                raise RecipeError(f"--{name} has no value: {text} follows. Put one between them.")
        try:
            yield name.split("."), yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
        except yaml.YAMLError:
            raise RecipeError(f"--{name}: {text!r} is not a YAML value.") from None


def _assign(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if values.get(key) is None:  # absent, or a section with nothing in it
            values[key] = {}
        inner = values[key]
        if not isinstance(inner, dict):
            raise RecipeError(f"--{'.'.join(keys)}: {key!r} is a value, it has no keys below it.")
        values = inner
    values[keys[-1]] = value


def parse(recipe_type: type[Settings], values: dict[str, Any], source: str) -> Settings:
    """Check `values` against `recipe_type` and build it.

    Args:
        recipe_type: a class made with `settings`.
        values: what the YAML file says.
        source: where the values come from, for the message.

    Raises:
        RecipeError: lists every unknown key, missing key, wrong type and impossible value.
    """
    try:
        text = json.dumps(values, default=str)
    except ValueError:
        raise RecipeError(f"{source} has an alias (*name) within what it names; undo it.") from None
    try:
        recipe: Settings = _adapter(recipe_type).validate_json(text)
    except ValidationError as error:
        mistakes = _one_for_each_field(error.errors())
        lines = [_describe_mistake(recipe_type, mistake) for mistake in mistakes]
        number = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise RecipeError("\n  ".join([f"{source} has {number}:", *lines])) from None
    return recipe


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


def _adapter(recipe_type: type[Any]) -> TypeAdapter[Any]:
    """Return what checks `recipe_type`; building it takes longer than all the checking."""
    if recipe_type not in _ADAPTERS:
        _ADAPTERS[recipe_type] = TypeAdapter(recipe_type)
    return _ADAPTERS[recipe_type]


def load(recipe_type: type[Settings], path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Read, override and check a recipe file; see `read_values` and `parse`."""
    return parse(recipe_type, read_values(path, overrides), f"recipe {path}")


UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")


def _one_for_each_field(mistakes: Sequence[Any]) -> Iterator[Any]:
    """Join what pydantic says of each type that a field may have, and is not.

    It puts the type into the location, in square brackets. Where the value fits one of the types
    but for a part of it, only that part is the mistake.
    """
    found: dict[tuple[Any, ...], Any] = {}
    for mistake in mistakes:
        key = mistake["loc"][-1:] if mistake["type"] in UNKNOWN_KEY else ()
        around = mistake["loc"][: len(mistake["loc"]) - len(key)]
        place = (*(part for part in around if not _names_a_type(part)), *key)
        message = mistake["msg"]
        if place in found:
            message = f"{found[place]['msg']}, or {message.removeprefix('Input should be ')}"
        found[place] = mistake | {"loc": place, "msg": message}
    for place, mistake in found.items():
        parts_of_it = (other for other in found if other != place and other[: len(place)] == place)
        if not any(parts_of_it):
            yield mistake


def _names_a_type(part: str | int) -> bool:
    """Tell whether a part of a location is pydantic's name of one of the types of a field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool"))


def _describe_mistake(recipe_type: type[Any], mistake: Any) -> str:
    path = [str(part) for part in mistake["loc"]]
    where = ".".join(path) or "the recipe"
    if mistake["type"] in UNKNOWN_KEY:
        legal = _field_names(recipe_type, path[:-1])
        close = difflib.get_close_matches(path[-1], legal, n=1)
        hint = f"did you mean {close[0]}?" if close else f"legal here: {', '.join(legal)}."
        return f"{where}: unknown key; {hint}"
    if mistake["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where}: missing; add it."
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {message}, got {mistake['input']!r}"


def _field_names(recipe_type: type[Any], path: list[str]) -> list[str]:
    for part in path:
        if part.isdigit():  # a place in a list of settings
            continue
        found = list(_settings_in(get_type_hints(recipe_type).get(part)))
        if not found:
            break
        recipe_type = found[0]
    return [field.name for field in dataclasses.fields(recipe_type)]


def _settings_in(hint: Any) -> Iterator[type[Any]]:
    """Yield the classes of settings that a type is made of."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for part in get_args(hint):
        yield from _settings_in(part)


def to_values(recipe: Any) -> dict[str, Any]:
    """Return a recipe as plain values, every default written out; `parse` is its inverse."""
    values = _adapter(type(recipe)).dump_python(recipe, mode="json")
    assert isinstance(values, dict)
    return values


def to_yaml(recipe: Any) -> str:
    """Return a recipe as the text of a YAML file, every default written out."""
    return yaml.dump(to_values(recipe), Dumper=_Dumper, sort_keys=False)


def recipe_hash(recipe: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of everything a recipe says."""
    text = json.dumps(to_values(recipe), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return what differs between two recipes' values: dotted key → `old → new`."""
    found: dict[str, str] = {}
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found[f"{prefix}{key}"] = f"{before} → {after}"
    return found


def describe(recipe_type: type[Any]) -> str:
    """Return every field of a recipe with type, default and documentation, a line or two each."""
    return "\n".join(_describe_fields(recipe_type, ""))


def _describe_fields(recipe_type: type[Any], prefix: str) -> Iterator[str]:
    documentation = _documentation(recipe_type)
    hints = get_type_hints(recipe_type)
    for field in dataclasses.fields(recipe_type):
        hint = hints[field.name]
        inner = [kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)]
        text = " ".join(documentation[field.name].split())
        if inner:
            yield f"  {prefix}{field.name}: {text}".rstrip(": ")
            yield from _describe_fields(inner[0], f"{prefix}{field.name}.")  # type: ignore[arg-type]
            continue
        default = (
            "required" if field.default is dataclasses.MISSING else f"default {field.default!r}"
        )
        yield f"  --{prefix}{field.name}  ({_type_name(hint)}, {default})"
        if text:
            yield f"        {text}"


def _documentation(recipe_type: type[Any]) -> dict[str, str]:
    """Return the docstring of each field; pydantic reads those of one class, not of its bases."""
    found: dict[str, str] = {}
    for base in reversed(recipe_type.__mro__):
        if dataclasses.is_dataclass(base):
            for name, field in _adapter(base).json_schema()["properties"].items():
                found[name] = field.get("description") or found.get(name, "")
    return found


def _type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(part) for part in get_args(hint))
    if hint is type(None):
        return "null"
    arguments = get_args(hint)
    if arguments and get_origin(hint) is not tuple:
        return " | ".join(str(argument) for argument in arguments)
    return getattr(hint, "__name__", str(hint)) if not arguments else "list"
