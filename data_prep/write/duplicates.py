"""Files with the same bytes found among any number of files, in bounded memory."""

import hashlib
import io
import json
import os
import tempfile
import warnings
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_prep.executors.processes import Tick, map_tasks
from data_prep.format.atomic import atomic_write_bytes
from data_prep.format.storage import Location
from data_prep.sources.external_sort import ExternalSort
from data_prep.sources.files import SourceFile, UnreadableFileError
from data_prep.sources.source import open_source
from data_prep.write.listing import Listed, decode_file, encode_file
from data_prep.write.plan import ShardOptions, path_key

DIGESTS = "digests-"
"""How the names of files begin that keep what was read of some files, for a run that goes on."""

_FILES_AT_ONCE = 2_000


@dataclass(frozen=True, kw_only=True)
class _DigestTask:
    source: Location
    options: ShardOptions
    shards: bool
    folder: Path
    files: tuple[tuple[SourceFile, int], ...]


class _Row(NamedTuple):
    file: SourceFile
    window: int
    perceptual: int | None


def make_duplicate_filter(
    source: Location, options: ShardOptions, folder: Path, *, shards: bool, workers: int
) -> Callable[[Listed], Listed]:
    """Return a function that names duplicates: of equal files the smallest path is kept.

    Args:
        source: what the files are read from.
        options: how the source is opened, and how near images may be to one another.
        folder: where digests are kept, for a run that goes on after this one, and sorted.
        shards: whether the source is a folder of shards.
        workers: processes that read.

    Raises:
        MissingImageHashError: near duplicates are asked for, and the library for them is missing.
    """
    if options.near_duplicates is not None:
        require_hashes()

    def drop(files: Listed) -> Listed:
        digests, paths = ExternalSort(folder, "digests"), ExternalSort(folder, "paths")
        tasks = (
            _DigestTask(source=source, options=options, shards=shards, folder=folder, files=group)
            for group in _in_groups(files)
        )
        try:
            for rows in map_tasks(_digest_files, tasks, workers=workers, tick=lambda _: None):
                for key, line in rows:
                    digests.add(key, line)
            rows_ = _mark_duplicates(digests)
            if options.near_duplicates is not None:
                for row in rows_:
                    paths.add(path_key(row.file.path), _encode(row))
                rows_ = _mark_near_duplicates(paths, options.near_duplicates, folder)
            yield from ((row.file, row.window) for row in rows_)
        finally:
            digests.discard()
            paths.discard()

    return drop


def _in_groups(files: Listed) -> Iterator[tuple[tuple[SourceFile, int], ...]]:
    group: list[tuple[SourceFile, int]] = []
    for file in files:
        group.append(file)
        if len(group) == _FILES_AT_ONCE:
            yield tuple(group)
            group = []
    if group:
        yield tuple(group)


def _digest_files(task: _DigestTask, tick: Tick) -> list[tuple[str, str]]:
    rows = []
    for (file, window), (digest, perceptual) in zip(
        task.files, _hash_files(task, tick), strict=True
    ):
        row = _Row(file, window, perceptual)
        rows.append((f"{digest}.{path_key(file.path)}", _encode(row)))
    return rows


def _hash_files(task: _DigestTask, tick: Tick) -> list[tuple[str, int | None]]:
    """Return digest and perceptual hash of each file; those that a stopped run took are kept."""
    near, most = task.options.near_duplicates is not None, task.options.max_pixels
    lines = [f"{near} {most}", *(encode_file(file) for file, _ in task.files)]
    name = hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
    kept = task.folder / f"{DIGESTS}{name}.json"
    if kept.exists():
        return [(digest, perceptual) for digest, perceptual in json.loads(kept.read_text())]
    found: list[tuple[str, int | None]] = []
    opened = open_source(task.source, task.options.selection, shards=task.shards)
    with closing(opened) as source:
        for file, _ in task.files:
            digest, perceptual = "-", None  # what cannot be read is no duplicate
            if not file.problem:
                try:
                    data = source.read(file)
                    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
                    perceptual = perceptual_hash(data, max_pixels=most) if near else None
                except UnreadableFileError:
                    pass
            found.append((digest, perceptual))
            tick(1)
    atomic_write_bytes(kept, json.dumps(found).encode())
    return found


def _mark_duplicates(sorter: ExternalSort) -> Iterator[_Row]:
    kept, kept_digest = "", ""
    for key, line in sorter.merged():
        digest = key.partition(".")[0]
        row = _decode(line)
        if digest == "-":
            yield row
        elif digest == kept_digest:
            yield row._replace(file=row.file._replace(problem=f"a duplicate of {kept}"))
        else:
            kept, kept_digest = row.file.path, digest
            yield row


