"""The shard format: what a folder of shards holds, written down once and checked on every read.

A folder of shards is a set of WebDataset tars, one index for each, and `manifest.json`, which is
written last: a folder that has one is complete. An index holds, for every sample of its shard,
where the bytes of the image lie in the tar, so that any sample is one read away.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.format.atomic import atomic_write_bytes
from data_prep.format.pipes import PIPE, PipedFile
from data_prep.format.storage import Location, RemotePath, StorageError, locate

MANIFEST_NAME = "manifest.json"
FORMAT = "simmim-shards"
VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "npy")
"""Extensions of image members, all that a shard may hold; npy is a NumPy array."""
_SUFFIXES = "avif bmp dib gif j2k jfif jp2 jpe jpeg jpg npy pbm pgm png pnm ppm tga tif tiff webp"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
"""File name suffixes, in lower case, by which image files are found in folders and archives."""

REMEDY = "Make the shards again with `data-prep shard`, or index them again with `data-prep index`."
"""What a message on a damaged manifest or index advises."""

_SHARD_NAME = re.compile(r"[^/\\\x00.][^/\\\x00]*\.tar")
_INDEX_NAME = re.compile(r"[^/\\\x00.][^/\\\x00]*\.npy")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ManifestError(ValueError):
    """A manifest or an index is missing, damaged or does not fit its shard."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What the manifest says of one shard."""

    name: str
    """File name of the tar, without a folder."""
    samples: int
    """Samples in the shard, at least 1."""
    bytes: int
    """Length of the tar in bytes."""
    sha256: str
    """SHA-256 of the tar, 64 hexadecimal digits."""
    index: str
    """File name of the shard's index, without a folder."""
    place: str = ""
    """Path or URL of the tar where it lies outside of the folder, as `data-prep index --output`
    leaves it, or `pipe:` and the command that writes it out; empty where it lies inside."""

    def location(self, folder: Location) -> Location | PipedFile:
        """Return where the tar is, of a set in `folder`."""
        if self.place.startswith(PIPE):
            return PipedFile(self.place.removeprefix(PIPE))
        return locate(self.place) if self.place else folder / self.name


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A complete set of shards."""

    folder: Location
    """Folder that holds the shards, their indexes and the manifest, here or at a URL."""
    shards: tuple[ShardEntry, ...]
    """The shards in order, at least 1."""
    classes: tuple[str, ...] = ()
    """Class names; a sample's label is a position in them. Empty where nothing is labelled."""
    rejected: int = 0
    """Inputs that were found but kept out, named in `rejected.jsonl`."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """What is to be known of the samples, and of how many of them."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options the shards were made with."""
    fingerprint: str = ""
    """Digest of the inputs' paths, sizes and dates."""

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)


def read_manifest(
    folder: str | os.PathLike[str] | RemotePath, *, allow_pipe: bool = False
) -> Manifest:
    """Read and check `manifest.json` of a folder of shards, given as a path or a URL.

    Args:
        folder: the folder.
        allow_pipe: whether shards may be the output of commands that the manifest names. Without
            it such a manifest is refused, so that no command is ever met further on.

    Raises:
        ManifestError: the folder has no manifest, or it is not one this version can read.
    """
    place = locate(folder)
    path = place / MANIFEST_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestError(_describe_absence(place)) from None
    except StorageError as error:
        raise ManifestError(str(error)) from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is not valid JSON ({error}). {REMEDY}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ManifestError(f"{path} is not a manifest of shards. {REMEDY}")
    if values.get("version") != VERSION:
        raise ManifestError(
            f"{path} is of version {values.get('version')!r}, and this program reads version "
            f"{VERSION}. {REMEDY}"
        )
    return _parse(values, path, allow_pipe)


def write_manifest(manifest: Manifest) -> None:
    """Write `manifest.json` into the manifest's folder, aside and then renamed.

    Raises:
        OSError: the folder cannot be written.
    """
    values = {
        "format": FORMAT,
        "version": VERSION,
        "samples": manifest.samples,
        "rejected": manifest.rejected,
        "notes": dict(manifest.notes),
        "classes": list(manifest.classes),
        "options": dict(manifest.options),
        "fingerprint": manifest.fingerprint,
        "shards": [_values_of(shard) for shard in manifest.shards],
    }
    text = json.dumps(values, indent=1) + "\n"
    atomic_write_bytes(manifest.folder / MANIFEST_NAME, text.encode())


def _values_of(shard: ShardEntry) -> dict[str, Any]:
    return {name: value for name, value in vars(shard).items() if name != "place" or value}


