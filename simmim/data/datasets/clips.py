"""Labelled video clips: one folder per class, or a CSV file of paths and labels."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from simmim.data.datasets.local_files import LocalFiles
from simmim.data.order.randomness import choose_share
from simmim.data.order.source import DataError

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
"""File name suffixes of clips, in lower case."""

ARCHIVES = frozenset({".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"})
"""File name suffixes of archives, in which clips are not read."""


@dataclass(frozen=True, kw_only=True)
class RawClip:
    """A clip file, not yet read."""

    key: str
    """Path relative to the folder of the class or of the CSV file."""
    path: Path
    label: int
    shard_name: str
    """Name of its class."""

    @property
    def name(self) -> str:
        """Class and key: the clip's name in messages, and its random seed."""
        return f"{self.shard_name}/{self.key}"


MOST_GAPS = 1000
"""Maximum number of classes that numeric labels may imply if there are fewer clips than that."""


class ClipSet(LocalFiles[RawClip]):
    """Labelled clips, one shard per class.

    So a damaged clip is replaced by one of the same class.

    Args:
        folder: folder or CSV file of the clips, for messages.
        classes: class names.
        clips: clips of every class, in order.
    """

    def __init__(
        self, folder: Path, classes: Sequence[str], clips: Sequence[Sequence[RawClip]]
    ) -> None:
        assert len(classes) == len(clips)
        self.folder = folder
        self.classes = tuple(classes)
        self._clips = [tuple(of_class) for of_class in clips]

    @property
    def sizes(self) -> list[int]:
        """Number of clips of each class."""
        return [len(of_class) for of_class in self._clips]

    def _digest_parts(self) -> Iterator[bytes]:
        """Yield classes and paths of the clips; their content does not count."""
        for name, of_class in zip(self.classes, self._clips, strict=True):
            for clip in of_class:
                yield f"{name}\t{clip.key}\n".encode()

    def share(self, share: float, *, seed: int) -> "ClipSet":
        """Return a fraction of each class's clips, at least one of each; see `choose_share`."""
        kept = [
            [of_class[index] for index in choose_share(len(of_class), share, seed, label).tolist()]
            for label, of_class in enumerate(self._clips)
        ]
        return ClipSet(self.folder, self.classes, kept)

    def files(self) -> Iterator[Path]:
        """Yield all clip files."""
        for of_class in self._clips:
            yield from (clip.path for clip in of_class)

    def read(self, shard: int, sample: int) -> RawClip:
        """Return a clip of a class."""
        return self._clips[shard][sample]

    def name(self, shard: int, sample: int) -> str:
        """Return class and key of a clip, for messages."""
        return self._clips[shard][sample].name


def open_clips(source: str, *, classes: Sequence[str] | None = None) -> ClipSet:
    """List the clips of a folder with one folder per class, or of a CSV file.

    A CSV file has a path and a label per line, and may start with the header `path,label`.
    Paths are relative to its folder. Labels are names, or numbers from 0 if all are numbers.

    Args:
        source: the folder, or the CSV file.
        classes: allowed labels, the classes of the training clips; None takes the labels found.

    Raises:
        DataError: no such folder or file, no clips, a malformed line, or a class that is not in
            `classes`.
    """
    path = Path(source)
    if path.is_dir():
        found = _in_folders(path)
        where = {name: str(path / name) for name in found}
    elif path.suffix.lower() in ARCHIVES:
        raise DataError(f"{path} is an archive: unpack it and give the folder of its clips.")
    elif path.is_file():
        found, where = _in_csv(path)
    else:
        raise DataError(
            f"{path} does not exist: give a folder with one folder of clips per class, or a CSV "
            "file with a path and a label per line."
        )
    if not any(found.values()):
        expected = "a path and a label per line"
        if path.is_dir():
            expected = f"{', '.join(VIDEO_SUFFIXES)} files in one folder per class"
        raise DataError(f"{path} contains no clips; expected {expected}.")
    names = _class_names(found, path) if classes is None else tuple(classes)
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise DataError(
            f"{where[unknown[0]]} has the class {unknown[0]!r}, which no training clip has; "
            f"choose from {len(names)} classes: {', '.join(names[:5])}"
            f"{', …' if len(names) > 5 else ''}."
        )
    clips = [
        [
            RawClip(key=key, path=file, label=label, shard_name=name)
            for key, file in sorted(found.get(name, []))
        ]
        for label, name in enumerate(names)
    ]
    return ClipSet(path, names, clips)


ClipsByClass = dict[str, list[tuple[str, Path]]]
"""(key, path) of the clips of each class."""


def _in_folders(folder: Path) -> ClipsByClass:
    """List the clips below each subfolder, at any depth."""
    found: ClipsByClass = {}
    for subfolder in sorted(folder.iterdir()):
        if subfolder.is_dir() and not subfolder.name.startswith("."):
            found[subfolder.name] = [
                (file.relative_to(subfolder).as_posix(), file)
                for file in subfolder.rglob("*")
                if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file()
            ]
    return {name: clips for name, clips in found.items() if clips}


def _in_csv(file: Path) -> tuple[ClipsByClass, dict[str, str]]:
    """List the clips in a CSV file, and the first line of each class."""
    found: ClipsByClass = {}
    where: dict[str, str] = {}
    labels: dict[str, tuple[str, int]] = {}
    for line, row in _read_rows(file):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (line == 1 and cells == ["path", "label"]):
            continue
        if len(cells) != 2 or not all(cells):
            raise DataError(
                f"{file}, line {line}: {','.join(row)!r} is not a path and a label separated "
                "by a comma; put a path with commas in double quotes."
            )
        key, label = cells
        before, first = labels.setdefault(key, (label, line))
        if before != label:
            raise DataError(
                f"{file}, line {line}: {key} has the label {label!r}, and {before!r} in line "
                f"{first}. Keep one."
            )
        found.setdefault(label, []).append((key, file.parent / key))
        where.setdefault(label, f"{file}, line {line},")
    return found, where


def _read_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV file with the numbers of their lines.

    Raises:
        DataError: a quote is not closed, which would hide rows, or a label is not UTF-8.
    """
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as text:
        rows = csv.reader(text, strict=True)
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise DataError(f"{file}, line {line}: {error}: close the quote.") from None
            if row is None:
                return
            if rows.line_num > line:
                raise DataError(f"{file}, line {line}: a value has a line break: close the quote.")
            try:
                "".join(row[1:]).encode()
            except UnicodeEncodeError:
                raise DataError(f"{file}, line {line} is not UTF-8: save it as UTF-8.") from None
            yield line, row


def _class_names(found: ClipsByClass, file: Path) -> tuple[str, ...]:
    """Return the sorted class names; numeric labels count from 0 to the largest."""
    if not all(name.isascii() and name.isdecimal() for name in found):
        return tuple(sorted(found))
    classes, clips = 1 + max(map(int, found)), sum(map(len, found.values()))
    if classes > max(MOST_GAPS, clips):
        raise DataError(
            f"{file} has the label {classes - 1}, which means {classes:,} classes for {clips:,} "
            "clips: numeric labels are class indices from 0. If they are names, put a letter "
            "before them."
        )
    return tuple(str(number) for number in range(classes))
