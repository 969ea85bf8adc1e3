"""Indexing existing WebDataset tars, written by any tool, so that they can be used as a set."""

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_prep.channels import ChannelNames
from data_prep.executors.processes import Tick, map_tasks
from data_prep.format.atomic import remove_leftovers
from data_prep.format.index import Refusals, ShardIndex, index_tar, read_images, write_index
from data_prep.format.kinds import Examples, describe_kinds
from data_prep.format.manifest import (
    MANIFEST_NAME,
    READ_EXTENSIONS,
    Manifest,
    ManifestError,
    ShardEntry,
    read_manifest,
    write_manifest,
)
from data_prep.format.patterns import (
    Names,
    PatternError,
    describe_names,
    describe_prefixes,
    describe_splits,
    describe_splits_of_folders,
    is_pattern,
    list_tars,
)
from data_prep.format.pipes import PipedFile, expand_command
from data_prep.format.storage import Location
from data_prep.format.tars import as_local_file
from data_prep.images.arrays import ArrayError
from data_prep.images.channel_names import check_names, names_in_file, no_data_in_file
from data_prep.images.checking import RejectedImageError
from data_prep.images.settings import MAX_READ_PIXELS
from data_prep.inspect.pixels import stored_form

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class IndexingOptions:
    """What of the tars is indexed."""

    names: Names = field(default_factory=Names)
    """Tars to use of those in the folder."""
    image_key: str | None = None
    """The one name of images after their key; see `data_prep.format.samples.check_image_key`."""
    channels: ChannelNames | None = None
    """Names of the channels in stored order; None: not known."""
    no_data: float | None = None
    """No-data value of arrays; None if there is none."""
    allow_missing_end: bool = False
    """Whether tars may lack their end mark; see `data_prep.format.tars.walk_tar`."""

    def values(self) -> dict[str, Any]:
        """Return them as plain values, for the manifest."""
        values: dict[str, Any] = {"extensions": list(READ_EXTENSIONS)}
        if self.names.include or self.names.exclude:
            values["include"], values["exclude"] = map(
                list, (self.names.include, self.names.exclude)
            )
        if self.image_key is not None:
            values["image_key"] = self.image_key
        if self.allow_missing_end:
            values["allow_missing_end"] = True
        return values


@dataclass(frozen=True, kw_only=True)
class IndexingResult:
    """Result of `index_existing`."""

    manifest: Manifest
    """Manifest of the set."""
    without_image: int
    """Number of samples left out because they have no image."""
    empty: tuple[str, ...]
    """Names of tars left out because none of their samples has an image."""
    remarks: tuple[str, ...]
    """What is unusual and accepted, one line each."""


@dataclass(frozen=True, kw_only=True)
class _IndexedShard:
    entry: ShardEntry
    without_image: int
    skipped: Counter[str]
    largest_label: int
    examples: Examples
    remarks: tuple[str, ...]
    refusals: Refusals
    channels: ChannelNames | None
    no_data: float | None


@dataclass(frozen=True, kw_only=True)
class _IndexTask:
    path: Location | PipedFile
    partial: Path
    place: str
    image_key: str | None
    channels: ChannelNames | None
    allow_missing_end: bool


@dataclass(frozen=True, kw_only=True)
class _Found:
    tars: Sequence[Location | PipedFile]
    skipped: Counter[str] = field(default_factory=Counter)
    remarks: tuple[str, ...] = ()


