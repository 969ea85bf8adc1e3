"""Recipes: typed, strict settings read from one YAML file.

Each component owns the schema of its settings, a class decorated with `settings`; a recipe is
composed of such classes. All mistakes in a file are reported at once, before anything starts.
"""

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from typing_extensions import dataclass_transform

from data_prep.bounds import OUT_OF_BOUNDS, bounds_at, check_bounds, shapes_in
from data_prep.format.text import count_noun
from data_prep.validation import adapter
from simmim.recipe_text import MOST_BYTES, RecipeDumper, RecipeTextError, read_text

MOST_MISTAKES = 50
"""Mistakes that are listed."""
YES_OR_NO = ("yes", "no", "on", "off", "y", "n")
"""Words that YAML 1.1 takes for true and false, and YAML 1.2 and recipes for text."""
LARGEST_INTEGER = 2**63 - 1
"""Largest integer of a recipe, of the steps and samples of a training, and of a checkpoint."""
ALTERNATIVES = (
    ("training.epochs", "training.steps"),
    ("training.schedule.warmup_epochs", "training.schedule.warmup_steps"),
)
"""Fields of which a recipe has one: an override of one replaces the other."""
UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")

Settings = TypeVar("Settings")


class RecipeError(ValueError):
    """An invalid recipe; the message lists every mistake in it."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[Settings]) -> type[Settings]:
    """Turn a class into a frozen, keyword-only dataclass with strict validation.

    Bounds of numbers are declared in the annotations; see `data_prep.bounds`. `__post_init__` has
    the checks across fields; those of base classes run before it, without being called. The
    docstring below each field, with its unit, is shown by `--help-fields`.
    """
    cls.__own_check__ = vars(cls).get("__post_init__")  # type: ignore[attr-defined]
    cls.__post_init__ = _check  # type: ignore[attr-defined]
    cls.__pydantic_config__ = {  # type: ignore[attr-defined]
        "extra": "forbid",
        "strict": True,
        "allow_inf_nan": False,
        "use_attribute_docstrings": True,
    }
    return dataclass(frozen=True, kw_only=True)(cls)


def _check(self: Any) -> None:
    """Check the bounds of all fields, then what each class has to check across them."""
    check_bounds(self)
    for base in reversed(type(self).__mro__):
        if (check := vars(base).get("__own_check__")) is not None:
            check(self)


def read_values(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe file and apply `--a.b value` overrides, without validation.

    Raises:
        RecipeError: the file is missing or not YAML, or an override is malformed.
    """
    try:
        with path.open(encoding="utf-8") as file:
            values = read_text(file.read(MOST_BYTES + 1))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise RecipeError(
            f"recipe {path} cannot be read: {reason}. Give the path of a YAML recipe, "
            "for example one from jobs/."
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {error}") from None
    except RecipeTextError as error:
        raise RecipeError(f"recipe {path}: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path} must be a mapping of keys to values.")
    return override(values, dict(_parse_overrides(overrides)))


def override(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Replace values of a recipe by dotted key, in place, and return it.

    Of two fields in ALTERNATIVES, one that is given removes the other.

    Raises:
        RecipeError: a key goes through a value that is not a section.
    """
    for key, value in overrides.items():
        _assign(values, key.split("."), value)
    for pair in ALTERNATIVES:
        for one, other in (pair, pair[::-1]):
            if overrides.get(one) is not None and other not in overrides:
                _remove(values, other.split("."))
    return values


def _parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of `--key.key value` or `--key.key=value`."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise RecipeError(f"unexpected {argument!r}: write overrides as --key.key value.")
        name, separator, text = argument[2:].partition("=")
        if not separator:
            if not rest:
                raise RecipeError(f"--{name} has no value: write overrides as --key.key value.")
            text = rest.pop(0)
            if text.startswith("--"):
                raise RecipeError(f"--{name} has no value before {text}: add one.")
        try:
            yield name, read_text(text)
        except yaml.YAMLError:
            raise RecipeError(f"--{name}: {_shortened(text)} is not a YAML value.") from None
        except RecipeTextError as error:
            raise RecipeError(f"--{name}: {error}") from None


def _assign(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if values.get(key) is None:  # absent, or an empty section
            values[key] = {}
        inner = values[key]
        if not isinstance(inner, dict):
            raise RecipeError(f"--{'.'.join(keys)}: {key!r} is a value, not a section.")
        values = inner
    values[keys[-1]] = value


def _remove(values: dict[str, Any], keys: list[str]) -> None:
    for key in keys[:-1]:
        inner = values.get(key)
        if not isinstance(inner, dict):
            return
        values = inner
    values.pop(keys[-1], None)


def parse(
    recipe_type: type[Settings],
    values: dict[str, Any],
    source: str,
    options: Sequence[str] = (),
) -> Settings:
    """Validate `values` and build a recipe from them.

    Args:
        recipe_type: a class decorated with `settings`.
        values: parsed YAML.
        source: origin of the values, for the message.
        options: options of the command that may be meant by a key that is unknown.

    Raises:
        RecipeError: every unknown key, missing key, wrong type and impossible value.
    """
    try:
        text = json.dumps(values, default=plain_value)
    except (ValueError, RecursionError):
        raise RecipeError(
            f"{source} has a value that contains itself, is nested too deeply, or is a number of "
            "thousands of digits; remove it."
        ) from None
    large = [
        f"{where}: {_shortened(number)} does not fit into 64 bits; lower it."
        for where, number in _large_integers(values)
    ]
    if large:
        raise RecipeError(
            "\n  ".join(
                [f"{source} has {count_noun(len(large), 'mistake')}:", *large[:MOST_MISTAKES]]
            )
        )
    from pydantic import ValidationError  # noqa: PLC0415

    try:
        recipe: Settings = adapter(recipe_type).validate_json(text)
    except ValidationError as error:
        found = error.errors()
        mistakes = _one_for_each_field(found[:MOST_MISTAKES])
        lines = [_describe_mistake(recipe_type, mistake, options) for mistake in mistakes]
        number = count_noun(len(lines), "mistake")
        if len(found) > MOST_MISTAKES:
            lines.append(f"and {len(found) - MOST_MISTAKES:,} more")
        raise RecipeError("\n  ".join([f"{source} has {number}:", *lines])) from None
    return recipe


def plain_value(value: Any) -> Any:
    """Return a value of a Python script as a recipe has it.

    Paths become text, numbers and arrays of NumPy and PyTorch numbers and lists; any other object
    becomes its representation, which messages show.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    plain = getattr(value, "tolist", None)  # NumPy and PyTorch need not be imported
    return plain() if callable(plain) else str(value)


def _large_integers(value: Any, where: str = "") -> Iterator[tuple[str, int]]:
    """Yield the dotted key and the value of each integer that does not fit into 64 bits."""
    if isinstance(value, int) and not -LARGEST_INTEGER - 1 <= value <= LARGEST_INTEGER:
        yield where, value
    elif isinstance(value, dict | list | tuple):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            yield from _large_integers(part, f"{where}.{key}" if where else str(key))


def load(
    recipe_type: type[Settings],
    path: Path,
    overrides: Sequence[str] = (),
    options: Sequence[str] = (),
) -> Settings:
    """Read, override and validate a recipe file; see `read_values` and `parse`."""
    return parse(recipe_type, read_values(path, overrides), f"recipe {path}", options)


def _one_for_each_field(mistakes: Sequence[Any]) -> Iterator[Any]:
    """Merge pydantic's errors for the alternatives of a union into one error per field.

    pydantic appends the alternative to the location. If a value matches an alternative except for
    its bounds, or one of its parts, only that error is kept.
    """
    found: dict[tuple[Any, ...], Any] = {}
    for mistake in mistakes:
        key = mistake["loc"][-1:] if mistake["type"] in UNKNOWN_KEY else ()
        around = mistake["loc"][: len(mistake["loc"]) - len(key)]
        place = (*(part for part in around if not _names_a_type(part)), *key)
        message = mistake["msg"]
        if place in found and found[place]["type"] in OUT_OF_BOUNDS:
            continue
        if place in found:
            message = f"{found[place]['msg']}, or {message.removeprefix('Input should be ')}"
        found[place] = mistake | {"loc": place, "msg": message}
    for place, mistake in found.items():
        parts_of_it = (other for other in found if other != place and other[: len(place)] == place)
        if not any(parts_of_it):
            yield mistake


def _names_a_type(part: str | int) -> bool:
    """Return whether a part of a location is pydantic's name of an alternative of a union."""
    return isinstance(part, str) and (
        "[" in part or part.removeprefix("constrained-") in ("str", "int", "float", "bool")
    )


def _describe_mistake(recipe_type: type[Any], mistake: Any, options: Sequence[str]) -> str:
    path = [str(part) for part in mistake["loc"]]
    where = ".".join(path) or "the recipe"
    if mistake["type"] in UNKNOWN_KEY:
        return f"{where}: unknown key; {_suggestion(recipe_type, path, options)}"
    if mistake["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where}: missing; add it."
    message = mistake["msg"].removeprefix("Value error, ").replace("a valid array", "a list")
    if mistake["type"] == "value_error":
        return f"{where}: {message}"
    if mistake["type"] in OUT_OF_BOUNDS and (text := bounds_at(recipe_type, path)):
        return f"{where} is {_shortened(mistake['input'])}; it must be {text}."
    if mistake["type"] == "dataclass_type":
        fields = ", ".join(_field_names(recipe_type, path))
        return (
            f"{where}: must be a section with fields {fields}, got {_shortened(mistake['input'])}"
        )
    hint = ""
    if mistake["type"] == "bool_type" and str(mistake["input"]).lower() in YES_OR_NO:
        hint = ": write true or false"
    elif str(mistake["type"]).startswith(("int_", "float_")) and isinstance(mistake["input"], str):
        hint = ": write a decimal number"
    return f"{where}: {message}, got {_shortened(mistake['input'])}{hint}"


def _suggestion(recipe_type: type[Any], path: list[str], options: Sequence[str]) -> str:
    refused: dict[str, str] = getattr(_section(recipe_type, path[:-1]), "REFUSED", {})
    if path[-1] in refused:
        return f"{refused[path[-1]]}."
    legal = _field_names(recipe_type, path[:-1])
    meant = {name: name for name in legal}
    if len(path) == 1:  # --resum instead of --resume is read as a key of the recipe
        meant |= {name: f"--{name}" for name in options}
    if close := difflib.get_close_matches(path[-1], meant, n=1):
        return f"did you mean {meant[close[0]]}?"
    if elsewhere := [name for name in _dotted_names(recipe_type) if name.endswith(f".{path[-1]}")]:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"legal here: {', '.join(legal)}."


def _dotted_names(recipe_type: type[Any], prefix: str = "") -> Iterator[str]:
    """Yield the names of all fields of a recipe, with the sections around them."""
    hints = get_type_hints(recipe_type)
    for field in dataclasses.fields(recipe_type):
        yield f"{prefix}{field.name}"
        for section in shapes_in(hints[field.name]):
            yield from _dotted_names(section, f"{prefix}{field.name}.")


def _shortened(value: object) -> str:
    """Return a value as a message shows it: null, true and false of YAML, else at most 200
    characters of its representation."""
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 200 else f"{text[:200]}…"


def _section(recipe_type: type[Any], path: list[str]) -> type[Any]:
    """Return the settings class of a section, or of the last one on its path."""
    for part in path:
        if part.isdigit():  # an index in a list of settings
            continue
        found = list(shapes_in(get_type_hints(recipe_type).get(part)))
        if not found:
            break
        recipe_type = found[0]
    return recipe_type


def _field_names(recipe_type: type[Any], path: list[str]) -> list[str]:
    return [field.name for field in dataclasses.fields(_section(recipe_type, path))]


def to_values(recipe: Any) -> dict[str, Any]:
    """Return a recipe as plain values including every default; the inverse of `parse`."""
    values = adapter(type(recipe)).dump_python(recipe, mode="json")
    assert isinstance(values, dict)
    return values


def to_yaml(recipe: Any) -> str:
    """Return a recipe as YAML text including every default."""
    return yaml.dump(to_values(recipe), Dumper=RecipeDumper, sort_keys=False)


def recipe_hash(recipe: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of all values of a recipe."""
    text = json.dumps(to_values(recipe), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the differences between two recipes' values: dotted key → `old → new`."""
    found: dict[str, str] = {}
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found[f"{prefix}{key}"] = f"{_as_text(before)} → {_as_text(after)}"
    return found


def _as_text(value: Any) -> str:
    """Return a value as a recipe has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
