"""The manifest of a set of shards, checked on every read.

A set is a folder of WebDataset tars with one index each (see `data_prep.format.index`) and
`manifest.json`, which is written last: a folder with a manifest is complete.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.format.atomic import atomic_write_bytes
from data_prep.format.pipes import PIPE, PipedFile
from data_prep.format.storage import Location, RemotePath, locate
from data_prep.format.stores import StorageError

MANIFEST_NAME = "manifest.json"
PARTIAL_NAME = ".partial"
"""Subfolder of a set with the work of a run that is not finished."""
LOCK_NAME = "lock"
"""File in it that every run creates."""
UPLOADING_NAME = "uploading.txt"
"""Object next to the shards of a set whose upload is not finished."""
FORMAT = "simmim-shards"
VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "npy")
"""Extensions of the image members a shard may hold; npy is a NumPy array."""
_SUFFIXES = "avif bmp dib gif j2k jfif jp2 jpe jpeg jpg npy pbm pgm png pnm ppm tga tif tiff webp"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
"""Lower-case file name suffixes by which images are found in folders and archives."""
READ_EXTENSIONS = (*IMAGE_EXTENSIONS, *sorted(set(_SUFFIXES.split()) - set(IMAGE_EXTENSIONS)))
"""Extensions of the image members that are read in shards that someone else wrote."""

REMEDY = "Make the shards again with `data-prep shard`, or index them again with `data-prep index`."
"""Remedy in error messages about a damaged manifest or index."""

_SHARD_NAME = re.compile(r"[^/\\\x00.][^/\\\x00]*\.(?i:tar)")
_INDEX_NAME = re.compile(r"[^/\\\x00.][^/\\\x00]*\.npy")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ManifestError(ValueError):
    """A manifest or an index is missing, damaged, or does not match its shard."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard in the manifest."""

    name: str
    """File name of the tar, without folder."""
    samples: int
    """Number of samples, at least 1."""
    bytes: int
    """Length of the tar in bytes."""
    sha256: str
    """SHA-256 of the tar, 64 hexadecimal digits."""
    index: str
    """File name of the index, without folder."""
    place: str = ""
    """Path or URL of a tar outside the folder, as after `data-prep index --output`, or `pipe:` and
    the command that writes it to standard output; empty if the tar is in the folder."""

    def location(self, folder: Location) -> Location | PipedFile:
        """Return the location of the tar, for a set in `folder`."""
        if self.place.startswith(PIPE):
            return PipedFile(self.place.removeprefix(PIPE))
        return locate(self.place) if self.place else folder / self.name


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of a complete set of shards."""

    folder: Location
    """Folder of the shards, their indexes and the manifest, local or at a URL."""
    shards: tuple[ShardEntry, ...]
    """The shards in order, at least 1."""
    classes: tuple[str, ...] = ()
    """Class names, indexed by label; empty if no sample is labelled."""
    rejected: int = 0
    """Number of inputs that were found but rejected; `rejected.jsonl` lists them."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """Note on images → number of samples with it, for example `NaN values`."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Kind of file (see `data_prep.format.kinds`) → number that were met and not taken."""
    examples: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Kind of file that was not taken → the first few paths."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options the shards were written with."""
    fingerprint: str = ""
    """Digest of the paths, sizes and dates of the inputs."""

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def extensions(self) -> tuple[str, ...]:
        """Extensions of the image members that its indexes were made of."""
        found = self._index_options.get("extensions")
        known = isinstance(found, list) and all(name in READ_EXTENSIONS for name in found)
        return tuple(found) if known and found else IMAGE_EXTENSIONS

    @property
    def allows_missing_end(self) -> bool:
        """Whether its tars were indexed with leave to lack their end mark."""
        return self._index_options.get("allow_missing_end") is True

    @property
    def _index_options(self) -> dict[str, Any]:
        options = self.options.get("index")
        return options if isinstance(options, dict) else {}


def read_manifest(
    folder: str | os.PathLike[str] | RemotePath, *, allow_pipe: bool = False
) -> Manifest:
    """Read and check `manifest.json` of a folder of shards.

    Args:
        folder: path or URL.
        allow_pipe: whether shards may be the output of commands in the manifest; otherwise such a
            manifest is refused here, so that later code never meets a command.

    Raises:
        ManifestError: the manifest is missing, damaged, or of another version.
    """
    place = locate(folder)
    path = place / MANIFEST_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestError(describe_unfinished(place) or _describe_absence(place)) from None
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
            f"{path} has version {values.get('version')!r}, but this program reads version "
            f"{VERSION}. {REMEDY}"
        )
    return _parse(values, path, allow_pipe)


