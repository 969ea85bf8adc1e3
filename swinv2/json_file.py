"""JSON files of any origin: limited in size, without duplicate keys or numbers that JSON lacks."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

MOST_BYTES = 2**24
"""Maximum size of a `config.json`."""
MOST_SHOWN = 200
"""Characters of a value in a message."""


def load_json(file: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not valid JSON, has duplicate keys, or is too large or too deep; the
            message is the reason.
    """
    with file.open("rb") as opened:
        text = opened.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES // 2**20} MiB")
    try:
        return json.loads(
            text.decode("utf-8", errors="replace"),
            parse_constant=_refuse_constant,
            object_pairs_hook=_without_duplicates,
        )
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"it has the key {shortened(twice)} twice")
    return content


def shortened(value: object) -> str:
    """Return the representation of a value for a message."""
    return repr(value)[:MOST_SHOWN]
