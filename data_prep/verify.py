"""A set of shards read back and compared with what its manifest promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_prep.images import RejectedImageError, check_image
from data_prep.index import index_tar
from data_prep.manifest import Manifest, ManifestError, ShardEntry, ShardIndex, read_index
from data_prep.storage import Location
from data_prep.tars import TarError
from data_prep.workers import Tick, map_tasks

_MOST_PROBLEMS = 20
_NO_LIMIT = 2**62


@dataclass(frozen=True, kw_only=True)
class _Task:
    folder: Location
    shard: ShardEntry
    classes: int
    decode: bool


def verify_shards(
    manifest: Manifest,
    *,
    decode: bool = True,
    workers: int = 1,
    tick: Tick = lambda _: None,
) -> list[str]:
    """Return every problem of a set: lengths, checksums, indexes, labels, images, stray tars.

    Args:
        manifest: the set.
        decode: whether to decode every image as well.
        workers: processes to use.
        tick: called with the number of samples looked at.

    Raises:
        OSError: a file cannot be read for a reason that is not the set's.
    """
    tasks = (
        _Task(folder=manifest.folder, shard=shard, classes=len(manifest.classes), decode=decode)
        for shard in manifest.shards
    )
    workers = max(1, min(workers, len(manifest.shards)))
    problems = [
        problem
        for found in map_tasks(_verify_shard, tasks, workers=workers, tick=tick)
        for problem in found
    ]
    return sorted(problems) + _find_strays(manifest)


def _find_strays(manifest: Manifest) -> list[str]:
    if "source" not in manifest.options:
        return []  # written by someone else, so that tars without images may lie beside
    named = {shard.name for shard in manifest.shards}
    stray = {path.name for path in manifest.folder.glob("*.tar")} - named
    return [f"{name}: not in the manifest" for name in sorted(stray)]


def _verify_shard(task: _Task, tick: Tick) -> list[str]:
    path = task.shard.location(task.folder)
    try:
        promised = read_index(task.folder, task.shard)
        found = index_tar(path, lambda _: None)
    except (ManifestError, TarError) as error:
        return [f"{task.shard.name}: {error}"]
    if found.sha256 != task.shard.sha256:
        return [f"{task.shard.name}: its SHA-256 is {found.sha256}, not {task.shard.sha256}"]
    if not _equal(promised, found.index):
        return [f"{task.shard.name}: its index {task.shard.index} does not fit it"]
    problems = []
    if promised.labels.max() >= task.classes:
        problems.append(f"{task.shard.name}: labels beyond the {task.classes} classes")
    if task.decode:
        problems += _decode_all(path, promised, tick)
    else:
        tick(len(promised))
    return problems


def _decode_all(path: Location, index: ShardIndex, tick: Tick) -> list[str]:
    problems = []
    with path.open("rb") as file:
        for offset, size, key in zip(index.offsets, index.sizes, index.keys, strict=True):
            file.seek(int(offset))
            try:
                check_image(file.read(int(size)), max_pixels=_NO_LIMIT)
            except RejectedImageError as error:
                problems.append(f"{path.name}: image {key}: {error}")
            tick(1)
    if len(problems) > _MOST_PROBLEMS:
        more = len(problems) - _MOST_PROBLEMS
        problems = [*problems[:_MOST_PROBLEMS], f"{path.name}: and {more:,} more images"]
    return problems


def _equal(one: ShardIndex, other: ShardIndex) -> bool:
    columns: tuple[Callable[[ShardIndex], np.ndarray], ...] = (
        lambda index: index.offsets,
        lambda index: index.sizes,
        lambda index: index.labels,
        lambda index: index.keys,
        lambda index: index.extensions,
    )
    return all(np.array_equal(column(one), column(other)) for column in columns)
