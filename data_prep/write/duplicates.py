"""Duplicates: files with identical bytes, and near duplicates by perceptual hash.

Identical files are found by an external sort of digests, in bounded memory.
"""

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.executors.processes import Tick, map_tasks
from data_prep.format.atomic import atomic_write_bytes
from data_prep.format.storage import Location
from data_prep.images.decoding import DecodingError, load_picture
from data_prep.sources.external_sort import ExternalSort
from data_prep.sources.files import SourceFile, UnreadableFileError
from data_prep.sources.image_source import open_source
from data_prep.write.listing import DuplicateFilter, WindowedFiles, decode_file, encode_file
from data_prep.write.options import ShardOptions
from data_prep.write.plan import path_key

DIGESTS = "digests-"
"""Prefix of files that keep the digests of some files, for a resumed run."""

BITS = 64
"""Length of a perceptual hash; the distance of two is the number of differing bits."""
_MAX_KEY_BITS = 16
"""Maximum bits of a band used for look-up; more would mean almost as many lists as images."""
_ONES = np.array([number.bit_count() for number in range(2**16)], dtype=np.uint8)
"""Number of bits set in each 16-bit number."""
_FILES_PER_TASK = 2_000


@dataclass(frozen=True, kw_only=True)
class _DigestTask:
    source: Location
    options: ShardOptions
    shards: bool
    folder: Path
    files: tuple[tuple[SourceFile, int], ...]


class _HashedFile(NamedTuple):
    file: SourceFile
    window: int
    perceptual: int | None


def make_duplicate_filter(
    source: Location, options: ShardOptions, folder: Path, *, shards: bool, workers: int
) -> DuplicateFilter:
    """Return a filter that marks duplicates; of each group the smallest path is kept.

    Args:
        source: the source of the files.
        options: selection, and distance of near duplicates.
        folder: folder for sorting, and for digests, which a resumed run reuses.
        shards: whether the source is a folder of shards.
        workers: number of reading processes.

    Raises:
        MissingImageHashError: near duplicates need ImageHash, which is not installed.
    """
    if options.near_duplicates is not None:
        require_hashes()

    def mark(files: WindowedFiles) -> WindowedFiles:
        digests, paths = ExternalSort(folder, "digests"), ExternalSort(folder, "paths")
        tasks = (
            _DigestTask(source=source, options=options, shards=shards, folder=folder, files=group)
            for group in _in_groups(files)
        )
        try:
            for rows in map_tasks(_digest_files, tasks, workers=workers, tick=lambda _: None):
                for key, line in rows:
                    digests.add(key, line)
            marked = _mark_duplicates(digests)
            if options.near_duplicates is not None:
                for row in marked:
                    paths.add(path_key(row.file.path), _encode(row))
                marked = _mark_near_duplicates(paths, options.near_duplicates, folder)
            yield from ((row.file, row.window) for row in marked)
        finally:
            digests.discard()
            paths.discard()

    return mark


def _in_groups(files: WindowedFiles) -> Iterator[tuple[tuple[SourceFile, int], ...]]:
    group: list[tuple[SourceFile, int]] = []
    for file in files:
        group.append(file)
        if len(group) == _FILES_PER_TASK:
            yield tuple(group)
            group = []
    if group:
        yield tuple(group)


def _digest_files(task: _DigestTask, tick: Tick) -> list[tuple[str, str]]:
    rows = []
    hashes = _hash_files(task, tick)
    for (file, window), (digest, perceptual) in zip(task.files, hashes, strict=True):
        row = _HashedFile(file, window, perceptual)
        rows.append((f"{digest}.{path_key(file.path)}", _encode(row)))
    return rows


def _hash_files(task: _DigestTask, tick: Tick) -> list[tuple[str, int | None]]:
    """Return digest and perceptual hash of each file, reusing those of a stopped run."""
    near, most = task.options.near_duplicates is not None, task.options.max_pixels
    lines = [f"{near} {most}", *(encode_file(file) for file, _ in task.files)]
    name = hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
    kept = task.folder / f"{DIGESTS}{name}.json"
    if kept.exists():
        return [(digest, perceptual) for digest, perceptual in json.loads(kept.read_text())]
    found: list[tuple[str, int | None]] = []
    opened = open_source(
        task.source, task.options.selection, shards=task.shards, scratch=task.folder
    )
    with closing(opened) as source:
        for file, _ in task.files:
            digest, perceptual = "-", None  # an unreadable file is not a duplicate
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


def _mark_duplicates(sorter: ExternalSort) -> Iterator[_HashedFile]:
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


def _mark_near_duplicates(
    sorter: ExternalSort, distance: int, folder: Path
) -> Iterator[_HashedFile]:
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


def _encode(row: _HashedFile) -> str:
    return json.dumps([encode_file(row.file), row.window, row.perceptual])


def _decode(line: str) -> _HashedFile:
    text, window, perceptual = json.loads(line)
    return _HashedFile(decode_file(text), window, perceptual)


class MissingImageHashError(ValueError):
    """ImageHash is not installed."""


def require_hashes() -> None:
    """Check that perceptual hashes can be computed.

    Raises:
        MissingImageHashError: ImageHash is not installed.
    """
    try:
        import imagehash  # noqa: F401, PLC0415
    except ImportError:
        raise MissingImageHashError(
            "--near-duplicates needs ImageHash, which is not installed: "
            "pip install 'simmim[dedup]'."
        ) from None


def perceptual_hash(data: bytes, *, max_pixels: int) -> int | None:
    """Return the 64-bit DCT hash of an image, or None if it cannot be decoded or is too large."""
    import imagehash  # noqa: PLC0415

    try:
        loaded = load_picture(data, max_pixels=max_pixels)
    except DecodingError:
        return None  # it is rejected with the reason when it is written
    image = loaded if isinstance(loaded, Image.Image) else _stretch(loaded)
    return int(str(imagehash.phash(image)), 16)


def _stretch(values: NDArray[Any]) -> Image.Image:
    """Return an array (height, width) or (height, width, bands) as grey from black to white."""
    grey = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    grey = grey.mean(axis=2) if grey.ndim == 3 else grey
    grey = (grey - grey.min()) / max(grey.max() - grey.min(), 1e-300)
    return Image.fromarray(np.rint(255 * grey).astype(np.uint8))


class SimilarImages:
    """Index of perceptual hashes that finds the first one within a Hamming distance.

    Hashes are split into one band more than bits may differ, so that two near hashes have at least
    one equal band, and only images with an equal band are compared. Memory per image: 16 bytes and
    4 per band, with over-allocation about 80 at a distance of 6; paths are on disk. A larger
    distance means narrower bands and more comparisons: 1.4% of all pairs at a distance of 6.
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
        """Return the path of the first image within the distance, or None."""
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
        """Add an image."""
        for numbers, key in zip(self._numbers, self._keys(value), strict=True):
            numbers.setdefault(key, array("I")).append(len(self._hashes))
        self._hashes.append(value)
        self._paths.seek(0, os.SEEK_END)
        self._paths.write(path.encode("utf-8", "surrogateescape"))
        self._ends.append(self._paths.tell())

    def close(self) -> None:
        """Remove the file of paths."""
        self._paths.close()

    def _path(self, number: int) -> str:
        start, end = self._ends[number], self._ends[number + 1]
        self._paths.seek(start)
        return self._paths.read(end - start).decode("utf-8", "surrogateescape")

    def _keys(self, value: int) -> list[int]:
        return [value >> start & mask for start, mask in self._bands]
