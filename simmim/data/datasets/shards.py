"""Random access to the samples of shards, through the indexes written by `data-prep`."""

import io
import tarfile
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.channels import ChannelNames, read_names
from data_prep.format.index import read_index
from data_prep.format.manifest import (
    MANIFEST_NAME,
    Manifest,
    ManifestError,
    ShardEntry,
    describe_unfinished,
    read_manifest,
)
from data_prep.format.patterns import Names, PatternError, is_pattern, split_pattern
from data_prep.format.pipes import PipedFile
from data_prep.format.storage import ByteReader, Location, RemotePath, locate
from simmim.data.datasets.image_set import ImageSet, ShardUnavailableError, read_patiently
from simmim.data.datasets.remote import RemoteReading, RemoteShard, ShardCache
from simmim.data.order.source import DataError

OPEN_SHARDS = 320
"""Maximum number of shards a process keeps open: those that a rank's slots read while shuffling a
block."""


@dataclass(frozen=True)
class RawSample:
    """An encoded sample of a shard."""

    key: str
    image: bytes
    label: int | None
    shard_name: str
    extension: str
    read_about: Callable[[], bytes | None] = field(default=lambda: None, compare=False, repr=False)
    """Reads the JSON member."""
    channels: ChannelNames | None = None
    """Names of its channels; None if the manifest has none."""
    no_data: float | None = None
    """No-data value of arrays; None if the manifest has none."""

    @property
    def about(self) -> bytes | None:
        """The JSON member; None if there is none."""
        return self.read_about()

    @property
    def name(self) -> str:
        """Shard and key: the name in messages, and the random seed."""
        return f"{self.shard_name}/{self.key}"


class LocalShard:
    """The bytes of one local shard. Reads do not move the file position, so forks may share it.

    Reads rather than a memory map: a file truncated while in use raises an error that names it,
    where a memory map would kill the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = ByteReader(path)
        except OSError as error:
            kind = DataError if isinstance(error, PermissionError) else ShardUnavailableError
            raise kind(
                f"shard {path} cannot be opened ({error.strerror}): make it readable, or"
                " write the shards again with `data-prep shard`"
            ) from None
        self.close = weakref.finalize(self, self._file.close)

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the shard. Raises ShardUnavailableError if it cannot be read."""
        try:
            return self._file.read(offset, size)
        except OSError as error:
            raise ShardUnavailableError(
                f"shard {self.path} cannot be read: {error.strerror}"
            ) from None


class OpenShard:
    """A shard with its index, local or at a URL."""

    def __init__(
        self,
        folder: Location,
        entry: ShardEntry,
        path: Location | PipedFile,
        *,
        cache: ShardCache | None = None,
    ) -> None:
        self.path = path
        index = read_index(folder, entry)
        self.labels = index.labels
        self._offsets, self._sizes = index.offsets, index.sizes
        self._length = entry.bytes
        self._keys = np.char.encode(index.keys, "utf-8")  # takes a quarter of the memory
        self._extensions = np.char.encode(index.extensions, "ascii")
        self._shard = (
            LocalShard(path) if isinstance(path, Path) else RemoteShard(path, entry, cache)
        )

    def close(self) -> None:
        """Close the file."""
        self._shard.close()

    def key(self, row: int) -> str:
        """Return the key of sample `row`."""
        return bytes(self._keys[row]).decode()

    def extension(self, row: int) -> str:
        """Return the extension of the image member of sample `row`."""
        return bytes(self._extensions[row]).decode()

    def image(self, row: int) -> bytes:
        """Return the encoded image of sample `row`."""
        return self._read(row, int(self._offsets[row]), int(self._sizes[row]))

    def about(self, row: int) -> bytes | None:
        """Return the JSON member of sample `row`, None if there is none.

        The index lists only images; the other members of a sample are next to its image, between
        the images of its neighbours.
        """
        start, stop = 0, self._length
        if row > 0:
            end = int(self._offsets[row - 1] + self._sizes[row - 1])
            start = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if row + 1 < len(self._offsets):
            stop = int(self._offsets[row + 1])
        if not start <= self._offsets[row] < stop:
            raise DataError(f"shard {self.path}: its samples are not in the order of the index.")
        return member_named(f"{self.key(row)}.json", self._read(row, start, stop - start))

    def _read(self, row: int, offset: int, size: int) -> bytes:
        data = self._shard.read(offset, size)
        if len(data) < size:
            raise ShardUnavailableError(
                f"shard {self.path} ends within sample {self.key(row)}: it was truncated while"
                " in use; copy it again, or write the shards again with `data-prep shard`"
            )
        return data


def member_named(name: str, part: bytes) -> bytes | None:
    """Return a member from a part of a tar that starts at a header; None if it is not there."""
    with suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(part), mode="r:") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name == name else None
            if file is not None:
                return file.read()
    return None


def set_of(place: Location) -> tuple[Location, Names]:
    """Return the folder of a set of shards, and which of them: all, unless `place` is a pattern.

    Raises:
        ManifestError: the folder of a pattern has no manifest, or its set is not finished.
        PatternError: the pattern is malformed.
    """
    if not is_pattern(place):
        return place, Names()
    folder, names = split_pattern(place)
    if folder.exists() and not (folder / MANIFEST_NAME).exists():
        raise ManifestError(
            describe_unfinished(folder)
            or f"{place}: its folder has no {MANIFEST_NAME}, in which training finds the samples. "
            f"Write it: data-prep index '{place}'"
        )
    return folder, names


