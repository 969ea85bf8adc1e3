"""The index of a shard: offset, size, label and key of every sample, for random access.

An index holds where the bytes of every image are in the WebDataset tar, so that any sample is one
read away.
"""

import hashlib
import io
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.format.atomic import atomic_write_bytes
from data_prep.format.kinds import Examples, count_kind
from data_prep.format.manifest import (
    IMAGE_EXTENSIONS,
    READ_EXTENSIONS,
    REMEDY,
    ManifestError,
    ShardEntry,
)
from data_prep.format.pipes import PipedFile
from data_prep.format.samples import SampleReader
from data_prep.format.storage import Location, RemotePath, locate
from data_prep.format.stores import StorageError
from data_prep.format.tars import TarError, Warn, open_seekable

_REFUSALS_NAMED = 20


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The samples of one shard; every array has shape (samples,)."""

    offsets: NDArray[np.int64]
    """First byte of the image in the tar."""
    sizes: NDArray[np.int64]
    """Length of the image in bytes."""
    labels: NDArray[np.int64]
    """Class of the sample, -1 if it has none."""
    keys: NDArray[np.str_]
    """WebDataset key."""
    extensions: NDArray[np.str_]
    """Extension of the image member, one of `READ_EXTENSIONS`."""

    def __len__(self) -> int:
        return len(self.offsets)


def read_index(folder: str | os.PathLike[str] | RemotePath, shard: ShardEntry) -> ShardIndex:
    """Read the index of one shard and check it against the manifest and the length of the tar.

    Raises:
        ManifestError: tar or index is missing or damaged, or they do not match.
    """
    place = locate(folder)
    path = place / shard.index
    tar = shard.location(place)
    if not isinstance(tar, PipedFile):  # the length of an output is known only after reading it
        _check_length(tar, shard)
    try:
        rows = _map_rows(path)
    except FileNotFoundError:
        raise ManifestError(f"index {path} is missing. {REMEDY}") from None
    except StorageError as error:  # nothing is wrong with the index
        raise ManifestError(f"index {error}") from None
    # NumPy raises nearly any type when a header is hostile.
    except Exception as error:
        raise ManifestError(f"index {path} cannot be read ({error}). {REMEDY}") from None
    expected = _row_type(1).names
    if not isinstance(rows, np.ndarray) or rows.ndim != 1 or rows.dtype.names != expected:
        raise ManifestError(f"index {path} is not an index of a shard. {REMEDY}")
    if rows.dtype != _row_type(rows.dtype["key"].itemsize):
        raise ManifestError(f"index {path} has columns of the wrong type. {REMEDY}")
    if len(rows) != shard.samples:
        raise ManifestError(
            f"index {path} has {len(rows)} samples and the manifest says {shard.samples}. {REMEDY}"
        )
    return _unpack(rows, path, shard)


def write_index(path: Location, index: ShardIndex) -> None:
    """Write the index of a shard as one structured NumPy array, atomically."""
    keys = np.char.encode(index.keys, "utf-8")
    rows = np.zeros(len(index), dtype=_row_type(max(1, keys.dtype.itemsize)))
    rows["offset"], rows["size"], rows["label"] = index.offsets, index.sizes, index.labels
    rows["extension"], rows["key"] = np.char.encode(index.extensions, "ascii"), keys
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    atomic_write_bytes(path, buffer.getvalue())


def read_images(
    path: Location | PipedFile, index: ShardIndex, rows: NDArray[np.int64]
) -> Iterator[bytes]:
    """Yield the image files of some samples of a shard.

    Args:
        path: the tar.
        index: index of the shard.
        rows: positions in the index, in any order.

    Raises:
        OSError: the shard cannot be read.
    """
    with open_seekable(path) as file:
        for offset, size in zip(index.offsets[rows], index.sizes[rows], strict=True):
            file.seek(int(offset))
            yield file.read(int(size))


@dataclass(frozen=True, kw_only=True)
class IndexedTar:
    """Result of indexing one tar."""

    index: ShardIndex
    """Its samples."""
    bytes: int
    """Length of the tar in bytes."""
    sha256: str
    """SHA-256 of the tar."""
    without_image: int
    """Number of samples without an image, which the index omits."""
    skipped: Counter[str] = field(default_factory=Counter)
    """What the index omits: kind of a sample without an image, or of a member that belongs to no
    sample → how many."""
    examples: Examples = field(default_factory=Examples)
    """The first members of these kinds."""

    def entry(self, name: str) -> ShardEntry:
        """Return the manifest entry of the tar under that name."""
        return ShardEntry(
            name=name,
            samples=len(self.index),
            bytes=self.bytes,
            sha256=self.sha256,
            index=index_name(name),
        )


@dataclass(kw_only=True)
class Refusals:
    """Samples that must not be used, for one message that names the first of them."""

    count: int = 0
    """Number of all samples."""
    named: list[str] = field(default_factory=list)
    """What is wrong with the first ones."""

    def add(self, problem: str) -> None:
        """Count a sample."""
        self.count += 1
        self.named += [problem][: _REFUSALS_NAMED - len(self.named)]

    def update(self, other: "Refusals") -> None:
        """Count the samples of another tar too."""
        self.count += other.count
        self.named += other.named[: _REFUSALS_NAMED - len(self.named)]

    def error(self) -> TarError:
        """Return the error that names them; there must be at least one."""
        remedy = "without them, or repaired, or write the others anew with `data-prep reshard`"
        if self.count == 1:
            return TarError(f"{self.named[0]}. Write the tar {remedy.replace('them', 'it')}.")
        lines = [f"{self.count:,} samples are refused. Write the tars {remedy}:", *self.named]
        if self.count > len(self.named):
            lines.append(f"and {self.count - len(self.named):,} more")
        return TarError("\n  ".join(lines))


class _Row(NamedTuple):
    offset: int
    size: int
    label: int
    key: str
    extension: str


def index_name(shard_name: str) -> str:
    """Return the file name of a shard's index: `a.index.npy` for `a.tar`, but not for `a.TAR`."""
    return shard_name.removesuffix(".tar") + ".index.npy"


