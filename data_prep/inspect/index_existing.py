"""Indexing existing WebDataset tars, written by any tool, so that they can be used as a set."""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.executors.processes import Tick, map_tasks
from data_prep.format.index import index_tar, write_index
from data_prep.format.manifest import (
    MANIFEST_NAME,
    Manifest,
    ManifestError,
    ShardEntry,
    read_manifest,
    write_manifest,
)
from data_prep.format.pipes import PipedFile
from data_prep.format.storage import Location
from data_prep.format.tars import as_local_file

_PARTIAL_NAME = ".partial-index"
_RANGE = re.compile(r"([^{}]*)\{(\d+)\.\.(\d+)\}([^{}]*\.tar)")
_COMMAND_RANGE = re.compile(r"(.*?)\{(\d+)\.\.(\d+)\}(.*)", re.DOTALL)
_MAX_TARS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class IndexingResult:
    """Result of `index_existing`."""

    manifest: Manifest
    """Manifest of the set."""
    without_image: int
    """Number of samples left out because they have no image."""
    empty: tuple[str, ...]
    """Names of tars left out because none of their samples has an image."""


@dataclass(frozen=True, kw_only=True)
class _IndexedShard:
    entry: ShardEntry
    without_image: int
    largest_label: int


@dataclass(frozen=True, kw_only=True)
class _IndexTask:
    path: Location | PipedFile
    partial: Path
    place: str


def index_existing(
    source: Location | PipedFile,
    *,
    output: Path | None = None,
    overwrite: bool = False,
    workers: int = 1,
    tick: Tick = lambda _: None,
) -> IndexingResult:
    """Index tars and write their manifest; the tars are not changed.

    Labels are read from `cls` members, and class names are the labels. Each tar is read completely,
    for its checksum.

    Args:
        source: folder of tars; a range of tars with numbers in braces, as in
            `shard-{000000..000099}.tar`; or a command, optionally with such a range, that writes a
            tar to its standard output.
        output: folder for manifest and indexes; None: the folder of the tars (not for commands).
        overwrite: whether to replace an existing manifest.
        workers: number of processes.
        tick: called with the number of samples indexed.

    Raises:
        ManifestError: there are no tars, no images in them, or there is a manifest already.
        TarError: a tar is damaged or hostile; see `data_prep.format.index.index_tar`.
        StorageError: a store does not answer.
        OSError: the folder cannot be read or written.
    """
    source = source.resolve() if isinstance(source, Path) else source
    paths = _find_tars(source)
    folder = _folder_for(paths[0], output)
    _refuse_replacing(folder, overwrite)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    # Written to a temporary folder, and moved or uploaded when every tar has been read.
    parent = folder if isinstance(folder, Path) else None
    with tempfile.TemporaryDirectory(prefix=_PARTIAL_NAME, dir=parent) as partial:
        tasks = [
            _IndexTask(
                path=path, partial=Path(partial), place=str(path) if output is not None else ""
            )
            for path in paths
        ]
        workers = max(1, min(workers, len(tasks)))
        found = list(map_tasks(_index_aside, tasks, workers=workers, tick=tick))
        found.sort(key=lambda one: one.entry.name)
        _refuse_replacing(folder, overwrite)  # again, since reading all tars may take hours
        manifest = _publish(folder, Path(partial), found)
    return IndexingResult(
        manifest=manifest,
        without_image=sum(one.without_image for one in found),
        empty=tuple(one.entry.name for one in found if not one.entry.samples),
    )


