"""Writing one shard: images are read from the source, checked, and written as a WebDataset tar."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.executors.processes import Tick, map_tasks
from data_prep.executors.ray_cluster import map_on_ray
from data_prep.format.atomic import atomic_write_bytes
from data_prep.format.index import IndexedTar, index_name, write_index
from data_prep.format.manifest import ShardEntry
from data_prep.format.storage import Location
from data_prep.images.checking import CheckedImage, RejectedImageError, check_image
from data_prep.sources.files import SourceFile, UnreadableFileError
from data_prep.sources.image_source import ImageSource, open_source
from data_prep.write.listing import class_name, read_files
from data_prep.write.options import RunOptions, ShardOptions
from data_prep.write.plan import ShardPlan
from data_prep.write.shard_writer import ShardWriter


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
        indexed, rejected, notes = _write_tar(partial, task, tick)
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
    if run.ray:
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
        values = json.loads((folder / report_name(number)).read_text())
    except FileNotFoundError:
        return None
    entry = ShardEntry(**values["entry"]) if values["entry"] else None
    rejected = tuple(Rejection(**rejection) for rejection in values["rejected"])
    return ShardReport(
        number=number,
        entry=entry,
        rejected=rejected,
        notes=values["notes"],
        listing=values["listing"],
    )


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
) -> tuple[IndexedTar, list[Rejection], dict[str, int]]:
    rejected: list[Rejection] = []
    notes: Counter[str] = Counter()
    opened = open_source(task.source, task.options.selection, shards=task.shards)
    files = read_files(task.folder / task.plan.listing, task.plan.start, task.plan.length)
    with closing(opened) as source, closing(ShardWriter(path)) as writer:
        for position, file in enumerate(files, start=task.plan.first):
            key = f"{position:09d}"
            try:
                image = _read_image(source, file, task.options)
            except (RejectedImageError, UnreadableFileError) as error:
                rejected.append(Rejection(path=file.path, reason=str(error), key=key))
            else:
                name = class_name(file)
                label = -1 if name is None else task.labels[name]
                writer.write(key, _members(file, image, label, task), label)
                notes.update(image.notes)
            tick(1)
        return writer.finish(), rejected, dict(sorted(notes.items()))


def _read_image(source: ImageSource, file: SourceFile, options: ShardOptions) -> CheckedImage:
    data = source.read(file)
    return check_image(
        data,
        max_pixels=options.max_pixels,
        decode=options.check,
        encoding=options.encoding,
    )


def _members(
    file: SourceFile, image: CheckedImage, label: int, task: ShardTask
) -> dict[str, bytes]:
    about: dict[str, Any] = json.loads(file.fields) if file.fields else {}
    about |= {
        "path": file.path,
        "width": image.width,
        "height": image.height,
        "source": task.source.name,
    }
    if image.notes:
        about["notes"] = image.notes
    members = {image.extension: image.data, "json": json.dumps(about).encode()}
    if label >= 0:
        members["cls"] = str(label).encode()
    return members
