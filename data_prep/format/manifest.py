"""The manifest of a set of shards, checked on every read.

A set is a folder of WebDataset tars with one index each (see `data_prep.format.index`) and
`manifest.json`, which is written last: a folder with a manifest is complete.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from data_prep.bounds import Bounds, Count, Matching, Whole
from data_prep.channels import ChannelNameError, ChannelNames, read_names
from data_prep.format.atomic import atomic_write_bytes
from data_prep.format.pipes import PIPE, PipedFile
from data_prep.format.storage import Location, RemotePath, locate
from data_prep.format.stores import StorageError
from data_prep.validation import validate

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

_ShardName = Annotated[str, Matching(r"[^/\\\x00.][^/\\\x00]*\.(?i:tar)", "the file name of a tar")]
_IndexName = Annotated[str, Matching(r"[^/\\\x00.][^/\\\x00]*\.npy", "a file name ending in .npy")]
_Sha256 = Annotated[str, Matching(r"[0-9a-f]{64}", "64 hexadecimal digits")]
_ALWAYS = ("classes", "rejected", "options", "fingerprint")
"""Fields with a default that every manifest has."""


class ManifestError(ValueError):
    """A manifest or an index is missing, damaged, or does not match its shard."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard in the manifest."""

    name: _ShardName
    """File name of the tar, without folder."""
    samples: Count
    """Number of samples."""
    bytes: Count
    """Length of the tar in bytes."""
    sha256: _Sha256
    """SHA-256 of the tar."""
    index: _IndexName
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
    """The shards in order, at least one."""
    classes: tuple[str, ...] = ()
    """Class names, indexed by label; empty if no sample is labelled."""
    channels: ChannelNames | None = None
    """Names of the channels of all images, in stored order; None if they are not known."""
    no_data: Annotated[float, Bounds()] | None = None
    """No-data value of arrays, in addition to NaN; None if there is none."""
    rejected: Whole = 0
    """Number of inputs that were found but rejected; `rejected.jsonl` lists them."""
    notes: Mapping[str, Count] = field(default_factory=dict)
    """Note on images → number of samples with it, for example `NaN values`."""
    skipped: Mapping[str, Count] = field(default_factory=dict)
    """Kind of file (see `data_prep.format.kinds`) → number that were met and not taken."""
    skipped_examples: Mapping[str, Sequence[str]] = field(default_factory=dict)
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
    def image_key(self) -> str | None:
        """The one name of images after their key that its indexes were made of, if any."""
        found = self._index_options.get("image_key")
        return found if isinstance(found, str) else None

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
    try:
        manifest = validate(dict.fromkeys(_ALWAYS) | values | {"folder": place}, Manifest)
    except ValueError as error:
        raise ManifestError(f"{path}: {error}. {REMEDY}") from None
    _check(manifest, values.get("samples"), path, allow_pipe)
    return manifest


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
        **({"skipped_examples": _sorted_examples(manifest)} if manifest.skipped_examples else {}),
        "classes": list(manifest.classes),
        **({} if manifest.channels is None else {"channels": list(manifest.channels)}),
        **({} if manifest.no_data is None else {"no_data": manifest.no_data}),
        "options": dict(manifest.options),
        "fingerprint": manifest.fingerprint,
        "shards": [_values_of(shard) for shard in manifest.shards],
    }
    text = json.dumps(values, indent=1) + "\n"
    atomic_write_bytes(manifest.folder / MANIFEST_NAME, text.encode())


def _sorted_examples(manifest: Manifest) -> dict[str, list[str]]:
    return {kind: list(paths) for kind, paths in sorted(manifest.skipped_examples.items())}


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


def _check(manifest: Manifest, samples: Any, path: Location, allow_pipe: bool) -> None:
    """Check a manifest across its fields, and the places of its shards."""
    shards, classes = manifest.shards, manifest.classes
    if not shards:
        raise ManifestError(f"{path} lists no shards. {REMEDY}")
    if len({shard.name for shard in shards}) < len(shards):
        raise ManifestError(f"{path} lists a shard twice. {REMEDY}")
    if len(set(classes)) < len(classes):
        raise ManifestError(f"{path}: `classes` must be unique names. {REMEDY}")
    if manifest.channels is not None:
        try:
            read_names(manifest.channels)
        except ChannelNameError as error:
            raise ManifestError(f"{path}: `channels`: {error} {REMEDY}") from None
    if samples != manifest.samples:
        raise ManifestError(
            f"{path}: `samples` is {samples!r}, but the shards have {manifest.samples}. {REMEDY}"
        )
    for number, shard in enumerate(shards):
        if shard.place:
            _check_place(shard, number, path, allow_pipe)


def _check_place(shard: ShardEntry, number: int, path: Location, allow_pipe: bool) -> None:
    """Check the place of a tar outside the manifest's folder.

    Only a local manifest may name such a place: a remote one could make its reader contact hosts
    and open files that are none of its business.
    """
    place = shard.place
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
        location = shard.location(path.parent)
        named = location.name == shard.name
    except StorageError as error:
        raise ManifestError(f"{path}: shard {number}: {error}") from None
    inside = isinstance(location, Path) and not location.is_absolute()
    wrong = not isinstance(location, PipedFile) and (inside or ".." in place.split("/"))
    if wrong or not named or "\x00" in place:
        raise ManifestError(f"{path}: shard {number} has the invalid place {place!r}. {REMEDY}")
