"""Writing one shard: images are read from the source, checked, and written as a WebDataset tar."""

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.executors.processes import Tick, map_tasks
from data_prep.executors.ray_cluster import map_on_ray
from data_prep.format.atomic import atomic_write_bytes, name_in_errors
from data_prep.format.index import IndexedTar, ShardIndex, index_name, write_index
from data_prep.format.manifest import IMAGE_EXTENSIONS, ShardEntry
from data_prep.format.storage import Location
from data_prep.format.text import count_noun
from data_prep.images.arrays import MAGIC, read_header
from data_prep.images.channel_names import NamesInFile, check_names, names_in_file, no_data_in_file
from data_prep.images.checking import CheckedImage, RejectedImageError, check_image
from data_prep.sources.files import SourceFile, UnreadableFileError
from data_prep.sources.image_source import ImageSource, open_source
from data_prep.validation import parse_json
from data_prep.write.classes import class_name
from data_prep.write.listing import read_files
from data_prep.write.options import RunOptions, ShardOptions
from data_prep.write.plan import ShardPlan

PICTURES = "pictures"
"""Kind of all JPEG, PNG and WebP."""
_BITS = "8 or 16 bits"

_BLOCK = 512
"""Block size of a tar; a member is a header block and its data, padded with zeros."""
_ZEROS = bytes(_BLOCK)
_RECORD = 20 * _BLOCK
_BUFFER = 2**20
_MAX_NAME_BYTES = 100
_MAX_MEMBER_BYTES = 8**11 - 1


class ShardWriter:
    """Writes samples into a tar and records the offsets of their images.

    The tar depends on the samples alone, not on date or user.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb", buffering=_BUFFER)
        self._digest = hashlib.sha256()
        self._length = 0
        self._places: list[tuple[int, int, int]] = []
        self._names: list[tuple[str, str]] = []

    def write(self, key: str, members: Mapping[str, bytes], label: int) -> None:
        """Write a sample.

        Args:
            key: key, at most 90 ASCII characters.
            members: extension → data, exactly one of which is an image.
            label: class, -1 if it has none.
        """
        parts: list[bytes] = []
        for extension in sorted(members):
            data = members[extension]
            parts.append(_header(f"{key}.{extension}".encode("ascii"), len(data)))
            self._length += _BLOCK
            if extension in IMAGE_EXTENSIONS:
                self._places.append((self._length, len(data), label))
                self._names.append((key, extension))
            fill = _ZEROS[: -len(data) % _BLOCK]
            parts += (data, fill)
            self._length += len(data) + len(fill)
        self._put(b"".join(parts))  # at once, since each write and digest has its own overhead

    def finish(self) -> IndexedTar:
        """End the tar, sync it to disk, and return its index.

        Raises:
            OSError: the disk is full.
        """
        end = bytes(2 * _BLOCK + -(self._length + 2 * _BLOCK) % _RECORD)
        self._length += len(end)
        self._put(end)
        with name_in_errors(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        places = np.array(self._places, dtype=np.int64).reshape(-1, 3)
        index = ShardIndex(
            offsets=places[:, 0],
            sizes=places[:, 1],
            labels=places[:, 2],
            keys=np.array([key for key, _ in self._names], dtype=np.str_),
            extensions=np.array([extension for _, extension in self._names], dtype=np.str_),
        )
        return IndexedTar(
            index=index,
            bytes=self._length,
            sha256=self._digest.hexdigest(),
            without_image=0,
        )

    def close(self) -> None:
        """Close the file, finished or not."""
        with name_in_errors(self._path):
            self._file.close()

    def _put(self, data: bytes) -> None:
        with name_in_errors(self._path):
            self._file.write(data)
        self._digest.update(data)


def _make_template() -> bytes:
    member = tarfile.TarInfo("")
    member.mode = 0o444
    return member.tobuf(tarfile.USTAR_FORMAT)


_TEMPLATE = _make_template()

# Name, size and checksum are left out of the sum; the checksum's own bytes count as spaces.
_TEMPLATE_SUM = sum(_TEMPLATE[:124]) + sum(_TEMPLATE[136:148]) + 8 * 32 + sum(_TEMPLATE[156:])


def _header(name: bytes, size: int) -> bytes:
    """Return the header of a plain member without a date."""
    assert len(name) <= _MAX_NAME_BYTES, name
    if size > _MAX_MEMBER_BYTES:
        raise ValueError(
            f"{name.decode()} has {size:,} bytes; a tar member has at most 8 GiB. Exclude it."
        )
    length = b"%011o\0" % size
    total = _TEMPLATE_SUM + sum(name) + sum(length)
    return b"".join(
        (
            name.ljust(_MAX_NAME_BYTES, b"\0"),
            _TEMPLATE[100:124],
            length,
            _TEMPLATE[136:148],
            b"%06o\0 " % total,
            _TEMPLATE[156:],
        )
    )


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """Everything a worker needs to write one shard."""

    source: Location
    """The source."""
    shards: bool
    """Whether the source is a folder of shards."""
    folder: Path
    """Folder of the listing and of the shard."""
    plan: ShardPlan
    """The files of the shard."""
    labels: dict[str, int]
    """Class name → label."""
    options: ShardOptions
    """Selection, checks and encoding."""


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A rejected input."""

    path: str
    """Path in the source."""
    reason: str
    """The reason, as a clause."""
    key: str | None = None
    """Key reserved for it; None if it was rejected before keys were assigned."""


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """Result of writing one planned shard."""

    number: int
    """Position of the shard among all planned."""
    entry: ShardEntry | None
    """The shard; None if every image was rejected."""
    rejected: tuple[Rejection, ...]
    """Rejected inputs, in order."""
    notes: dict[str, int]
    """Note (see `CheckedImage.notes`) → number of images."""
    listing: str = ""
    """Digest of its listing; see `ShardPlan.digest`."""
    kinds: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Kind of image, as training tells them apart → number of images and the path of the first."""
    channels: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Channel names given in files, separated by commas, empty for none → the same."""
    no_data: dict[str, tuple[int, str]] = field(default_factory=dict)
    """No-data value, as text → the same."""

    @property
    def found(self) -> int:
        """Number of planned inputs."""
        return (self.entry.samples if self.entry else 0) + len(self.rejected)


