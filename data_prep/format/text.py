"""Counts, lengths and names as text for messages."""

import re
import sys


def format_bytes(length: float) -> str:
    """Return a length in bytes as text with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if length < 1024:
            return f"{length:.0f} {unit}" if unit == "B" else f"{length:.1f} {unit}"
        length /= 1024
    return f"{length:.1f} TiB"


def count_noun(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun in the singular or plural."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def count_range(least: int, most: int) -> str:
    """Return two numbers as a range, `5 to 14`, or as one if they are equal."""
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def printable(name: str) -> str:
    """Return a class name as one printable line; folder names may contain anything."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters other than tabs and line feeds, bidirectional overrides, undecodable bytes."""


def printable_lines(text: object) -> str:
    """Return a message without control characters, which could rewrite what a terminal shows.

    File names, YAML and checkpoints may contain any; they are shown as escapes: `\\x1b`.
    """
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], str(text))


class WarnOnce:
    """Writes warnings to standard error, each text once: a source is listed several times."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, text: str) -> None:
        """Write a warning unless it was written before."""
        if text not in self._said:
            self._said.add(text)
            sys.stderr.write(f"WARNING: {text}\n")
