"""Lists of labelled video clips: a folder for each class, or a CSV file of paths and labels."""

import csv
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from simmim.data.order.errors import DataError
from simmim.data.order.randomness import shuffled
from simmim.data.order.source import LocalFiles

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
"""File name suffixes of clips, in lower case."""


@dataclass(frozen=True, kw_only=True)
class RawClip:
    """A clip as it lies on disk: nothing of it is read yet."""

    key: str
    """Its path, relative to the folder of the class or of the CSV file."""
    path: Path
    label: int
    shard_name: str
    """Name of its class."""

    @property
    def name(self) -> str:
        """Class and key: what messages call the clip, and what seeds its randomness."""
        return f"{self.shard_name}/{self.key}"


MOST_GAPS = 1000
"""Classes that numbers in a CSV file may ask for where there are fewer clips."""


class ClipSet(LocalFiles):
    """Labelled clips, sorted by class; read as shards are, with a shard for each class.

    So the clips of one class may take each other's place where one is damaged, and the order of
    samples is that of `simmim.data.order.order`.

    Args:
        folder: where they were listed from, for messages.
        classes: names of the classes.
        clips: of every class, in order.
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
        """Clips of each class."""
        return [len(of_class) for of_class in self._clips]

    @property
    def samples(self) -> int:
        """Clips of all classes."""
        return sum(self.sizes)

    @property
    def digest(self) -> str:
        """SHA-256 over the classes and the paths of their clips, not over what these hold."""
        digest = hashlib.sha256()
        for name, of_class in zip(self.classes, self._clips, strict=True):
            for clip in of_class:
                digest.update(f"{name}\t{clip.key}\n".encode())
        return digest.hexdigest()

    def share(self, share: float, *, seed: int) -> "ClipSet":
        """Return this share of each class's clips, at least one of each class that has any.

        Which ones is a pure function of the seed; a larger share contains every smaller one.
        """
        kept = []
        for label, of_class in enumerate(self._clips):
            count = max(1, round(share * len(of_class)))
            places = shuffled(len(of_class), "share", seed, label)[:count]
            kept.append([of_class[place] for place in sorted(places.tolist())])
        return ClipSet(self.folder, self.classes, kept)

    def files(self) -> Iterator[Path]:
        """Yield the files of all clips."""
        for of_class in self._clips:
            yield from (clip.path for clip in of_class)

    def read(self, shard: int, sample: int) -> RawClip:
        """Return a clip of a class."""
        return self._clips[shard][sample]

    def name(self, shard: int, sample: int) -> str:
        """Return class and key of a clip, as messages call it."""
        return self._clips[shard][sample].name


def open_clips(source: str, *, classes: Sequence[str] | None = None) -> ClipSet:
    """List the clips of a folder with a folder for each class, or of a CSV file.

    A CSV file has a path and a label on each line, and may have a header that says `path,label`.
    Paths are relative to its folder. Labels are names, or numbers from 0 if all of them are such.

    Args:
        source: the folder, or the CSV file.
        classes: names that the labels must be among, those of the training clips; None takes the
            names that are found.

    Raises:
        DataError: there is no such folder or file, no clip, a line that cannot be read, or a class
            that is not among `classes`.
    """
    path = Path(source)
    if path.is_dir():
        found = _in_folders(path)
        where = {name: str(path / name) for name in found}
    elif path.is_file():
        found, where = _in_csv(path)
    else:
        raise DataError(
            f"{path} does not exist: give a folder with a folder of clips for each class, or a CSV "
            "file with a path and a label on each line"
        )
    if not any(found.values()):
        expected = "a path and a label on each line"
        if path.is_dir():
            expected = f"files that end in {', '.join(VIDEO_SUFFIXES)}, in a folder for each class"
        raise DataError(f"{path} holds no clips: {expected}")
    names = _class_names(found, path) if classes is None else tuple(classes)
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise DataError(
            f"{where[unknown[0]]} has the class {unknown[0]!r}, which none of the training clips "
            f"has; there are {len(names)} classes: {', '.join(names[:5])}"
            f"{', …' if len(names) > 5 else ''}"
        )
    clips = [
        [
            RawClip(key=key, path=file, label=label, shard_name=name)
            for key, file in sorted(found.get(name, []))
        ]
        for label, name in enumerate(names)
    ]
    return ClipSet(path, names, clips)


Found = dict[str, list[tuple[str, Path]]]
"""Key and path of the clips of each class."""


def _in_folders(folder: Path) -> Found:
    """List the clips in the folders of a folder, at any depth."""
    found: Found = {}
    for place in sorted(folder.iterdir()):
        if place.is_dir() and not place.name.startswith("."):
            found[place.name] = [
                (file.relative_to(place).as_posix(), file)
                for file in place.rglob("*")
                if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file()
            ]
    return {name: clips for name, clips in found.items() if clips}


def _in_csv(file: Path) -> tuple[Found, dict[str, str]]:
    """List the clips that a CSV file names, and the first line that names each class."""
    found: Found = {}
    where: dict[str, str] = {}
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as text:
        for line, row in enumerate(csv.reader(text), start=1):
            cells = [cell.strip() for cell in row]
            if not any(cells) or (line == 1 and cells == ["path", "label"]):
                continue
            if len(cells) != 2 or not all(cells):
                raise DataError(
                    f"{file}, line {line}: {','.join(row)!r} is not a path and a label, with a "
                    "comma between them; a path with commas stands in double quotes"
                )
            key, label = cells
            found.setdefault(label, []).append((key, file.parent / key))
            where.setdefault(label, f"{file}, line {line},")
    return found, where


def _class_names(found: Found, file: Path) -> tuple[str, ...]:
    """Sort the names of classes; numbers leave no gap below the largest."""
    if not all(name.isascii() and name.isdecimal() for name in found):
        return tuple(sorted(found))
    classes, clips = 1 + max(map(int, found)), sum(map(len, found.values()))
    if classes > max(MOST_GAPS, clips):
        raise DataError(
            f"{file} has the label {classes - 1}, so there would be {classes:,} classes for "
            f"{clips:,} clips: labels that are numbers count classes from 0. Where they are not "
            "meant so, put a letter before them"
        )
    return tuple(str(number) for number in range(classes))