def index_existing(
    source: Location | PipedFile,
    *,
    output: Path | None = None,
    options: IndexingOptions | None = None,
    overwrite: bool = False,
    workers: int = 1,
    tick: Tick = lambda _: None,
) -> IndexingResult:
    """Index tars and write their manifest; the tars are not changed.

    Labels are read from `cls` members, and class names are the labels. Each tar is read completely,
    for its checksum.

    Args:
        source: folder of tars; a pattern of tars, as in `shard-{000000..000099}.tar` or
            `train-*.tar`; or a command, optionally with a range of numbers in braces, that writes
            a tar to its standard output.
        output: folder for manifest and indexes; None: the folder of the tars (not for commands,
            nor for tars in several folders).
        options: which tars, and how they may end.
        overwrite: whether to replace an existing manifest.
        workers: number of processes.
        tick: called with the number of samples indexed.

    Raises:
        ManifestError: there are no tars, no images in them, several splits, or a manifest already.
        TarError: a tar is damaged or cut, or samples of any tar must not be used; see
            `data_prep.format.index.index_tar`.
        StorageError: a store does not answer.
        OSError: the folder cannot be read or written.
    """
    options = options or IndexingOptions()
    source = source.resolve() if isinstance(source, Path) else source
    listed = _find_tars(source, options.names)
    folder = _folder_for(listed.tars, output)
    _refuse_replacing(folder, overwrite)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    # Written to a temporary folder, and moved or uploaded when every tar has been read.
    parent = folder if isinstance(folder, Path) else None
    prefix = f".index.partial-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as partial:
        tasks = [
            _IndexTask(
                path=path,
                partial=Path(partial),
                place=str(path) if output is not None else "",
                image_key=options.image_key,
                channels=options.channels,
                allow_missing_end=options.allow_missing_end,
            )
            for path in listed.tars
        ]
        workers = max(1, min(workers, len(tasks)))
        found = list(map_tasks(_index_aside, tasks, workers=workers, tick=tick))
        found.sort(key=lambda one: one.entry.name)
        refusals = Refusals()
        for one in found:
            refusals.update(one.refusals)
        if refusals.count:
            raise refusals.error()
        _refuse_replacing(folder, overwrite)  # again, since reading all tars may take hours
        skipped = sum((one.skipped for one in found), listed.skipped)
        manifest = _publish(folder, Path(partial), found, skipped, options)
    return IndexingResult(
        manifest=manifest,
        without_image=sum(one.without_image for one in found),
        empty=tuple(one.entry.name for one in found if not one.entry.samples),
        remarks=(*listed.remarks, *(remark for one in found for remark in one.remarks)),
    )


def _publish(
    folder: Location,
    partial: Path,
    found: list[_IndexedShard],
    skipped: Counter[str],
    options: IndexingOptions,
) -> Manifest:
    """Move or upload the indexes, then write the manifest."""
    full = [one for one in found if one.entry.samples]
    if not full:
        others = f", only {describe_kinds(skipped)}" if skipped else ""
        if options.image_key is not None:
            raise ManifestError(
                f"the tars in {folder} have no member KEY.{options.image_key}{others}. Give "
                "another --image-key."
            )
        raise ManifestError(
            f"the tars in {folder} have no images{others}. The image of a WebDataset sample must "
            f"be a member KEY.EXT, where EXT is one of {', '.join(READ_EXTENSIONS)}, and the only "
            "dot in its file name is that before EXT; name others by --image-key, as image.png of "
            "KEY.image.png."
        )
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    for one in full:
        index = folder / one.entry.index
        if isinstance(index, Path):
            (partial / one.entry.index).replace(index)
        else:
            index.upload(partial / one.entry.index)
    examples = Examples()
    for one in found:
        examples.update(one.examples)
    largest = max(one.largest_label for one in full)
    manifest = Manifest(
        folder=folder,
        shards=tuple(one.entry for one in full),
        classes=tuple(str(label) for label in range(largest + 1)),
        channels=_shared("channels", [one.channels for one in full]),
        no_data=options.no_data
        if options.no_data is not None
        else _shared("no_data", [one.no_data for one in full]),
        skipped=skipped,
        skipped_examples=examples.paths,
        options={"index": options.values()},
    )
    write_manifest(manifest)
    return manifest


def _folder_for(tars: Sequence[Location | PipedFile], output: Path | None) -> Location:
    if output is not None:
        return output.resolve()
    first = tars[0]
    if isinstance(first, PipedFile):
        raise ManifestError(f"{first} has no folder. Give one for the manifest with --output.")
    if len({str(tar.parent) for tar in tars if not isinstance(tar, PipedFile)}) > 1:
        raise ManifestError(
            "the tars are in several folders. Give one for the manifest with --output."
        )
    return first.parent