def _describe_absence(folder: Location) -> str:
    if not folder.exists():
        return f"folder of shards {folder} does not exist. Make it: data-prep shard SRC {folder}"
    if not folder.is_dir():
        return f"{folder} is not a folder of shards. Make one: data-prep shard SRC DST"
    if any(folder.glob("*.tar")):
        return f"{folder} has tars but no {MANIFEST_NAME}. Make it: data-prep index {folder}"
    if isinstance(folder, Path) and any(place.is_dir() for place in folder.iterdir()):
        return (
            f"{folder} holds folders and no {MANIFEST_NAME}. If they are classes of images, make "
            f"shards of them, and name those: data-prep shard {folder} DST"
        )
    return f"{folder} has no {MANIFEST_NAME}. Make shards in it: data-prep shard SRC {folder}"


def _parse(values: dict[str, Any], path: Location, allow_pipe: bool) -> Manifest:
    shards = _field(values, "shards", list, path)
    entries = tuple(
        _parse_shard(shard, number, path, allow_pipe) for number, shard in enumerate(shards)
    )
    classes = _field(values, "classes", list, path)
    if not entries:
        raise ManifestError(f"{path} lists no shards. {REMEDY}")
    if len({entry.name for entry in entries}) < len(entries):
        raise ManifestError(f"{path} lists a shard twice. {REMEDY}")
    if not all(isinstance(name, str) for name in classes) or len(set(classes)) < len(classes):
        raise ManifestError(f"{path}: `classes` must be names, each once. {REMEDY}")
    manifest = Manifest(
        folder=path.parent,
        shards=entries,
        classes=tuple(classes),
        rejected=_count(values, "rejected", 0, path),
        notes=_parse_notes(values, path),
        options=_field(values, "options", dict, path),
        fingerprint=_field(values, "fingerprint", str, path),
    )
    if _count(values, "samples", 1, path) != manifest.samples:
        raise ManifestError(
            f"{path} says {values['samples']} samples, and its shards have {manifest.samples}. "
            f"{REMEDY}"
        )
    return manifest


def _parse_notes(values: dict[str, Any], path: Location) -> dict[str, int]:
    notes = _field({"notes": {}} | values, "notes", dict, path)
    return {name: _count(notes, name, 1, path) for name in notes}


def _parse_shard(values: Any, number: int, path: Location, allow_pipe: bool) -> ShardEntry:
    if not isinstance(values, dict):
        raise ManifestError(f"{path}: shard {number} must be a mapping. {REMEDY}")
    entry = ShardEntry(
        name=_field(values, "name", str, path),
        samples=_count(values, "samples", 1, path),
        bytes=_count(values, "bytes", 1, path),
        sha256=_field(values, "sha256", str, path),
        index=_field(values, "index", str, path),
        place=_parse_place(values, number, path, allow_pipe),
    )
    for pattern, text in (
        (_SHARD_NAME, entry.name),
        (_INDEX_NAME, entry.index),
        (_SHA256, entry.sha256),
    ):
        if not pattern.fullmatch(text):
            raise ManifestError(f"{path}: shard {number} has the impossible value {text!r}.")
    return entry


def _parse_place(values: dict[str, Any], number: int, path: Location, allow_pipe: bool) -> str:
    """Return where a tar lies that is not beside the manifest.

    Only a manifest on this machine may name such a place: one that was fetched could make its
    reader ask hosts and open files that are none of its business.
    """
    place = values.get("place", "")
    if not isinstance(place, str) or "\x00" in place:
        raise ManifestError(f"{path}: shard {number} has the impossible place {place!r}.")
    if not place:
        return ""
    if isinstance(path, RemotePath):
        raise ManifestError(
            f"{path}: shard {number} is said to be at {place!r}, and a remote manifest may name "
            "none but its own folder. Index those shards: data-prep index PATTERN --output FOLDER"
        )
    if place.startswith(PIPE) and not allow_pipe:
        raise ManifestError(
            f"{path}: shard {number} is what a command writes, {place!r}, and none is run unless "
            "you say so: data.allow_pipe=true in a recipe, or --allow-pipe of data-prep."
        )
    try:
        location = PipedFile(place[len(PIPE) :]) if place.startswith(PIPE) else locate(place)
        named = location.name == values.get("name")
    except StorageError as error:
        raise ManifestError(f"{path}: shard {number}: {error}") from None
    if isinstance(location, PipedFile) and named:
        return place
    wrong = isinstance(location, Path) and not location.is_absolute()
    if wrong or not named or ".." in place.split("/"):
        raise ManifestError(f"{path}: shard {number} has the impossible place {place!r}.")
    return place


def _field(values: dict[str, Any], name: str, kind: type, path: Location) -> Any:
    value = values.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ManifestError(f"{path}: `{name}` must be a {kind.__name__}, got {value!r}. {REMEDY}")
    return value


def _count(values: dict[str, Any], name: str, least: int, path: Location) -> int:
    value = _field(values, name, int, path)
    if value < least:
        raise ManifestError(f"{path}: `{name}` must be at least {least}, got {value}. {REMEDY}")
    return int(value)