def shard_name(number: int) -> str:
    """Return the file name of the shard at a position."""
    return f"shard-{number:06d}.tar"


def report_name(number: int) -> str:
    """Return the file name of the report of a planned shard."""
    return f"shard-{number:06d}.report.json"


def write_shard(task: ShardTask, tick: Tick) -> ShardReport:
    """Write one shard, its index and, when both are complete, its report.

    The tar depends on the task alone: not on date, user or order of processes.

    Raises:
        OSError: the folder cannot be written.
    """
    name = shard_name(task.plan.number)
    partial = task.folder / f".{name}.partial-{os.getpid()}"
    try:
        indexed, rejected, notes, found = _write_tar(partial, task, tick)
        entry = None
        if len(indexed.index):
            entry = indexed.entry(name)
            write_index(task.folder / index_name(name), indexed.index)
            partial.replace(task.folder / name)
    finally:
        partial.unlink(missing_ok=True)
    report = ShardReport(
        number=task.plan.number,
        entry=entry,
        rejected=tuple(rejected),
        notes=notes,
        listing=task.plan.digest,
        kinds=found.kinds.counts,
        channels=found.channels.counts,
        no_data=found.no_data.counts,
    )
    text = json.dumps(asdict(report))
    atomic_write_bytes(task.folder / report_name(report.number), text.encode())
    return report


def map_shards(
    run: RunOptions,
    tasks: Iterator[ShardTask],
    tick: Tick,
    may_start: Callable[[ShardTask], bool] = lambda _: True,
) -> Iterator[ShardReport]:
    """Write shards and yield their reports in order of completion.

    Raises:
        ValueError, OSError, WorkerError: see `map_tasks` and `map_on_ray`.
    """
    if run.executor == "ray":
        return map_on_ray(
            write_shard,
            tasks,
            address=run.address,
            max_in_flight=run.workers,
            tick=tick,
            may_start=may_start,
        )
    return map_tasks(write_shard, tasks, workers=run.workers, tick=tick, may_start=may_start)


def read_report(folder: Path, number: int) -> ShardReport | None:
    """Return the report of a finished shard, or None."""
    try:
        text = (folder / report_name(number)).read_text()
    except FileNotFoundError:
        return None
    return parse_json(text, ShardReport)


def finished_shards(folder: Path) -> list[int]:
    """Return the numbers of all shards that have a report, in order."""
    names = (path.name for path in folder.glob("shard-*.report.json"))
    return sorted(int(name.split("-")[1].split(".")[0]) for name in names)


