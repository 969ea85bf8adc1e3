"""Choosing shards by name: braces as in WebDataset, globs, and the splits that names mention.

A pattern may stand where the path or URL of a folder of tars does: `DIR/train-{000..099}.tar`,
`DIR/{train,extra}-*.tar`, or the path of one tar.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from data_prep.format.kinds import describe_kinds, kind_of
from data_prep.format.manifest import describe_unfinished
from data_prep.format.storage import Location, RemotePath

MAX_NAMES = 1_000_000
"""Largest number of names that a pattern may stand for."""

_GLOB = re.compile(r"[*?\[]")
_TAR = re.compile(r"[^.].*\.tar", re.IGNORECASE | re.DOTALL)
_ARCHIVE = re.compile(r"(\.tar(\.\w+)?|\.tgz|\.tbz2?|\.txz|\.tzst|\.zip)\Z", re.IGNORECASE)
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_NAMED = 5
_NOT_CHOSEN = "tars not chosen"


class PatternError(ValueError):
    """A pattern is malformed, or matches nothing."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """File names to use: those that match a pattern of `include`, and none of `exclude`.

    In a pattern, braces stand for several names, and `*`, `?` and `[…]` are those of a shell.
    """

    include: tuple[str, ...] = ()
    """Patterns of names to use; empty: all."""
    exclude: tuple[str, ...] = ()
    """Patterns of names to leave out."""

    def chosen(self, names: Sequence[str], where: object) -> list[str]:
        """Return the chosen ones of some names, in their order.

        Args:
            names: existing file names.
            where: their place, for messages.

        Raises:
            PatternError: a pattern is malformed or matches none, or none is left.
        """
        included = {name for one in self.include for name in _matching(one, names, where)}
        excluded = {name for one in self.exclude for name in _matching(one, names, where)}
        left = [
            name
            for name in names
            if name not in excluded and (not self.include or name in included)
        ]
        if not left:
            raise PatternError(f"{where}: all {len(names):,} tars are excluded. Exclude fewer.")
        return left


@dataclass(frozen=True, kw_only=True)
class TarListing:
    """The tars of a folder or pattern."""

    tars: list[Location]
    """The tars, sorted by name."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Kind of archive that is in the folder and not read → how many."""


def list_tars(place: Location, names: Names | None = None) -> TarListing:
    """Return the tars of a folder, or those that a pattern stands for.

    Names without a glob are not looked up, since many web servers do not list folders.

    Args:
        place: folder, pattern, or one tar.
        names: names to use of those.

    Raises:
        PatternError: there are none, a pattern is malformed or matches none, or they are shards of
            a set that is not finished.
    """
    skipped: Counter[str] = Counter()
    by_name = is_pattern(place)
    if not (by_name and isinstance(place, RemotePath)):  # few web servers say what is missing
        unfinished = describe_unfinished(place.parent if by_name else place)
        if unfinished:
            raise PatternError(unfinished)
    if by_name:
        found = [tar for one in expand_places(place) for tar in _find(one)]
    else:
        if not place.is_dir():
            raise PatternError(
                f"{place} is not a folder. Give a folder of WebDataset tars, or a pattern: "
                "'DIR/shard-{000000..000099}.tar' or 'DIR/train-*.tar'."
            )
        below: list[Location] = sorted(place.glob("*"), key=lambda path: path.name)
        found = [path for path in below if _TAR.fullmatch(path.name)]
        others = (path.name for path in below if not _TAR.fullmatch(path.name))
        skipped.update(kind_of(name) for name in others if _ARCHIVE.search(name))
        if not found:
            there = f", only {describe_kinds(skipped)}" if skipped else ""
            raise PatternError(
                f"{place} has no tars{there}. Give a folder of uncompressed WebDataset tars"
                f"{_advise_subfolders(place)}."
            )
    if names is not None and (names.include or names.exclude):
        chosen = set(names.chosen([tar.name for tar in found], place))
        skipped.update({_NOT_CHOSEN: sum(tar.name not in chosen for tar in found)})
        found = [tar for tar in found if tar.name in chosen]
    return TarListing(tars=sorted(found, key=lambda tar: tar.name), skipped=+skipped)


def is_pattern(place: Location) -> bool:
    """Return whether a place is a pattern of tars, or one tar, rather than a folder."""
    text, name = str(place), place.name
    if isinstance(place, RemotePath):
        return "{" in text or "*" in name or bool(_TAR.fullmatch(name))
    special = "{" in text or _GLOB.search(name) or _TAR.fullmatch(name)
    return bool(special) and not place.is_dir()


def split_pattern(place: Location) -> tuple[Location, Names]:
    """Return the folder of a pattern, and the names in it.

    Raises:
        PatternError: it is malformed, or the braces stand for several folders.
    """
    places = expand_places(place)
    folders = list(dict.fromkeys(str(one.parent) for one in places))
    if len(folders) > 1:
        raise PatternError(
            f"{place} stands for tars in several folders: {describe_names(folders)}. Index them "
            f"as one set and use that: data-prep index '{place}' --output FOLDER"
        )
    return places[0].parent, Names(include=tuple(one.name for one in places))


