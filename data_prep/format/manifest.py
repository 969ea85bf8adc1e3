"""The shard format: what a folder of shards holds, written down once and checked on every read.

A folder of shards is a set of WebDataset tars, one index for each, and `manifest.json`, which is
written last: a folder that has one is complete. An index holds, for every sample of its shard,
where the bytes of the image lie in the tar, so that any sample is one read away.
"""

import io
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.format.atomic import atomic_write_bytes
from data_prep.format.pipes import PIPE, PipedFile
from data_prep.format.storage import Location, RemotePath, StorageError, locate

__all__ = [
    "FORMAT",
    "IMAGE_EXTENSIONS",
    "MANIFEST_NAME",
    "VERSION",
    "Location",
    "Manifest",
    "ManifestError",
    "PipedFile",
    "RemotePath",
    "ShardEntry",
    "ShardIndex",
    "StorageError",
    "atomic_write_bytes",
    "locate",
    "read_index",
    "read_manifest",
    "write_index",
    "write_manifest",
]

MANIFEST_NAME = "manifest.json"
FORMAT = "simmim-shards"
VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "npy")
"""Extensions of image members, all that a shard may hold; npy is a NumPy array."""

_SHARD_NAME = re.compile(r"[^/\\\x00.][^/\\\x00]*\.tar")
_INDEX_NAME = re.compile(r"[^/\\\x00.][^/\\\x00]*\.npy")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REMEDY = (
    "Make the shards again with `data-prep shard`, or index them again with `data-prep index`."
)


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


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Where the samples of one shard lie; every array is of shape (samples,)."""

    offsets: NDArray[np.int64]
    """First byte of the image in the tar."""
    sizes: NDArray[np.int64]
    """Length of the image in bytes."""
    labels: NDArray[np.int64]
    """Class of the sample, -1 where it has none."""
    keys: NDArray[np.str_]
    """WebDataset key."""
    extensions: NDArray[np.str_]
    """Extension of the image member, one of `IMAGE_EXTENSIONS`."""

    def __len__(self) -> int:
        return len(self.offsets)


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
        raise ManifestError(f"{path} is not valid JSON ({error}). {_REMEDY}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ManifestError(f"{path} is not a manifest of shards. {_REMEDY}")
    if values.get("version") != VERSION:
        raise ManifestError(
            f"{path} is of version {values.get('version')!r}, and this program reads version "
            f"{VERSION}. {_REMEDY}"
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


def read_index(folder: str | os.PathLike[str] | RemotePath, shard: ShardEntry) -> ShardIndex:
    """Read the index of one shard and check it against the manifest and the tar's length.

    Raises:
        ManifestError: tar or index is missing, damaged, or they do not fit each other.
    """
    place = locate(folder)
    path = place / shard.index
    tar = shard.location(place)
    if not isinstance(tar, PipedFile):  # the length of an output is known when it has been read
        _check_length(tar, shard)
    try:
        rows = _map_rows(path)
    except FileNotFoundError:
        raise ManifestError(f"index {path} is missing. {_REMEDY}") from None
    # NumPy raises nearly any type when a header is hostile.
    except Exception as error:
        raise ManifestError(f"index {path} cannot be read ({error}). {_REMEDY}") from None
    expected = _row_type(1).names
    if not isinstance(rows, np.ndarray) or rows.ndim != 1 or rows.dtype.names != expected:
        raise ManifestError(f"index {path} is not an index of a shard. {_REMEDY}")
    if rows.dtype != _row_type(rows.dtype["key"].itemsize):
        raise ManifestError(f"index {path} has columns of a wrong type. {_REMEDY}")
    if len(rows) != shard.samples:
        raise ManifestError(
            f"index {path} has {len(rows)} samples and the manifest says {shard.samples}. {_REMEDY}"
        )
    return _unpack(rows, path, shard)


def _values_of(shard: ShardEntry) -> dict[str, Any]:
    return {name: value for name, value in vars(shard).items() if name != "place" or value}


def _map_rows(path: Location) -> NDArray[Any]:
    """Return the rows of an index as a memory map: no memory is taken for what is not there."""
    if isinstance(path, Path):
        return np.lib.format.open_memmap(path, mode="r")
    with tempfile.NamedTemporaryFile(suffix=".npy") as copy:
        copy.write(path.read_bytes())
        copy.flush()
        return np.lib.format.open_memmap(copy.name, mode="r")


def write_index(path: Location, index: ShardIndex) -> None:
    """Write the index of a shard as one NumPy array of rows, aside and then renamed."""
    keys = np.char.encode(index.keys, "utf-8")
    rows = np.zeros(len(index), dtype=_row_type(max(1, keys.dtype.itemsize)))
    rows["offset"], rows["size"], rows["label"] = index.offsets, index.sizes, index.labels
    rows["extension"], rows["key"] = np.char.encode(index.extensions, "ascii"), keys
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    atomic_write_bytes(path, buffer.getvalue())


def _row_type(key_bytes: int) -> np.dtype[np.void]:
    return np.dtype(
        [
            ("offset", "<i8"),
            ("size", "<i8"),
            ("label", "<i8"),
            ("extension", "S4"),
            ("key", f"S{key_bytes}"),
        ]
    )


def _unpack(rows: NDArray[np.void], path: Location, shard: ShardEntry) -> ShardIndex:
    try:
        keys = np.char.decode(rows["key"], "utf-8")
        extensions = np.char.decode(rows["extension"], "ascii")
    except UnicodeDecodeError:
        raise ManifestError(f"index {path} has keys that are not text. {_REMEDY}") from None
    index = ShardIndex(
        offsets=np.array(rows["offset"], dtype=np.int64),
        sizes=np.array(rows["size"], dtype=np.int64),
        labels=np.array(rows["label"], dtype=np.int64),
        keys=keys,
        extensions=extensions,
    )
    # Compared by subtraction, since a sum of two hostile numbers may run over.
    fits = (index.offsets >= 0) & (index.sizes > 0) & (index.sizes <= shard.bytes - index.offsets)
    wrong = np.flatnonzero(~fits | (index.labels < -1) | ~np.isin(extensions, IMAGE_EXTENSIONS))
    if len(wrong):
        raise ManifestError(
            f"index {path} is damaged: sample {wrong[0]} (key {keys[wrong[0]]}) lies outside of "
            f"{shard.name}, or has an impossible label or extension. {_REMEDY}"
        )
    return index


def _check_length(path: Location, shard: ShardEntry) -> None:
    try:
        length = path.told_length() if isinstance(path, RemotePath) else path.stat().st_size
    except StorageError as error:
        raise ManifestError(str(error)) from None
    except OSError as error:
        raise ManifestError(
            f"shard {path} cannot be read: {error.strerror or 'it is missing'}. "
            "Bring it back, or make it again."
        ) from None
    if length is not None and length != shard.bytes:  # else it shows when the tar is fetched
        raise ManifestError(
            f"shard {path} has {length:,} bytes and the manifest says {shard.bytes:,}: it was cut "
            f"or changed. {_REMEDY}"
        )


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
        raise ManifestError(f"{path} lists no shards. {_REMEDY}")
    if len({entry.name for entry in entries}) < len(entries):
        raise ManifestError(f"{path} lists a shard twice. {_REMEDY}")
    if not all(isinstance(name, str) for name in classes) or len(set(classes)) < len(classes):
        raise ManifestError(f"{path}: `classes` must be names, each once. {_REMEDY}")
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
            f"{_REMEDY}"
        )
    return manifest


def _parse_notes(values: dict[str, Any], path: Location) -> dict[str, int]:
    notes = _field({"notes": {}} | values, "notes", dict, path)
    return {name: _count(notes, name, 1, path) for name in notes}


def _parse_shard(values: Any, number: int, path: Location, allow_pipe: bool) -> ShardEntry:
    if not isinstance(values, dict):
        raise ManifestError(f"{path}: shard {number} must be a mapping. {_REMEDY}")
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
        raise ManifestError(f"{path}: `{name}` must be a {kind.__name__}, got {value!r}. {_REMEDY}")
    return value


def _count(values: dict[str, Any], name: str, least: int, path: Location) -> int:
    value = _field(values, name, int, path)
    if value < least:
        raise ManifestError(f"{path}: `{name}` must be at least {least}, got {value}. {_REMEDY}")
    return int(value)
