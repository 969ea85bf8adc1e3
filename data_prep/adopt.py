"""Tars that someone else wrote made into a set: indexes and a manifest laid beside them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from data_prep.index import index_name, index_tar
from data_prep.manifest import (
    MANIFEST_NAME,
    Manifest,
    ManifestError,
    ShardEntry,
    read_manifest,
    write_index,
    write_manifest,
)
from data_prep.workers import Tick, map_tasks

_PARTIAL_NAME = ".partial-index"


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """What came of indexing a folder of tars."""

    manifest: Manifest
    """The set."""
    without_image: int
    """Samples left out since they hold no image."""
    empty: tuple[str, ...]
    """Names of tars left out since no sample of theirs holds an image."""


@dataclass(frozen=True, kw_only=True)
class _Found:
    entry: ShardEntry
    without_image: int
    largest_label: int


def adopt_shards(
    folder: Path, *, overwrite: bool = False, workers: int = 1, tick: Tick = lambda _: None
) -> Adopted:
    """Index every tar of a folder and write its manifest; the tars are not changed.

    Labels are taken from `cls` members; their classes are named by their numbers.

    Raises:
        ManifestError: there are no tars, no images in them, or a manifest is there already.
        TarError: a tar is damaged or hostile; see `data_prep.index.index_tar`.
        OSError: the folder cannot be read or written.
    """
    folder = folder.resolve()
    paths = _find_tars(folder, overwrite)
    partial = folder / _PARTIAL_NAME
    partial.mkdir(exist_ok=True)
    try:
        workers = max(1, min(workers, len(paths)))
        found = list(map_tasks(_index_aside, paths, workers=workers, tick=tick))
        found.sort(key=lambda one: one.entry.name)
        full = [one for one in found if one.entry.samples]
        if not full:
            raise ManifestError(
                f"the tars of {folder} hold no images: a WebDataset sample's image is a member "
                "KEY.jpg, KEY.jpeg, KEY.png, KEY.webp or KEY.npy."
            )
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        for one in full:
            (partial / one.entry.index).replace(folder / one.entry.index)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    largest = max(one.largest_label for one in full)
    manifest = Manifest(
        folder=folder,
        shards=tuple(one.entry for one in full),
        classes=tuple(str(label) for label in range(largest + 1)),
    )
    write_manifest(manifest)
    return Adopted(
        manifest=manifest,
        without_image=sum(one.without_image for one in found),
        empty=tuple(one.entry.name for one in found if not one.entry.samples),
    )


def _find_tars(folder: Path, overwrite: bool) -> list[Path]:
    if not folder.is_dir():
        raise ManifestError(f"{folder} is not a folder. Give a folder of WebDataset tars.")
    paths = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        raise ManifestError(f"{folder} holds no tars. Give a folder of WebDataset tars.")
    if (folder / MANIFEST_NAME).exists():
        if not overwrite:
            raise ManifestError(f"{folder} has a {MANIFEST_NAME}; --overwrite makes it anew.")
        if _has_source(folder):
            raise ManifestError(
                f"{folder} was written by `data-prep shard` and has its indexes and class names. "
                f"To lose those, remove its {MANIFEST_NAME} first."
            )
    return paths


def _has_source(folder: Path) -> bool:
    try:
        return "source" in read_manifest(folder).options
    except ManifestError:
        return False  # damaged, so there is nothing in it to keep


def _index_aside(path: Path, tick: Tick) -> _Found:
    indexed = index_tar(path, tick)
    if len(indexed.index):
        write_index(path.parent / _PARTIAL_NAME / index_name(path.name), indexed.index)
    return _Found(
        entry=indexed.entry(path.name),
        without_image=indexed.without_image,
        largest_label=int(indexed.index.labels.max(initial=-1)),
    )
