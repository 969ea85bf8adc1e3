"""Random access into WebDataset tars: where each sample's image lies, and what it is labelled."""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.format.manifest import IMAGE_EXTENSIONS, ShardEntry, ShardIndex
from data_prep.format.tars import TarError, describe_problem, walk_tar

MOST_CLASSES = 1_000_000
"""Largest number of classes that labels may count."""

# What webdataset takes for key and extension, and what it takes for its own metadata.
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_LABEL_BYTES = 32

Tick = Callable[[int], object]
"""Progress callback, called with the number of samples done since the last call."""


@dataclass(frozen=True, kw_only=True)
class IndexedTar:
    """What a pass over one tar found."""

    index: ShardIndex
    """Where its samples lie."""
    bytes: int
    """Length of the tar in bytes."""
    sha256: str
    """SHA-256 of the tar."""
    without_image: int
    """Samples that have no image, and are left out of the index."""

    def entry(self, name: str) -> ShardEntry:
        """Return what the manifest is to say of the tar under that name."""
        return ShardEntry(
            name=name,
            samples=len(self.index),
            bytes=self.bytes,
            sha256=self.sha256,
            index=index_name(name),
        )


class _Row(NamedTuple):
    offset: int
    size: int
    label: int
    key: str
    extension: str


@dataclass
class _Sample:
    key: str
    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    label: int = -1


def index_name(shard_name: str) -> str:
    """Return the name of the index of a shard: `a.tar` has `a.index.npy`."""
    return shard_name.removesuffix(".tar") + ".index.npy"


def index_tar(path: Path, tick: Tick) -> IndexedTar:
    """Read the headers of a WebDataset tar and take its checksum.

    A sample is a run of members with one key: the path up to the first dot of the file name. Its
    image is its one member named jpg, jpeg, png or webp, or npy where it has none of these; its
    label is the integer in `cls`.

    Raises:
        TarError: the tar is damaged, holds links, devices, sparse files or unsafe paths, two images
            in one sample, a sample in two places, or a label that is no class.
    """
    rows: list[_Row] = []
    without_image = 0
    for sample in _samples(path):
        tick(1)
        if len(sample.images) > 1:
            sample.images.pop("npy", None)  # beside a picture it is something else
        if not sample.images:
            without_image += 1
            continue
        if len(sample.images) > 1:
            names = " and ".join(sorted(sample.images))
            raise TarError(f"{path}: sample {sample.key!r} has two images, {names}. Keep one.")
        ((extension, (offset, size)),) = sample.images.items()
        rows.append(_Row(offset, size, sample.label, sample.key, extension))
    columns = list(zip(*rows, strict=True)) or [()] * 5
    index = ShardIndex(
        offsets=np.array(columns[0], dtype=np.int64),
        sizes=np.array(columns[1], dtype=np.int64),
        labels=np.array(columns[2], dtype=np.int64),
        keys=np.array(columns[3], dtype=np.str_),
        extensions=np.array(columns[4], dtype=np.str_),
    )
    length = path.stat().st_size
    return IndexedTar(index=index, bytes=length, sha256=checksum(path), without_image=without_image)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _samples(path: Path) -> Iterator[_Sample]:
    """Yield the samples of a tar, each made of consecutive members."""
    seen: set[str] = set()
    sample: _Sample | None = None
    with path.open("rb") as file:
        for member in walk_tar(path):
            if member.isdir() or _META.match(member.name):
                continue
            problem = describe_problem(member)
            if problem:
                raise TarError(
                    f"{path}: {member.name!r} is refused: {problem}. Write the tar again."
                )
            match = _KEY.fullmatch(member.name)
            if not match:
                continue
            key, extension = match.group(1), match.group(2).lower()
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                _check_key(key, seen, path)
                seen.add(key)
                sample = _Sample(key)
            if extension in IMAGE_EXTENSIONS:
                if extension in sample.images:
                    raise TarError(f"{path}: {member.name!r} is there twice. Keep one.")
                if member.size == 0:
                    raise TarError(f"{path}: {member.name!r} is empty. Leave it out.")
                sample.images[extension] = (member.offset_data, member.size)
            elif extension == "cls":
                file.seek(member.offset_data)
                data = file.read(min(member.size, _LABEL_BYTES + 1))
                sample.label = _parse_label(data, path, member.name)
    if sample is not None:
        yield sample


def _check_key(key: str, seen: set[str], path: Path) -> None:
    if key in seen:
        raise TarError(f"{path}: the members of sample {key!r} are not side by side. Sort them.")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise TarError(f"{path}: the name of sample {key!r} is not UTF-8. Rename it.") from None


def _parse_label(data: bytes, path: Path, name: str) -> int:
    text = data.decode("ascii", "replace").strip()
    if (
        len(data) > _LABEL_BYTES
        or not re.fullmatch("[0-9]{1,9}", text)
        or int(text) >= MOST_CLASSES
    ):
        raise TarError(
            f"{path}: {name!r} must be an integer below {MOST_CLASSES:,}, got {text[:40]!r}."
        )
    return int(text)