def expand_places(place: Location) -> list[Location]:
    """Return the places that a path or URL with braces stands for.

    Raises:
        PatternError: it is malformed.
    """
    if isinstance(place, RemotePath):
        return [RemotePath(url, place.attempts) for url in expand_braces(place.url)]
    return [Path(path) for path in expand_braces(str(place))]


def expand_braces(text: str) -> list[str]:
    """Return the texts that one with braces stands for, as WebDataset expands it.

    Raises:
        PatternError: its braces do not match, or it stands for more than `MAX_NAMES`.
    """
    if "{" not in text and "}" not in text:
        return [text]
    try:
        # Each range would be held in memory, whatever its length.
        ranges = [abs(int(last) - int(first)) for first, last in _RANGE.findall(text)]
        found = list(islice(braceexpand(text), MAX_NAMES + 1)) if sum(ranges) < MAX_NAMES else None
    except (RecursionError, ValueError):  # its UnbalancedBracesError is a ValueError
        raise PatternError(f"the braces in {text!r} do not match. Close each one.") from None
    if found is None or len(found) > MAX_NAMES:
        raise PatternError(f"{text!r} stands for more than {MAX_NAMES:,} names. Use fewer.")
    return list(dict.fromkeys(found))


def describe_names(names: Sequence[str]) -> str:
    """Return the first few of some names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def describe_splits(names: Iterable[str]) -> str:
    """Return the splits that names of tars mention, each with its number; empty if only one."""
    found = Counter(_split_of(name) for name in names)
    if len(found) < 2:
        return ""
    return ", ".join(f"{split or 'others'} ({count:,})" for split, count in sorted(found.items()))


def describe_splits_of_folders(tars: Sequence[Location]) -> str:
    """Return the splits that the folders of tars mention, like `describe_splits`.

    Only the parts in which their paths differ count, and a split in a file name goes before them.
    """
    parents = sorted({str(tar.parent) for tar in tars})
    if len(parents) < 2:
        return ""
    common = len(posixpath.commonprefix([parent.split("/") for parent in parents]))
    names = [
        _split_of(tar.name) or "/".join(reversed(str(tar.parent).split("/")[common:]))
        for tar in tars
    ]
    mentioned = {_split_of(name) for name in names} - {""}
    return describe_splits(names) if len(mentioned) > 1 else ""


def describe_prefixes(names: Sequence[str]) -> str:
    """Return the prefixes of numbered tars, each with its number; empty if there is only one."""
    stems = [name[: -len(".tar")] for name in names]
    found = Counter(stem.rstrip("0123456789") for stem in stems)
    if len(found) < 2 or not any(stem[-1:].isdigit() for stem in stems):
        return ""
    return describe_names([f"{prefix}* ({count:,})" for prefix, count in sorted(found.items())])


def _advise_subfolders(place: Location) -> str:
    """Return what to do about tars in subfolders, or an empty text."""
    if not isinstance(place, Path) or next(place.glob("*/*.tar"), None) is None:
        return ""
    tars = list(place.glob("*/*.tar"))
    below = sorted({path.parent.name for path in tars})
    if describe_splits_of_folders(tars):
        each = " and ".join(f"'{place / name}'" for name in below[:_NAMED])
        return f": its subfolders are of several splits, each a set of its own: {each}"
    some = "{" + ",".join(below[:_NAMED]) + "}" if len(below) > 1 else below[0]
    return f": there are some in subfolders, '{place / some}/*.tar'"


def _find(place: Location) -> list[Location]:
    if isinstance(place, Path) and _GLOB.search(str(place.parent)) and not place.parent.exists():
        raise PatternError(
            f"{place} has a glob in the name of a folder. Globs stand in names of tars; name "
            "several folders in braces: '{a,b}/*.tar'."
        )
    if not _GLOB.search(place.name):
        return [place]
    there: list[Location] = sorted(place.parent.glob("*.[tT][aA][rR]"), key=lambda path: path.name)
    names = [path.name for path in there if _TAR.fullmatch(path.name)]
    chosen = set(_matching(place.name, names, place.parent))
    return [path for path in there if path.name in chosen]


def _matching(pattern: str, names: Sequence[str], where: object) -> list[str]:
    """Return the names that a pattern stands for.

    Raises:
        PatternError: it is malformed, a name in it is missing, or nothing matches.
    """
    expanded = expand_braces(pattern)
    exact = {name for name in expanded if not _GLOB.search(name)}
    globs = [name for name in expanded if _GLOB.search(name)]
    missing = sorted(exact.difference(names))
    found = [
        name for name in names if name in exact or any(fnmatchcase(name, glob) for glob in globs)
    ]
    if missing or not found:
        lacks = describe_names(missing) if missing else f"tars that match {pattern!r}"
        has = f"it has {describe_names(list(names))}" if names else "it has no tars"
        raise PatternError(f"{where} lacks {lacks}: {has}. Give another pattern.")
    return found


def _split_of(name: str) -> str:
    """Return the split that a file name mentions, or an empty text."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), "")
