"""Labels in `cls` members: one rule for every command that reads them."""

import re

MAX_CLASSES = 1_000_000
"""Upper bound on the number of classes."""

MAX_LABEL_BYTES = 32
"""Longest `cls` member, in bytes."""

_DIGITS = re.compile("[0-9]+")


class LabelError(ValueError):
    """A `cls` member holds no label; the message is a clause."""


def parse_label(data: bytes) -> int:
    """Return the label in a `cls` member: decimal digits, with blanks around them allowed.

    `007` is 7, as everywhere in WebDataset. Signs, points, names and nothing at all are refused.

    Args:
        data: content of the member, at least its first `MAX_LABEL_BYTES` + 1 bytes.

    Raises:
        LabelError: it is not an integer from 0 to `MAX_CLASSES` - 1.
    """
    text = data.decode("ascii", "replace").strip()
    if len(data) <= MAX_LABEL_BYTES and _DIGITS.fullmatch(text) and int(text) < MAX_CLASSES:
        return int(text)
    raise LabelError(
        f"its label (cls) must be an integer from 0 to {MAX_CLASSES - 1:,}, got {text[:40]!r}"
    )
