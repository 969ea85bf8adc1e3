"""Tars that someone else wrote made into a set: indexes and a manifest laid beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep.index import IndexedTar, index_beside
from data_prep.manifest import MANIFEST_NAME, Manifest, ManifestError, write_manifest
from data_prep.workers import Tick, map_tasks


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """What came of indexing a folder of tars."""

    manifest: Manifest
    """The set."""
    without_image: int
    """Samples left out since they hold no image."""
    empty: tuple[str, ...]
    """Names of tars left out since no sample of theirs holds an image."""


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
    if not folder.is_dir():
        raise ManifestError(f"{folder} is not a folder. Give a folder of WebDataset tars.")
    paths = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        raise ManifestError(f"{folder} holds no tars. Give a folder of WebDataset tars.")
    if (folder / MANIFEST_NAME).exists() and not overwrite:
        raise ManifestError(f"{folder} has a {MANIFEST_NAME} already; --overwrite makes it anew.")
    tasks = list(enumerate(paths))
    workers = max(1, min(workers, len(tasks)))
    found = dict(map_tasks(_index_numbered, tasks, workers=workers, tick=tick))
    indexed = {paths[number].name: found[number] for number in range(len(paths))}
    full = {name: tar for name, tar in indexed.items() if len(tar.index)}
    if not full:
        raise ManifestError(
            f"the tars of {folder} hold no images: a WebDataset sample's image is a member "
            "KEY.jpg, KEY.jpeg, KEY.png or KEY.webp."
        )
    manifest = Manifest(
        folder=folder,
        shards=tuple(tar.entry(name) for name, tar in full.items()),
        classes=_number_classes(list(full.values())),
    )
    write_manifest(manifest)
    return Adopted(
        manifest=manifest,
        without_image=sum(tar.without_image for tar in indexed.values()),
        empty=tuple(name for name in indexed if name not in full),
    )


def _index_numbered(task: tuple[int, Path], tick: Tick) -> tuple[int, IndexedTar]:
    number, path = task
    return number, index_beside(path, tick)


def _number_classes(tars: list[IndexedTar]) -> tuple[str, ...]:
    largest = max(int(tar.index.labels.max()) for tar in tars)
    return tuple(str(label) for label in range(largest + 1))