def _choose(manifest: Manifest, names: Names, place: Location) -> Manifest:
    """Return a manifest with the shards of these names only.

    Raises:
        PatternError: a pattern matches none of them.
    """
    if not names.include and not names.exclude:
        return manifest
    try:
        chosen = set(names.chosen([shard.name for shard in manifest.shards], place))
    except PatternError as error:
        raise PatternError(
            f"{error} Only tars in {MANIFEST_NAME} count: to add others, index them all with "
            f"`data-prep index {place} --include '*' --overwrite`."
        ) from None
    return replace(
        manifest, shards=tuple(shard for shard in manifest.shards if shard.name in chosen)
    )


class ShardSet(ImageSet):
    """The shards in `folder`, or some of them; every sample takes one read.

    The folder is a path or a URL (s3, gs, http), which is read as `remote` says, or a pattern of
    tars in one (`train-{000..099}.tar`, `train-*.tar`), which chooses among the manifest's shards
    as `names` does. `shards` are numbers of those, which this set counts from 0 in the order given.
    Each process opens files on first read. Raises ValueError if the folder, its manifest or a
    pattern cannot be used.
    """

    samples_are = "the shards in"

    def __init__(
        self,
        folder: str | Path,
        *,
        shards: Iterable[int] | slice | None = None,
        remote: RemoteReading | None = None,
        names: Names | None = None,
    ) -> None:
        self.remote = remote or RemoteReading()
        place = locate(folder)
        if isinstance(place, RemotePath):
            place = replace(place, attempts=self.remote.attempts)
        place, chosen = set_of(place)
        manifest = read_manifest(place, allow_pipe=self.remote.allow_pipe)
        for choice in (chosen, names or Names()):
            manifest = _choose(manifest, choice, place)
        self.manifest: Manifest = manifest
        total = len(self.manifest.shards)
        match shards:
            case None:
                numbers = tuple(range(total))
            case slice():
                numbers = tuple(range(total)[shards])
            case _:
                numbers = tuple(shards)
        outside = [number for number in numbers if not 0 <= number < total]
        if outside:
            raise ValueError(
                f"{place} has shards 0 to {total - 1}; there is no shard {outside[0]}."
            )
        super().__init__(place, numbers, self.manifest.classes)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": OrderedDict()}

    @property
    def channels(self) -> ChannelNames | None:
        """Names of the channels of all images; None if the manifest has none."""
        names = self.manifest.channels
        return None if names is None else read_names(names)

    def _size(self, number: int) -> int:
        return self.manifest.shards[number].samples

    def _labels(self, number: int) -> NDArray[np.int64]:
        return self._opened(number).labels

    def _fingerprint(self, number: int) -> str:
        shard = self.manifest.shards[number]
        return f"{shard.name} {shard.samples} {shard.sha256}"

    def _name(self, number: int, row: int) -> str:
        opened = self._opened(number)
        return f"{opened.path.stem}/{opened.key(row)}"

    def _read(self, number: int, row: int) -> RawSample:
        """Return a sample; reads of a missing or truncated shard are retried.

        Raises DataError naming the shard if it still cannot be read.
        """
        return read_patiently(lambda: self._try_to_read(number, row), self.remote.attempts)

    def _about(self, number: int, row: int) -> bytes | None:
        """Return the JSON member of a sample; see `_read`."""
        return read_patiently(lambda: self._opened(number).about(row), self.remote.attempts)

    def _try_to_read(self, number: int, row: int) -> RawSample:
        try:
            opened = self._opened(number)
            return RawSample(
                key=opened.key(row),
                image=opened.image(row),
                label=self._label(int(opened.labels[row])),
                shard_name=opened.path.stem,
                extension=opened.extension(row),
                channels=self.channels,
                no_data=self.manifest.no_data,
                read_about=partial(self._about, number, row),
            )
        except ShardUnavailableError:  # the open file may have been replaced since
            if number in self._open:
                self._open.pop(number).close()
            raise

    def _opened(self, number: int) -> OpenShard:
        """Return an open shard; beyond `OPEN_SHARDS` the least recently used one is closed."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        entry = self.manifest.shards[number]
        try:
            opened = OpenShard(self.folder, entry, self._place(entry), cache=self._cache_for(entry))
        except ManifestError as error:
            if self._is_whole(entry):
                raise
            raise ShardUnavailableError(str(error).rstrip(".")) from None
        self._open[number] = opened
        return opened

    def _place(self, entry: ShardEntry) -> Location | PipedFile:
        """Return the location of a shard, with `remote.attempts` attempts per request."""
        place = entry.location(self.folder)
        return place if isinstance(place, Path) else replace(place, attempts=self.remote.attempts)

    def _is_whole(self, entry: ShardEntry) -> bool:
        """Return whether a shard's tar and index exist, the tar at its full length."""
        place = self._place(entry)
        if isinstance(place, PipedFile):
            return True  # a command is run again for each attempt
        try:
            (self.folder / entry.index).stat()
            return bool(place.stat().st_size == entry.bytes)
        except OSError:
            return False
        except ValueError:  # a store that does not respond, after all attempts
            return True

    def _cache_for(self, entry: ShardEntry) -> ShardCache | None:
        place = entry.location(self.folder)
        if isinstance(place, Path):
            return None
        if isinstance(place, PipedFile):
            return self.remote.cache  # a command's output cannot be read in parts
        known = sum(self.manifest.shards[number].samples for number in self.numbers)
        return self.remote.cache_for(self.manifest, self.samples / max(1, known))

    @property
    def fetches_whole_shards(self) -> bool:
        """Whether reading caches whole shards, so that fetching them ahead helps."""
        return self._cache_for(self.manifest.shards[0]) is not None

    def fetch(self, shard: int) -> None:
        """Fetch a shard into the cache. Raises DataError if that fails."""
        entry = self.manifest.shards[self.numbers[shard]]
        place = self._place(entry)
        if not isinstance(place, Path):
            RemoteShard(place, entry, self._cache_for(entry)).fetch()