def shard_exists(folder: Path, entry: ShardEntry) -> bool:
    """Return whether a shard written into a folder is still there."""
    tar, index = folder / entry.name, folder / entry.index
    return tar.exists() and tar.stat().st_size == entry.bytes and index.exists()


def _write_tar(
    path: Path, task: ShardTask, tick: Tick
) -> tuple[IndexedTar, list[Rejection], dict[str, int], "_Found"]:
    rejected: list[Rejection] = []
    notes: Counter[str] = Counter()
    found = _Found()
    opened = open_source(
        task.source, task.options.selection, shards=task.shards, scratch=task.folder
    )
    files = read_files(task.folder / task.plan.listing, task.plan.start, task.plan.length)
    with closing(opened) as source, closing(ShardWriter(path)) as writer:
        for position, file in enumerate(files, start=task.plan.first):
            key = f"{position:09d}"
            try:
                image, told, no_data = _read_image(source, file, task.options)
            except (RejectedImageError, UnreadableFileError) as error:
                rejected.append(Rejection(path=file.path, reason=str(error), key=key))
            else:
                name = class_name(file)
                label = -1 if name is None else task.labels[name]
                image_notes = [*_notes_of(file), *image.notes]
                writer.write(key, _members(file, image, image_notes, label, task), label)
                notes.update(image_notes)
                found.kinds.add(_kind_of(image), file.path)
                found.channels.add("" if told is None else ",".join(told.names), file.path)
                if no_data is not None:
                    found.no_data.add(repr(no_data), file.path)
            tick(1)
        return writer.finish(), rejected, dict(sorted(notes.items())), found


class Counts:
    """Numbers of images by what they are, with the path of the first of each."""

    def __init__(self) -> None:
        self.counts: dict[str, tuple[int, str]] = {}

    def add(self, key: str, path: str, count: int = 1) -> None:
        """Count images."""
        before, example = self.counts.get(key, (0, path))
        self.counts[key] = before + count, example

    def update(self, others: Mapping[str, tuple[int, str]]) -> None:
        """Add the counts of other images."""
        for key, (count, path) in others.items():
            self.add(key, path, count)


@dataclass(frozen=True, kw_only=True)
class _Found:
    kinds: Counts = field(default_factory=Counts)
    channels: Counts = field(default_factory=Counts)
    no_data: Counts = field(default_factory=Counts)


def share_batches(kinds: Collection[str]) -> bool:
    """Return whether training can take images of all these kinds together."""
    arrays = set(kinds) - {PICTURES}
    like_pictures = {_kind_of_arrays(channels, "uint8") for channels in (1, 3, 4)}
    return len(arrays) < 2 and (PICTURES not in kinds or arrays <= like_pictures)


def _kind_of(image: CheckedImage) -> str:
    """Return the kind of an image; pictures are one, since training converts their channels."""
    if image.extension != "npy":
        return PICTURES
    header = read_header(image.data)
    return _kind_of_arrays(header.channels, header.dtype.name)


def _kind_of_arrays(channels: int, dtype: str) -> str:
    values = _BITS if dtype in ("uint8", "uint16") else dtype  # the two may share a batch
    return f"arrays of {count_noun(channels, 'channel')}, {values}"


def _read_image(
    source: ImageSource, file: SourceFile, options: ShardOptions
) -> tuple[CheckedImage, NamesInFile | None, float | None]:
    """Return an image that passed all checks, and the names and no-data value in its file."""
    data = source.read(file)
    image = check_image(
        data,
        max_pixels=options.max_pixels,
        decode=options.check,
        encoding=options.encoding,
        channel_axis=options.channel_axis,
    )
    is_array = image.extension == "npy"
    told = names_in_file(data, "npy" if data.startswith(MAGIC) else "")
    if options.channel_names is not None:
        reason = check_names(told, image.data, image.extension, options.channel_names)
        if reason:
            raise RejectedImageError(reason)
    return image, told, no_data_in_file(data) if is_array else None


def _notes_of(file: SourceFile) -> list[str]:
    return file.notes.split("; ") if file.notes else []


def _members(
    file: SourceFile, image: CheckedImage, notes: Sequence[str], label: int, task: ShardTask
) -> dict[str, bytes]:
    about: dict[str, Any] = json.loads(file.fields) if file.fields else {}
    about |= {
        "path": file.path,
        "width": image.width,
        "height": image.height,
        "source": task.source.name,
    }
    if notes:
        about["notes"] = notes
    members = {image.extension: image.data, "json": json.dumps(about).encode()}
    if label >= 0:
        members["cls"] = str(label).encode()
    return members
