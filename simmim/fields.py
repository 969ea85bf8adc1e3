"""Help on recipes: every field with its type, bounds and default, as `--help-fields` prints it."""

import dataclasses
import difflib
import functools
import operator
import textwrap
import types
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeAlias,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from cyclopts import Parameter

from data_prep.bounds import check_bounds, own_bounds
from data_prep.validation import adapter

if TYPE_CHECKING:
    from simmim.recipe import RecipeError

Overrides: TypeAlias = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
"""What a command leaves to the recipe: `--KEY VALUE`."""
Section: TypeAlias = Annotated[tuple[str, ...] | None, Parameter(consume_multiple=(0, 1))]
"""A section of a recipe, or all of it if none is named."""

_WIDTH = 100
_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path"}
_COUNTED = ("integer", "number", "text")


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Options of a command that reads a recipe."""

    config: Path | None = None
    """Recipe, a YAML file. --KEY VALUE overrides any field of it. (required)"""
    help_fields: Section = None
    """Show the fields of the recipe, or of one section, with bounds and defaults."""

    def __post_init__(self) -> None:
        check_bounds(self, "--")

    def recipe_file(self, overrides: Sequence[str] = ()) -> Path:
        """Return the file of the recipe.

        Raises:
            RecipeError: none was given.
        """
        if self.config is not None:
            return self.config
        typed = [text.partition("=")[0] for text in overrides if text.startswith("--")]
        options = [f"--{name}" for name in (*self.names(), "help", "version")]
        for name in typed:
            for meant in difflib.get_close_matches(name, options, n=1, cutoff=0.8):
                raise recipe_error(f"{name} is unknown: did you mean {meant}?")
        stray = [text for text in overrides[:1] if not text.startswith("-")]
        if overrides[:1] and not overrides[0].startswith("--") and not stray:
            raise recipe_error(f"{overrides[0]}: options begin with two dashes.")
        found = f"--config {stray[0]}" if stray else "one, for example from jobs/"
        raise recipe_error(f"--config is missing: give {found}.")

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the options as they are typed, without dashes in front."""
        return [field.name.replace("_", "-") for field in dataclasses.fields(cls)]


def recipe_error(message: str) -> "RecipeError":
    """Return a mistake in a recipe; only the command that has one imports more."""
    from simmim.recipe import RecipeError  # noqa: PLC0415

    return RecipeError(message)


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field of a recipe, or a section of fields."""

    name: str
    """Name with the sections around it: `training.optimizer.lr`."""
    about: str
    """What it is, with its unit."""
    value: str = ""
    """Type, bounds and default; empty for a section."""

    @property
    def lines(self) -> list[str]:
        """The field as text."""
        if not self.value:
            return ["", *textwrap.wrap(f"{self.name}: {self.about}".rstrip(": "), _WIDTH)]
        indent = " " * 6
        about = textwrap.wrap(self.about, _WIDTH, initial_indent=indent, subsequent_indent=indent)
        return [f"  --{self.name}  {self.value}", *about]


def describe(recipe_type: type[Any], section: str = "") -> str:
    """Return the fields of a recipe, or of a section or single field of it, as text.

    Raises:
        RecipeError: it has no such section.
    """
    found = list(fields_of(recipe_type))
    wanted = [field for field in found if not section or f"{field.name}.".startswith(f"{section}.")]
    if not wanted:
        sections = [field.name for field in found if not field.value]
        close = difflib.get_close_matches(section, [field.name for field in found], n=1)
        hint = f"did you mean {close[0]}?" if close else f"give one of {', '.join(sections)}."
        raise recipe_error(f"the recipe has no section {section}; {hint}")
    return "\n".join(line for field in wanted for line in field.lines).strip("\n")


def has_section(recipe_type: type[Any], section: str) -> bool:
    """Return whether a recipe has a section, or a field, of this name."""
    return not section or any(field.name == section for field in fields_of(recipe_type))


def fields_of(recipe_type: type[Any], prefix: str = "") -> Iterator[Field]:
    """Yield all fields of a recipe; first those that are in no section, as in a file."""
    about = _documentation(recipe_type)
    hints = get_type_hints(recipe_type, include_extras=True)
    refused: tuple[str, ...] = getattr(recipe_type, "refused_values", tuple)()
    sections = []
    for field in dataclasses.fields(recipe_type):
        hint = hints[field.name]
        text = " ".join(about[field.name].split())
        inner = section_type(hint)
        if inner is None:
            value = f"{type_text(_accepted(hint, refused))} ({_default(field)})"
            yield Field(name=f"{prefix}{field.name}", about=text, value=value)
        else:
            sections.append((Field(name=f"{prefix}{field.name}", about=text), inner))
    for section, inner in sections:
        yield section
        yield from fields_of(inner, f"{section.name}.")


def _accepted(hint: Any, refused: Collection[object]) -> Any:
    """Return a type without the values that a class of settings refuses."""
    if not refused or get_origin(hint) not in (Union, types.UnionType):
        return hint
    kept = [
        part
        for part in get_args(hint)
        if get_origin(part) is not Literal or not {*get_args(part)} <= {*refused}
    ]
    return functools.reduce(operator.or_, kept)


def section_type(hint: Any) -> Any:
    """Return the settings class of a field that is a section, or None."""
    parts = (hint, *get_args(hint))
    found = (part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part))
    return next(found, None)


def _documentation(recipe_type: type[Any]) -> dict[str, str]:
    """Return the docstring of each field; pydantic reads those of one class, without its bases."""
    found: dict[str, str] = {}
    for base in reversed(recipe_type.__mro__):
        if dataclasses.is_dataclass(base):
            for name, field in adapter(base).json_schema()["properties"].items():
                found[name] = field.get("description") or found.get(name, "")
    return found


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is not dataclasses.MISSING:
        return f"default: {_value_text(field.default)}"
    if field.default_factory is not dataclasses.MISSING:
        return f"default: {_value_text(field.default_factory())}"
    return "required"


def _value_text(value: Any) -> str:
    """Return a value as a recipe writes it."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case tuple() | list():
            return f"[{', '.join(map(_value_text, value))}]"
        case float() if value == int(value) and abs(value) < 1e6:
            return str(int(value))
    return str(value)


def type_text(hint: Any) -> str:
    """Return a type in words, with what its values may be."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = own_bounds(hint)
        return type_text(parts[0]) if bounds is None else f"{type_text(parts[0])}, {bounds}"
    if origin in (Union, types.UnionType):
        texts = list(dict.fromkeys(map(type_text, parts)))
        return (", or " if any(", " in text for text in texts) else " or ").join(texts)
    if origin is Literal:
        return " | ".join(map(_value_text, parts))
    if origin is tuple:
        return _list_text(parts)
    if dataclasses.is_dataclass(hint):
        return f"{{{', '.join(field.name for field in dataclasses.fields(hint))}}}"
    return "null" if hint is type(None) else _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _list_text(parts: tuple[Any, ...]) -> str:
    if parts[-1] is not Ellipsis:
        return f"[{', '.join(map(type_text, parts))}]"
    if get_origin(parts[0]) is tuple:
        return f"list of {type_text(parts[0])}"
    element, _, bounds = type_text(parts[0]).partition(", ")
    plural = "s" if element in _COUNTED else ""
    return f"list of {element}{plural}" + (f", each {bounds}" if bounds else "")
