"""The YAML of recipes: the types of YAML 1.2, within limits of size, depth and aliases.

A recipe may come from anywhere, so nothing in it may take long, take memory, or mean another value
than what is written.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import yaml


class RecipeTextError(ValueError):
    """A text that is not YAML, or is beyond the limits of recipes."""


MOST_BYTES = 2**20
"""Maximum size of a recipe file; one that lists 20,000 class names has half of that."""
MOST_CHARACTERS = 4 * 2**20
"""Maximum number of characters of all values, with what aliases stand for."""
MOST_VALUES = 100_000
"""Maximum number of values of a recipe, with what its aliases stand for."""
DEEPEST = 50
"""Maximum number of lists and mappings within each other."""
LONGEST_NUMBER = 64
"""Maximum number of characters of a number."""
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML loader for recipes: limited in size, depth and aliases, with the types of YAML 1.2.

    Only true and false are booleans and only decimal and hexadecimal numbers are numbers: `1:2:3`,
    `010`, `yes` and dates are text. `1e-4` is a number, and duplicate keys are refused.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}
        """Number of values of each node that is complete, with its aliases expanded."""
        self._lengths: dict[yaml.Node, int] = {}
        """Number of their characters."""
        self._characters = 0
        """Characters up to here, with aliases expanded."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > DEEPEST:
            raise RecipeTextError(
                f"line {line} has more than {DEEPEST} lists or mappings within each other."
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        assert node is not None
        if is_alias and node not in self._sizes:
            raise RecipeTextError(
                f"line {line} has an alias (*name) that refers to itself; remove it."
            )
        if not is_alias:
            self._sizes[node] = 1 + sum(self._sizes[part] for part in _parts(node))
            self._lengths[node] = sum(self._lengths[part] for part in _parts(node))
            if isinstance(node, yaml.ScalarNode):
                _check_characters(node.value, line, index)
                self._lengths[node] = len(node.value)
        if is_alias or isinstance(node, yaml.ScalarNode):
            self._characters += self._lengths[node]
        if self._characters > MOST_CHARACTERS:
            raise RecipeTextError(
                f"up to line {line} there are more than {MOST_CHARACTERS:,} characters, counting "
                "what aliases (*name) and merge keys (<<) stand for; shorten the values."
            )
        if self._sizes[node] > MOST_VALUES or len(self._sizes) > MOST_VALUES:
            raise RecipeTextError(
                f"up to line {line} there are more than {MOST_VALUES:,} values, counting what "
                "aliases (*name) and merge keys (<<) stand for; write the values out."
            )
        return node

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        # The nodes are as written here; merge keys (<<) add keys only later.
        node = super().compose_mapping_node(anchor)
        line = node.start_mark.line + 1
        keys = []
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeTextError(
                    f"below line {line}, a key is a list or a mapping; use a name."
                )
            if key.tag != f"{_TAG}merge":
                key.tag = f"{_TAG}str"  # also a key that looks like a number or a date
            keys.append(key.value)
        twice = sorted(key for key, count in Counter(keys).items() if count > 1)
        if twice:
            raise RecipeTextError(
                f"below line {line}, duplicate keys: {', '.join(twice[:5])}. Keep one of each."
            )
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        # PyYAML's constructors raise whatever a value leads to, when a tag (!!bool) is not for it.
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecipeTextError):
            raise
        except Exception:
            tag = node.tag.replace(_TAG, "!!")
            raise RecipeTextError(
                f"line {node.start_mark.line + 1} has a value that is not {tag}; remove the tag or "
                "correct the value."
            ) from None

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Return the number that a scalar is."""
        text = node.value.replace("_", "").lower()
        if len(text) > LONGEST_NUMBER:
            raise RecipeTextError(
                f"line {node.start_mark.line + 1} has a number of {len(text):,} characters."
            )
        try:
            if node.tag == f"{_TAG}float":
                return float(text)
            return int(text, 16 if "x" in text else 10)
        except ValueError:
            raise RecipeTextError(
                f"line {node.start_mark.line + 1}: {node.value!r} is not a number."
            ) from None


def _check_characters(text: str, line: int, key: Any) -> None:
    """Refuse what escapes can write into a string, and neither JSON nor UTF-8 can hold."""
    for character in text:
        if "\ud800" <= character <= "\udfff":
            where = f"{key.value[:80]!r}" if isinstance(key, yaml.ScalarNode) else "a text"
            raise RecipeTextError(
                f"line {line}: {where} has the character U+{ord(character):04X}, which no text "
                "may have; remove it."
            )


def _parts(node: yaml.Node) -> Iterator[yaml.Node]:
    """Yield the entries of a list, or the keys and values of a mapping."""
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


class RecipeDumper(yaml.SafeDumper):
    """Inverse of the loader: quotes text that would be read as a number."""


_EXPONENT = re.compile(r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_DIGITS = list("-+.0123456789")
RecipeDumper.add_implicit_resolver(f"{_TAG}float", _EXPONENT, _DIGITS)
_Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in (
    ("bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("int", re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), _DIGITS),
    ("float", re.compile(r"^[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)$"), _DIGITS),
    ("float", _EXPONENT, _DIGITS),
    ("merge", re.compile(r"^<<$"), ["<"]),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", _pattern, _first)
_Loader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix(_TAG) in ("bool", "null", "str", "seq", "map")
}
for _name in ("int", "float"):
    _Loader.add_constructor(f"{_TAG}{_name}", _Loader.construct_number)


def read_text(text: str) -> Any:
    """Return the values of a YAML text.

    Raises:
        RecipeTextError: it is beyond the limits of recipes; the message is the reason.
        yaml.YAMLError: it is not YAML.
    """
    if len(text) > MOST_BYTES:
        raise RecipeTextError(f"it is larger than {MOST_BYTES // 2**20} MiB.")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except (yaml.YAMLError, RecipeTextError):
        raise
    except (ValueError, OverflowError):  # PyYAML on an escape beyond Unicode: "\U00110000"
        raise RecipeTextError(
            f"line {loader.line + 1} has an escape (\\U…) that is no character."
        ) from None
    finally:
        loader.dispose()
