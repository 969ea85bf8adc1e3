"""Verification of a set of shards against its manifest."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.channels import ChannelNames
from data_prep.executors.processes import Tick, map_tasks
from data_prep.format.index import ShardIndex, index_tar, read_images, read_index
from data_prep.format.manifest import IMAGE_EXTENSIONS, Manifest, ManifestError, ShardEntry
from data_prep.format.storage import Location
from data_prep.format.stores import StorageError
from data_prep.format.tars import TarError, as_local_file
from data_prep.images.arrays import MAGIC, is_channels_first, read_header
from data_prep.images.channel_names import check_names, names_in_file
from data_prep.images.checking import RE_ENCODED, RejectedImageError, check_image
from data_prep.images.settings import read_limit

MAX_PROBLEMS = 100
"""Maximum number of problems listed; all are counted."""

OTHER_FORMAT = "of another format than the extension says"
"""Note on a picture that is read by its content, whatever its extension."""
FIRST_AXIS = "channels probably on the first axis: data-prep reshard moves them"
"""Note on an array whose shape is that of channels x height x width."""

_MAX_PER_SHARD = 20


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Result of `verify_shards`."""

    problems: tuple[str, ...]
    """The first problems in the order of shard names, at most `MAX_PROBLEMS`."""
    count: int
    """Number of all problems."""
    notes: Counter[str]
    """Note on decoded images → number of images."""
    remarks: tuple[str, ...] = ()
    """What is unusual and accepted, one line each."""


@dataclass(frozen=True, kw_only=True)
class _VerifyTask:
    folder: Location
    shard: ShardEntry
    classes: int
    decode: bool
    max_pixels: int
    extensions: tuple[str, ...]
    image_key: str | None
    channels: ChannelNames | None
    allow_missing_end: bool


@dataclass(kw_only=True)
class _Problems:
    problems: list[str] = field(default_factory=list)
    count: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)

    def add(self, problems: Iterable[str], most: int) -> None:
        for problem in problems:
            self.problems.append(problem)
            self.count += 1
        if len(self.problems) > 2 * most:
            self.keep_first(most)

    def keep_first(self, most: int) -> None:
        self.problems = sorted(self.problems)[:most]


def verify_shards(
    manifest: Manifest,
    *,
    decode: bool,
    allow_missing_end: bool = False,
    workers: int = 1,
    tick: Tick = lambda _: None,
) -> Verification:
    """Find all problems of a set: lengths, checksums, indexes, labels, images, stray tars.

    Args:
        manifest: manifest of the set.
        decode: whether to decode every image too.
        allow_missing_end: whether tars may lack their end mark; those that were indexed with that
            leave have it anyway.
        workers: number of processes.
        tick: called with the number of samples verified.

    Raises:
        OSError: a file cannot be read for a reason other than the set itself.
    """
    tasks = (
        _VerifyTask(
            folder=manifest.folder,
            shard=shard,
            classes=len(manifest.classes),
            decode=decode,
            max_pixels=read_limit(manifest.options),
            extensions=manifest.extensions,
            image_key=manifest.image_key,
            channels=manifest.channels,
            allow_missing_end=allow_missing_end or manifest.allows_missing_end,
        )
        for shard in manifest.shards
    )
    workers = max(1, min(workers, len(manifest.shards)))
    total = _Problems()
    for found in map_tasks(_verify_shard, tasks, workers=workers, tick=tick):
        total.add(found.problems, MAX_PROBLEMS)
        total.count += found.count - len(found.problems)
        total.notes += found.notes
        total.remarks += found.remarks
    total.add(_find_strays(manifest), MAX_PROBLEMS)
    total.keep_first(MAX_PROBLEMS)
    return Verification(
        problems=tuple(total.problems),
        count=total.count,
        notes=total.notes,
        remarks=tuple(sorted(total.remarks)),
    )