def _find_tars(source: Location | PipedFile, names: Names) -> _Found:
    try:
        if isinstance(source, PipedFile):
            return _Found(tars=_choose_commands(expand_command(source), names))
        listed = list_tars(source, names)
    except PatternError as error:
        raise ManifestError(str(error)) from None
    found = [tar.name for tar in listed.tars]
    repeated = sorted(name for name, count in Counter(found).items() if count > 1)
    if repeated:
        raise ManifestError(
            f"{source}: several tars are called {describe_names(repeated)}. Names must be unique "
            "in a set: index the folders one by one."
        )
    splits = describe_splits(found)
    if splits and not names.include and not is_pattern(source):
        raise ManifestError(
            f"the tars in {source} are of several splits: {splits}. Index one of them, as in "
            f"--include 'train-*.tar' (with --output FOLDER for each, to have several), or all "
            "with --include '*' and choose in training with data.include."
        )
    splits = describe_splits_of_folders(listed.tars)
    if splits and not names.include:
        folders = sorted({str(tar.parent) for tar in listed.tars})
        commands = " and ".join(f"data-prep index {folder!r}" for folder in folders[:3])
        raise ManifestError(
            f"the tars of {source} are of several splits, by their folders: {splits}. Index each "
            f"as a set of its own: {commands} (with --output FOLDER for each, "
            "if need be), or all as one with --include '*'."
        )
    prefixes = describe_prefixes(found)
    remarks = (f"names with several beginnings, all in one set: {prefixes}",) if prefixes else ()
    return _Found(tars=listed.tars, skipped=listed.skipped, remarks=remarks)


def _choose_commands(commands: list[PipedFile], names: Names) -> list[PipedFile]:
    if not names.include and not names.exclude:
        return commands
    chosen = set(names.chosen([command.name for command in commands], "the commands"))
    return [command for command in commands if command.name in chosen]


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
    remarks: list[str] = []
    refusals = Refusals()
    try:
        with as_local_file(task.path) as path:

            def remark(text: str) -> None:
                remarks.append(text.replace(str(path), str(task.path)))

            indexed = index_tar(
                path,
                tick,
                extensions=READ_EXTENSIONS,
                image_key=task.image_key,
                missing_end=remark if task.allow_missing_end else None,
                refusals=refusals,
            )
            refusals.named = [text.replace(str(path), str(task.path)) for text in refusals.named]
            told = _first_told(task, path, indexed.index)
    except FileNotFoundError:
        raise ManifestError(f"{task.path} is missing. Restore it, or index the others.") from None
    entry = replace(indexed.entry(task.path.name), place=task.place)
    examples = Examples()
    for kind, names in indexed.examples.paths.items():
        for name in names:
            examples.add(kind, f"{task.path.name}/{name}")
    channels, no_data = None, None
    if len(indexed.index):
        write_index(task.partial / entry.index, indexed.index)
        channels, no_data = told
    return _IndexedShard(
        entry=entry,
        without_image=indexed.without_image,
        skipped=indexed.skipped,
        examples=examples,
        largest_label=int(indexed.index.labels.max(initial=-1)),
        remarks=tuple(remarks),
        refusals=refusals,
        channels=channels,
        no_data=no_data,
    )


def _first_told(
    task: _IndexTask, path: Path, index: ShardIndex
) -> tuple[ChannelNames | None, float | None]:
    """Return the names of the channels and the no-data value of a tar, by its first image.

    Raises:
        ManifestError: the names that are given do not fit it.
    """
    if not len(index):
        return None, None
    data = next(iter(read_images(path, index, np.arange(1))))
    extension = str(index.extensions[0])
    told = names_in_file(data, extension)
    if task.channels is not None:
        try:
            stored = stored_form(data, extension, max_pixels=MAX_READ_PIXELS)
            reason = check_names(told, *stored, task.channels)
        except (ArrayError, RejectedImageError):
            reason = ""  # `verify --deep` reports it
        if reason:
            raise ManifestError(f"{task.path}: image {index.keys[0]}: {reason}.")
        return task.channels, no_data_in_file(data)
    return told.names if told is not None and told.described else None, no_data_in_file(data)


def _shared(name: str, found: Sequence[T | None]) -> T | None:
    """Return what all tars have in common.

    Raises:
        ManifestError: they differ.
    """
    known = list(dict.fromkeys(found))
    if len(known) > 1:
        listed = ", ".join(map(str, known))
        raise ManifestError(
            f"the first images of the tars have different {name}: {listed}. Index the tars of each "
            "kind as a set of its own (--include, --output)."
        )
    return known[0]
