"""Classes of a source: labels of its files, else the folders that hold them."""

from dataclasses import dataclass

from data_prep.format.labels import (
    MAX_CLASSES,
    SPLIT_NAMES,
    describe_doubts,
    find_doubtful_classes,
    folder_class,
)
from data_prep.sources.files import Selection, SourceFile
from data_prep.sources.folders import VANISHED
from data_prep.sources.image_source import ImageSource


def class_name(file: SourceFile) -> str | None:
    """Return the class of a file: its label, else the name of its folder, else None."""
    if file.label is not None:
        return file.label or None
    return folder_class(file.path.rpartition("/")[0])


@dataclass(frozen=True, kw_only=True)
class FoundClasses:
    """What a first pass over the names in a source found."""

    names: tuple[str, ...]
    """Class names, indexed by label."""
    files: int = 0
    """Number of selected files; 0 if no pass was needed."""
    vanished: int = 0
    """Number of folders that were removed meanwhile."""
    doubts: str = ""
    """See `Survey.doubts`."""


def find_classes(source: ImageSource, selection: Selection) -> FoundClasses:
    """Return the names of all classes, from file names alone: no file is opened.

    A folder whose files all turn out to be unusable is a class without samples.

    Raises:
        SourceError, TarError: the source is damaged.
    """
    if source.classes is not None:
        return FoundClasses(names=source.classes)
    names, count = ClassNames(), 0
    for file in source.unmeasured_files():
        if not selection.wants(file, explicit=source.is_explicit):
            continue
        count += 1
        if not file.problem:
            names.add(file)
    return FoundClasses(
        names=names.sorted(),
        files=count,
        vanished=source.skipped[VANISHED],
        doubts=names.describe_doubts(),
    )


class ClassNames:
    """Collects the classes of files."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._folders: set[str] = set()
        self._are_labels = True

    def add(self, file: SourceFile) -> None:
        """Add the class of a file."""
        if file.label is None:
            folder = file.path.rpartition("/")[0]
            if folder in self._folders:
                return
            self._folders.add(folder)
        name = class_name(file)
        if name is not None:
            self._names.add(name)
            self._are_labels = self._are_labels and file.label is not None

    def describe_doubts(self) -> str:
        """Return which folders may mean something else; see `find_doubtful_classes`.

        So may one that is called like a split next to classes, as `val` is without folders in it.
        """
        doubts = find_doubtful_classes(self._folders)
        for name in sorted({folder_class(folder) or "" for folder in self._folders}):
            if name.lower() in SPLIT_NAMES and len(self._names) > 1:
                doubts.setdefault(name, f"{name!r} is called like a split of the data")
        return describe_doubts(doubts.values())

    def sorted(self) -> tuple[str, ...]:
        """Return the names, indexed by label."""
        # Numeric labels keep their values.
        if self._are_labels and all(name.isascii() and name.isdecimal() for name in self._names):
            largest = max((int(name[:20]) for name in self._names), default=-1)
            names = tuple(str(number) for number in range(min(largest + 1, MAX_CLASSES)))
            if self._names <= set(names):
                return names
        return tuple(sorted(self._names, key=_number_first if self._are_labels else None))


def _number_first(name: str) -> tuple[bool, int, str]:
    """Return the sort key of a label: integers as numbers, before names."""
    is_number = name.isascii() and name.isdecimal() and len(name) <= 20
    return not is_number, int(name) if is_number else 0, name