def _find_strays(manifest: Manifest) -> list[str]:
    if "source" not in manifest.options:
        return []  # written by someone else: tars without images may be next to the others
    named = {shard.name for shard in manifest.shards}
    try:
        stray = {path.name for path in manifest.folder.glob("*.tar")} - named
    except (OSError, StorageError):
        if isinstance(manifest.folder, Path):
            raise
        return []  # many web servers and access keys do not allow listing
    return [f"{name}: not in the manifest" for name in sorted(stray)]


def _verify_shard(task: _VerifyTask, tick: Tick) -> _Problems:
    found = _Problems()
    try:
        promised = read_index(task.folder, task.shard)
        with as_local_file(task.shard.location(task.folder)) as path:
            _compare(task, promised, path, found, tick)
    except (ManifestError, TarError, StorageError) as error:
        found.add([f"{task.shard.name}: {error}"], _MAX_PER_SHARD)
    return found


def _compare(
    task: _VerifyTask, promised: ShardIndex, path: Path, found: _Problems, tick: Tick
) -> None:
    name = task.shard.name
    actual = index_tar(
        path,
        (lambda _: None) if task.decode else tick,
        extensions=task.extensions,
        image_key=task.image_key,
        missing_end=found.remarks.append if task.allow_missing_end else None,
    )
    problems = []
    if actual.sha256 != task.shard.sha256:
        problems.append(f"{name}: its SHA-256 is {actual.sha256}, not {task.shard.sha256}")
    if not _equal(promised, actual.index):
        problems.append(f"{name}: its index {task.shard.index} does not match it")
    if promised.labels.max() >= task.classes:
        problems.append(f"{name}: labels beyond the number of classes, {task.classes}")
    found.add(problems, _MAX_PER_SHARD)
    if task.decode:
        # By the tar's own headers, since a wrong index would name the wrong images.
        _decode_all(path, actual.index, task, found, tick)


def _decode_all(
    path: Path, index: ShardIndex, task: _VerifyTask, found: _Problems, tick: Tick
) -> None:
    images = read_images(path, index, np.arange(len(index)))
    for data, key, extension in zip(images, index.keys, index.extensions, strict=True):
        try:
            found.notes.update(_check_stored(data, extension, task.max_pixels, task.channels))
        except RejectedImageError as error:
            found.add([f"{path.name}: image {key}: {error}"], _MAX_PER_SHARD)
        tick(1)
    found.keep_first(_MAX_PER_SHARD)


def _check_stored(
    data: bytes, extension: str, max_pixels: int, channels: ChannelNames | None
) -> list[str]:
    """Check an image as training reads it, where the extension tells arrays from pictures.

    Raises:
        RejectedImageError: training cannot read it.
    """
    is_array = data.startswith(MAGIC)
    if is_array != (extension == "npy"):
        what = "a NumPy array" if is_array else "no NumPy array"
        raise RejectedImageError(f"it is {what}, but its extension is {extension}: rename it")
    checked = check_image(data, max_pixels=max_pixels)
    if channels is not None:
        reason = check_names(
            names_in_file(data, extension), checked.data, checked.extension, channels
        )
        if reason:
            raise RejectedImageError(reason)
    notes = [note for note in checked.notes if note != RE_ENCODED]  # it is not written
    if len(notes) < len(checked.notes) and extension in IMAGE_EXTENSIONS:
        notes.append(OTHER_FORMAT)
    if is_array and is_channels_first(read_header(data).shape):
        notes.append(FIRST_AXIS)
    return notes


def _equal(one: ShardIndex, other: ShardIndex) -> bool:
    columns: tuple[Callable[[ShardIndex], np.ndarray], ...] = (
        lambda index: index.offsets,
        lambda index: index.sizes,
        lambda index: index.labels,
        lambda index: index.keys,
        lambda index: index.extensions,
    )
    return all(np.array_equal(column(one), column(other)) for column in columns)