def _publish(folder: Location, partial: Path, found: list[_IndexedShard]) -> Manifest:
    """Move or upload the indexes, then write the manifest."""
    full = [one for one in found if one.entry.samples]
    if not full:
        raise ManifestError(
            f"the tars in {folder} have no images. The image of a WebDataset sample must be a "
            "member KEY.jpg, KEY.jpeg, KEY.png, KEY.webp or KEY.npy."
        )
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    for one in full:
        index = folder / one.entry.index
        if isinstance(index, Path):
            (partial / one.entry.index).replace(index)
        else:
            index.upload(partial / one.entry.index)
    largest = max(one.largest_label for one in full)
    manifest = Manifest(
        folder=folder,
        shards=tuple(one.entry for one in full),
        classes=tuple(str(label) for label in range(largest + 1)),
    )
    write_manifest(manifest)
    return manifest


def _folder_for(tar: Location | PipedFile, output: Path | None) -> Location:
    if output is not None:
        return output.resolve()
    if isinstance(tar, PipedFile):
        raise ManifestError(f"{tar} has no folder. Give one for the manifest with --output.")
    return tar.parent


def _find_tars(source: Location | PipedFile) -> Sequence[Location | PipedFile]:
    if isinstance(source, PipedFile):
        return _expand_command(source)
    pattern = _RANGE.fullmatch(source.name)
    if pattern:
        return _expand(source, pattern)
    if not source.is_dir():
        raise ManifestError(
            f"{source} is not a folder. Give a folder of WebDataset tars, or a range with numbers "
            "in braces: shard-{000000..000099}.tar"
        )
    paths: list[Location] = sorted(
        (path for path in source.glob("*.tar") if not path.name.startswith(".")),
        key=lambda path: path.name,
    )
    if not paths:
        raise ManifestError(f"{source} has no tars. Give a folder of WebDataset tars.")
    return paths


def _expand(source: Location, pattern: re.Match[str]) -> list[Location]:
    """Return the tars of a name with a range of numbers in braces."""
    head, *_, tail = pattern.groups()
    return [source.parent / f"{head}{number}{tail}" for number in _numbers(source, pattern)]


def _expand_command(source: PipedFile) -> list[PipedFile]:
    """Return the commands of one with a range of numbers in braces, or the command itself."""
    pattern = _COMMAND_RANGE.fullmatch(source.command)
    if pattern is None:
        return [source]
    head, *_, tail = pattern.groups()
    commands = [
        replace(source, command=f"{head}{number}{tail}") for number in _numbers(source, pattern)
    ]
    if len({command.name for command in commands}) < len(commands):
        raise ManifestError(f"{source}: the number in braces must be in the name of the tar.")
    return commands


def _numbers(source: Location | PipedFile, pattern: re.Match[str]) -> list[str]:
    _, first, last, _ = pattern.groups()
    if int(last) < int(first) or int(last) - int(first) >= _MAX_TARS:
        raise ManifestError(
            f"{source}: numbers in braces must ascend, over at most {_MAX_TARS:,} tars."
        )
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]


def _refuse_replacing(folder: Location, overwrite: bool) -> None:
    if (folder / MANIFEST_NAME).exists():
        if not overwrite:
            raise ManifestError(f"{folder} has a {MANIFEST_NAME}. Replace it with --overwrite.")
        if _has_source(folder):
            raise ManifestError(
                f"{folder} was written by `data-prep shard`, with indexes and class names. To "
                f"discard those, remove its {MANIFEST_NAME} first."
            )


def _has_source(folder: Location) -> bool:
    try:
        return "source" in read_manifest(folder).options
    except ManifestError:
        return False  # damaged, so there is nothing to keep


def _index_aside(task: _IndexTask, tick: Tick) -> _IndexedShard:
    try:
        with as_local_file(task.path) as path:
            indexed = index_tar(path, tick)
    except FileNotFoundError:
        raise ManifestError(f"{task.path} is missing. Restore it, or index the others.") from None
    entry = replace(indexed.entry(task.path.name), place=task.place)
    if len(indexed.index):
        write_index(task.partial / entry.index, indexed.index)
    return _IndexedShard(
        entry=entry,
        without_image=indexed.without_image,
        largest_label=int(indexed.index.labels.max(initial=-1)),
    )