def write_manifest(manifest: Manifest) -> None:
    """Write `manifest.json` into the manifest's folder, atomically.

    Raises:
        OSError: the folder cannot be written.
    """
    values = {
        "format": FORMAT,
        "version": VERSION,
        "samples": manifest.samples,
        "rejected": manifest.rejected,
        "notes": dict(manifest.notes),
        **({"skipped": dict(sorted(manifest.skipped.items()))} if manifest.skipped else {}),
        **({"skipped_examples": _sorted_examples(manifest)} if manifest.examples else {}),
        "classes": list(manifest.classes),
        "options": dict(manifest.options),
        "fingerprint": manifest.fingerprint,
        "shards": [_values_of(shard) for shard in manifest.shards],
    }
    text = json.dumps(values, indent=1) + "\n"
    atomic_write_bytes(manifest.folder / MANIFEST_NAME, text.encode())


def _sorted_examples(manifest: Manifest) -> dict[str, list[str]]:
    return {kind: list(paths) for kind, paths in sorted(manifest.examples.items())}


def _values_of(shard: ShardEntry) -> dict[str, Any]:
    return {name: value for name, value in vars(shard).items() if name != "place" or value}


def describe_unfinished(folder: Location) -> str:
    """Return what is wrong with a set that is not finished, and the remedy; empty if it is none."""
    if (folder / MANIFEST_NAME).exists():
        return ""
    is_local = isinstance(folder, Path)
    if not (folder / (f"{PARTIAL_NAME}/{LOCK_NAME}" if is_local else UPLOADING_NAME)).exists():
        return ""
    merge = f"; after --part, run all parts, then: data-prep merge {folder}" if is_local else "."
    return (
        f"the set of shards in {folder} is not finished. Run the same `data-prep shard` (or "
        f"`reshard`) command again, which resumes it{merge}"
    )


def _describe_absence(folder: Location) -> str:
    if not folder.exists() or not folder.is_dir():
        name = folder.name.lower()
        if "{" in name or "*" in name or name.endswith(".tar"):
            return f"{folder} is not a folder of shards. Give the folder: {folder.parent}"
    if not folder.exists():
        return f"folder of shards {folder} does not exist. Write it: data-prep shard SRC {folder}"
    if not folder.is_dir():
        return f"{folder} is not a folder of shards. Write one: data-prep shard {folder} DST"
    if any(folder.glob("*.tar")):
        return f"{folder} has tars but no {MANIFEST_NAME}. Write it: data-prep index {folder}"
    if isinstance(folder, Path) and any(place.is_dir() for place in folder.iterdir()):
        return (
            f"{folder} has subfolders but no {MANIFEST_NAME}. If they are classes of images, write "
            f"shards and use those: data-prep shard {folder} DST"
        )
    return f"{folder} has no {MANIFEST_NAME}. Write shards into it: data-prep shard SRC {folder}"


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
        raise ManifestError(f"{path}: `classes` must be unique names. {REMEDY}")
    manifest = Manifest(
        folder=path.parent,
        shards=entries,
        classes=tuple(classes),
        rejected=_count(values, "rejected", 0, path),
        notes=_parse_counts(values, "notes", path),
        skipped=_parse_counts(values, "skipped", path),
        examples=_parse_examples(values, path),
        options=_field(values, "options", dict, path),
        fingerprint=_field(values, "fingerprint", str, path),
    )
    if _count(values, "samples", 1, path) != manifest.samples:
        raise ManifestError(
            f"{path}: `samples` is {values['samples']}, but the shards have {manifest.samples}. "
            f"{REMEDY}"
        )
    return manifest


def _parse_counts(values: dict[str, Any], field_name: str, path: Location) -> dict[str, int]:
    counts = _field({field_name: {}} | values, field_name, dict, path)
    return {name: _count(counts, name, 1, path) for name in counts}


def _parse_examples(values: dict[str, Any], path: Location) -> dict[str, list[str]]:
    name = "skipped_examples"
    found: dict[str, list[str]] = _field({name: {}} | values, name, dict, path)
    for paths in found.values():
        if not isinstance(paths, list) or not all(isinstance(one, str) for one in paths):
            raise ManifestError(f"{path}: `{name}` must be lists of paths. {REMEDY}")
    return found


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
            raise ManifestError(f"{path}: shard {number} has the invalid value {text!r}. {REMEDY}")
    return entry


def _parse_place(values: dict[str, Any], number: int, path: Location, allow_pipe: bool) -> str:
    """Return the place of a tar outside the manifest's folder, or "" if it is inside.

    Only a local manifest may name such a place: a remote one could make its reader contact hosts
    and open files that are none of its business.
    """
    place = values.get("place", "")
    if not isinstance(place, str) or "\x00" in place:
        raise ManifestError(f"{path}: shard {number} has the invalid place {place!r}. {REMEDY}")
    if not place:
        return ""
    if isinstance(path, RemotePath):
        raise ManifestError(
            f"{path}: shard {number} has the place {place!r}, but a remote manifest may only list "
            "shards in its own folder. Index them: data-prep index PATTERN --output FOLDER"
        )
    if place.startswith(PIPE) and not allow_pipe:
        raise ManifestError(
            f"{path}: shard {number} is the output of a command, {place!r}. Commands run only if "
            "allowed: data.allow_pipe=true in a recipe, or --allow-pipe of data-prep."
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
        raise ManifestError(f"{path}: shard {number} has the invalid place {place!r}. {REMEDY}")
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