def index_tar(
    path: Path,
    tick: Callable[[int], object],
    *,
    extensions: tuple[str, ...] = IMAGE_EXTENSIONS,
    image_key: str | None = None,
    missing_end: Warn | None = None,
    refusals: Refusals | None = None,
) -> IndexedTar:
    """Read the headers of a WebDataset tar and compute its checksum.

    A sample is a run of members with the same key: the path up to the first dot of the file name.
    Its image is its only member with extension jpg, jpeg, png or webp, or else npy, or else its
    only one with another of the extensions; its label is the integer in `cls`.

    Args:
        path: the tar.
        tick: called with 1 after each sample.
        extensions: extensions of images, in lower case.
        image_key: the one name of images after their key; see `check_image_key`.
        missing_end: see `walk_tar`.
        refusals: takes the samples that must not be used; None: they are an error.

    Raises:
        TarError: the tar is damaged or cut, or the members of a sample are not contiguous; or
            samples have links, devices, sparse files or unsafe paths, two images, an empty image,
            or an invalid label.
    """
    refused = Refusals() if refusals is None else refusals
    rows: list[_Row] = []
    skipped: Counter[str] = Counter()
    without_image = 0
    reader = SampleReader(path, extensions=extensions, image_key=image_key, missing_end=missing_end)
    for sample in reader.samples():
        tick(1)
        if sample.problem:
            refused.add(f"{path}: sample {sample.key!r} is refused: {sample.problem}")
            continue
        if not sample.images:
            for kind, name in sample.others:
                reader.examples.add(count_kind(skipped, kind), name)
            without_image += 1
            continue
        ((name, member),) = sample.images.items()
        extension = name.rpartition(".")[2]
        rows.append(_Row(member.offset_data, member.size, sample.label, sample.key, extension))
    if refusals is None and refused.count:
        raise refused.error()
    columns = list(zip(*rows, strict=True)) or [()] * 5
    index = ShardIndex(
        offsets=np.array(columns[0], dtype=np.int64),
        sizes=np.array(columns[1], dtype=np.int64),
        labels=np.array(columns[2], dtype=np.int64),
        keys=np.array(columns[3], dtype=np.str_),
        extensions=np.array(columns[4], dtype=np.str_),
    )
    return IndexedTar(
        index=index,
        bytes=path.stat().st_size,
        sha256=checksum(path),
        without_image=without_image,
        skipped=skipped + reader.skipped,
        examples=reader.examples,
    )


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _map_rows(path: Location) -> NDArray[Any]:
    """Return the rows of an index as a memory map, so that a forged header allocates nothing."""
    if isinstance(path, Path):
        return np.lib.format.open_memmap(path, mode="r")
    with tempfile.NamedTemporaryFile(suffix=".npy") as copy:
        copy.write(path.read_bytes())
        copy.flush()
        return np.lib.format.open_memmap(copy.name, mode="r")


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
        raise ManifestError(f"index {path} has keys that are not text. {REMEDY}") from None
    index = ShardIndex(
        offsets=np.array(rows["offset"], dtype=np.int64),
        sizes=np.array(rows["size"], dtype=np.int64),
        labels=np.array(rows["label"], dtype=np.int64),
        keys=keys,
        extensions=extensions,
    )
    # Compared by subtraction, since the sum of two hostile numbers may overflow.
    fits = (index.offsets >= 0) & (index.sizes > 0) & (index.sizes <= shard.bytes - index.offsets)
    wrong = np.flatnonzero(~fits | (index.labels < -1) | ~np.isin(extensions, READ_EXTENSIONS))
    if len(wrong):
        raise ManifestError(
            f"index {path} is damaged: sample {wrong[0]} (key {keys[wrong[0]]}) is outside of "
            f"{shard.name}, or has an invalid label or extension. {REMEDY}"
        )
    return index


def _check_length(path: Location, shard: ShardEntry) -> None:
    try:
        length = path.content_length() if isinstance(path, RemotePath) else path.stat().st_size
    except StorageError as error:
        raise ManifestError(str(error)) from None
    except OSError as error:
        raise ManifestError(
            f"shard {path} cannot be read: {error.strerror or 'it is missing'}. "
            "Restore it, or write the shards again."
        ) from None
    if length is not None and length != shard.bytes:  # None is checked when the tar is fetched
        raise ManifestError(
            f"shard {path} has {length:,} bytes and the manifest says {shard.bytes:,}: it was "
            f"truncated or changed. {REMEDY}"
        )
