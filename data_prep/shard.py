"""One shard: images read from the source, checked, and written as a WebDataset tar."""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.images import CheckedImage, RejectedImageError, check_image
from data_prep.index import index_name, index_tar
from data_prep.manifest import ShardEntry, write_aside, write_index
from data_prep.plan import ShardOptions, ShardPlan, class_name
from data_prep.sources import Source, SourceFile, UnreadableFileError, open_source
from data_prep.workers import Tick


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """All a worker needs to write one shard."""

    source: Path
    """Folder, zip or tar to read from."""
    folder: Path
    """Folder to write to."""
    plan: ShardPlan
    """What the shard is to hold."""
    labels: dict[str, int]
    """Class name → label."""
    options: ShardOptions
    """How images are checked."""


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """An input that was kept out."""

    path: str
    """Path inside the source."""
    reason: str
    """Why, as a clause."""


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What became of one planned shard."""

    number: int
    """Position of the shard among all planned."""
    entry: ShardEntry | None
    """What was written; None where every image was rejected."""
    rejected: tuple[Rejection, ...]
    """Inputs that were kept out, in order."""
    notes: dict[str, int]
    """What is to be known of the images, and of how many; see `CheckedImage.notes`."""

    @property
    def found(self) -> int:
        """Inputs that the shard was to hold."""
        return (self.entry.samples if self.entry else 0) + len(self.rejected)


def shard_name(number: int) -> str:
    """Return the file name of the shard at a position."""
    return f"shard-{number:06d}.tar"


def report_name(number: int) -> str:
    """Return the file name of the report of a planned shard."""
    return f"shard-{number:06d}.report.json"


def write_shard(task: ShardTask, tick: Tick) -> ShardReport:
    """Write one shard, its index and, when both are complete, its report.

    The tar is a function of the task alone: no date, no user, no order of processes enters it.

    Raises:
        OSError: the folder cannot be written.
    """
    name = shard_name(task.plan.number)
    partial = task.folder / f".{name}.partial-{os.getpid()}"
    try:
        rejected, notes = _write_tar(partial, task, tick)
        entry = None
        if len(rejected) < len(task.plan.files):
            # Read back rather than computed, so that what is promised is what lies on the disk.
            indexed = index_tar(partial, lambda _: None)
            entry = indexed.entry(name)
            write_index(task.folder / index_name(name), indexed.index)
            partial.replace(task.folder / name)
    finally:
        partial.unlink(missing_ok=True)
    report = ShardReport(
        number=task.plan.number, entry=entry, rejected=tuple(rejected), notes=notes
    )
    text = json.dumps(asdict(report))
    write_aside(task.folder / report_name(report.number), text.encode())
    return report


def read_report(folder: Path, number: int) -> ShardReport | None:
    """Return the report of a shard that is finished and still there, else None."""
    try:
        values = json.loads((folder / report_name(number)).read_text())
        entry = ShardEntry(**values["entry"]) if values["entry"] else None
        if entry and (folder / entry.name).stat().st_size != entry.bytes:
            return None
        if entry and not (folder / entry.index).exists():
            return None
    except FileNotFoundError:
        return None
    rejected = tuple(Rejection(**rejection) for rejection in values["rejected"])
    return ShardReport(number=number, entry=entry, rejected=rejected, notes=values["notes"])


def _write_tar(path: Path, task: ShardTask, tick: Tick) -> tuple[list[Rejection], dict[str, int]]:
    # Imported here because it takes a second, which `--help` and `info` need not wait for.
    from webdataset.writer import TarWriter  # noqa: PLC0415

    rejected: list[Rejection] = []
    notes: Counter[str] = Counter()
    with closing(open_source(task.source)) as source, path.open("wb") as stream:
        with TarWriter(stream, user="", group="", mtime=0, encoder=False) as writer:
            for position, file in enumerate(task.plan.files, start=task.plan.first):
                try:
                    image = _read_image(source, file, task.options)
                except (RejectedImageError, UnreadableFileError) as error:
                    rejected.append(Rejection(path=file.path, reason=str(error)))
                else:
                    writer.write(_sample(f"{position:09d}", file, image, task))
                    notes.update(image.notes)
                tick(1)
        stream.flush()
        os.fsync(stream.fileno())
    return rejected, dict(sorted(notes.items()))


def _read_image(source: Source, file: SourceFile, options: ShardOptions) -> CheckedImage:
    data = source.read(file)
    return check_image(
        data,
        max_pixels=options.max_pixels,
        decode=options.check,
        encoding=options.encoding,
    )


def _sample(
    key: str, file: SourceFile, image: CheckedImage, task: ShardTask
) -> dict[str, str | bytes]:
    about: dict[str, object] = {
        "path": file.path,
        "width": image.width,
        "height": image.height,
        "source": task.source.name,
    }
    if image.notes:
        about["notes"] = image.notes
    sample: dict[str, str | bytes] = {"__key__": key, image.extension: image.data}
    sample["json"] = json.dumps(about).encode()
    name = class_name(file.path)
    if name is not None:
        sample["cls"] = str(task.labels[name]).encode()
    return sample
