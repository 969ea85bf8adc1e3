"""Columns of lists: which one has the paths and the labels."""

import re
from collections.abc import Sequence

from data_prep.format.storage import Location
from data_prep.sources.files import SourceError

_PATHS = (
    "path paths file filename file_name filepath file_path image images image_path imagepath "
    "image_file image_filename image_name img img_path img_file impath relative_path"
)
PATH_NAMES = frozenset(_PATHS.split())
"""Names of columns with paths, in lower case, with underscores for blanks and hyphens."""
_LABELS = (
    "label label_name label_id class class_name classname class_id class_index "
    "class_label category category_name category_id target cls"
)
LABEL_NAMES = frozenset(_LABELS.split())
"""Names of columns with labels, written likewise; plurals are fields: several classes per image."""


def find_column(names: Sequence[str], role: str, asked: str | None, path: Location) -> str | None:
    """Return the column with the paths or labels of a list, or None.

    A column called `path` (`label`) goes before its synonyms; case and blanks do not matter.

    Args:
        names: the columns.
        role: `path` or `label`.
        asked: name given by the user; None: found by name.
        path: the list, for messages.

    Raises:
        SourceError: several columns may be meant.
    """
    if asked is not None and asked in names:
        return _only(names, [asked], role, path)
    accepted = PATH_NAMES if role == "path" else LABEL_NAMES
    for wanted in ({_plain(asked)},) if asked is not None else ({role}, accepted):
        found = [name for name in names if _plain(name) in wanted]
        if found:
            return _only(names, found, role, path)
    return None


def find_named(names: Sequence[str], asked: str) -> str | None:
    """Return the field with a name, or the only one that is the same but for case and blanks."""
    if asked in names:
        return asked
    found = [name for name in names if _plain(name) == _plain(asked)]
    return found[0] if len(found) == 1 else None


def _only(names: Sequence[str], found: list[str], role: str, path: Location) -> str:
    if len(found) > 1 or names.count(found[0]) > 1:
        raise SourceError(
            f"{path} has several columns that may be the {role}: {', '.join(found)}. Choose one "
            f"with --{role}-column, and give each column its own name."
        )
    return found[0]


def looks_like_header(cells: Sequence[str]) -> bool:
    """Return whether a first line without a column of paths names columns nevertheless."""
    return (
        len(cells) > 1
        and any(_plain(cell) in LABEL_NAMES for cell in cells)
        and not any("/" in cell or "." in cell for cell in cells)
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())