def _mark_near_duplicates(sorter: ExternalSort, distance: int, folder: Path) -> Iterator[_Row]:
    with closing(SimilarImages(distance, folder)) as seen:
        for _, line in sorter.merged():
            row = _decode(line)
            if row.perceptual is not None and not row.file.problem:
                near = seen.find(row.perceptual)
                if near is None:
                    seen.add(row.perceptual, row.file.path)
                else:
                    problem = f"a near duplicate of {near}"
                    row = row._replace(file=row.file._replace(problem=problem))
            yield row


def _encode(row: _Row) -> str:
    return json.dumps([encode_file(row.file), row.window, row.perceptual])


def _decode(line: str) -> _Row:
    text, window, perceptual = json.loads(line)
    return _Row(decode_file(text), window, perceptual)


BITS = 64
"""Length of a hash; the distance of two is the number of bits that differ."""


_MAX_KEY_BITS = 16
"""Bits of a band that images are looked up by: more would be as many lists as images."""


_ONES = np.array([number.bit_count() for number in range(2**16)], dtype=np.uint8)
"""Bits that are set in each number of 16 bits."""


class MissingImageHashError(ValueError):
    """The library of perceptual hashes is not installed."""


def require_hashes() -> None:
    """Check that perceptual hashes can be taken.

    Raises:
        MissingImageHashError: the library is missing.
    """
    try:
        import imagehash  # noqa: F401, PLC0415
    except ImportError:
        raise MissingImageHashError(
            "--near-duplicates needs ImageHash, which is missing: pip install 'simmim[dedup]'"
        ) from None


def perceptual_hash(data: bytes, *, max_pixels: int) -> int | None:
    """Return the DCT hash of an image, None where it does not decode or is too large."""
    import imagehash  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > max_pixels:
                    return None
                return int(str(imagehash.phash(image)), 16)
        # Pillow's readers raise nearly any type when the bytes are hostile.
        except Exception:
            return None  # it is rejected, with the reason, when it is written


class SimilarImages:
    """Hashes seen so far, and the first that is near to another one.

    Hashes are cut into one band more than bits may differ: of two that are near, at least one band
    is equal, so that only images with an equal band are compared. Of each image 16 bytes are held,
    and 4 more for each band, which with room to grow are about 80 at a distance of 6; paths are on
    disk. The wider the distance, the narrower the bands and
    the more is compared: with 6 bits, 1.4% of all pairs.
    """

    def __init__(self, distance: int, folder: Path) -> None:
        self._distance = distance
        bounds = [band * BITS // (distance + 1) for band in range(distance + 2)]
        widths = ((start, min(stop - start, _MAX_KEY_BITS)) for start, stop in pairwise(bounds))
        self._bands = [(start, (1 << width) - 1) for start, width in widths]
        self._numbers: list[dict[int, array[int]]] = [{} for _ in self._bands]
        self._hashes = array("Q")
        self._paths = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        self._ends = array("Q", [0])

    def find(self, value: int) -> str | None:
        """Return the path of the first image that is near, None where there is none."""
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        first = None
        for numbers, key in zip(self._numbers, self._keys(value), strict=True):
            if key in numbers:
                alike = np.frombuffer(numbers[key], dtype=np.uint32)
                differ = (hashes[alike] ^ np.uint64(value)).view(np.uint16).reshape(-1, 4)
                near = alike[_ONES[differ].sum(axis=1) <= self._distance]  # in ascending order
                if len(near) and (first is None or near[0] < first):
                    first = int(near[0])
        return None if first is None else self._path(first)

    def add(self, value: int, path: str) -> None:
        """Remember an image."""
        for numbers, key in zip(self._numbers, self._keys(value), strict=True):
            numbers.setdefault(key, array("I")).append(len(self._hashes))
        self._hashes.append(value)
        self._paths.seek(0, os.SEEK_END)
        self._paths.write(path.encode("utf-8", "surrogateescape"))
        self._ends.append(self._paths.tell())

    def close(self) -> None:
        """Remove what is on disk."""
        self._paths.close()

    def _path(self, number: int) -> str:
        start, end = self._ends[number], self._ends[number + 1]
        self._paths.seek(start)
        return self._paths.read(end - start).decode("utf-8", "surrogateescape")

    def _keys(self, value: int) -> list[int]:
        return [value >> start & mask for start, mask in self._bands]
