"""Random access to the samples of shards, through the indexes that `data-prep` writes."""

import hashlib
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep.manifest import (
    Location,
    Manifest,
    ManifestError,
    PipedFile,
    RemotePath,
    ShardEntry,
    locate,
    read_index,
    read_manifest,
)
from simmim.data.cache import ShardCache
from simmim.data.errors import DataError
from simmim.data.patience import ShardAmissError, patiently
from simmim.data.randomness import shuffled
from simmim.data.remote import RemoteReading, RemoteShard

OPEN_SHARDS = 320
"""Shards a process keeps open at a time: what one rank's slots touch while they shuffle a block."""


@dataclass(frozen=True)
class RawSample:
    """A sample as it lies in its shard; `image` is the encoded file."""

    key: str
    image: bytes
    label: int | None
    shard_name: str
    extension: str

    @property
    def name(self) -> str:
        """Shard and key: what messages call the sample, and what seeds its randomness."""
        return f"{self.shard_name}/{self.key}"


class LocalShard:
    """The bytes of one shard on this machine. Reads move no file position: forks may share it.

    Read rather than mapped: a file that is cut off while it is in use is then an error with a
    name, where a memory map would end the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            kind = DataError if isinstance(error, PermissionError) else ShardAmissError
            raise kind(
                f"shard {path} cannot be opened ({error.strerror}): make it readable, or"
                " write the shards anew with `data-prep shard`"
            ) from None
        self.close = weakref.finalize(self, os.close, self._file)

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the shard. Raises ShardAmissError where it cannot be read."""
        try:
            return os.pread(self._file, size, offset)
        except OSError as error:
            raise ShardAmissError(f"shard {self.path} cannot be read: {error.strerror}") from None


class OpenShard:
    """One shard with its index, here or at a URL."""

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
        self._keys = np.char.encode(index.keys, "utf-8")  # a quarter of the memory
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
        size, offset = int(self._sizes[row]), int(self._offsets[row])
        data = self._shard.read(offset, size)
        if len(data) < size:
            raise ShardAmissError(
                f"shard {self.path} ends within sample {self.key(row)}: it was cut off while it"
                " was in use; copy it again, or write the shards anew with `data-prep shard`"
            )
        return data


class ShardSet:
    """The shards in `folder`, or some of them, with every sample one read away.

    The folder is a path or a URL (s3, gs, http), which is then read as `remote` says.
    `shards` are numbers of the manifest's shards; here they count from 0 in the order given.
    Files open when first read, in each process for itself. Raises ValueError where the folder or
    its manifest cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        shards: Iterable[int] | slice | None = None,
        remote: RemoteReading | None = None,
    ) -> None:
        self.remote = remote or RemoteReading()
        self.folder = locate(folder)
        if isinstance(self.folder, RemotePath):
            self.folder = replace(self.folder, attempts=self.remote.attempts)
        self.manifest: Manifest = read_manifest(self.folder, allow_pipe=self.remote.allow_pipe)
        total = len(self.manifest.shards)
        match shards:
            case None:
                self.numbers = tuple(range(total))
            case slice():
                self.numbers = tuple(range(total)[shards])
            case _:
                self.numbers = tuple(shards)
        outside = [number for number in self.numbers if not 0 <= number < total]
        if outside:
            raise ValueError(
                f"{self.folder} has shards 0 to {total - 1}; there is no shard {outside[0]}"
            )
        self._rows: tuple[np.ndarray, ...] | None = None
        self._chosen: tuple[int, ...] = tuple(range(len(self.manifest.classes)))
        self._open: OrderedDict[int, OpenShard] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": OrderedDict()}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; a label is a place in this list."""
        return tuple(self.manifest.classes[label] for label in self._chosen)

    def folder_of(self, _shard: int) -> str:
        """Return the folder of a shard."""
        return str(self.folder)

    @property
    def sizes(self) -> list[int]:
        """Samples in each shard."""
        if self._rows is not None:
            return [len(rows) for rows in self._rows]
        return [self.manifest.shards[number].samples for number in self.numbers]

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(self.sizes)

    @property
    def digest(self) -> str:
        """SHA-256 over names, sizes and checksums of these shards and the choice among them."""
        digest = hashlib.sha256()
        for number in self.numbers:
            shard = self.manifest.shards[number]
            digest.update(f"{shard.name} {shard.samples} {shard.sha256}\n".encode())
        for rows in self._rows or ():
            digest.update(rows.astype("<i8").tobytes())
        if self._narrowed:
            digest.update(repr(self._chosen).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.samples

    def read(self, shard: int, sample: int) -> RawSample:
        """Return a sample; a shard that is gone or cut off is waited for, `remote.attempts` times.

        Raises DataError naming the shard where it cannot be read.
        """
        return patiently(lambda: self._read(shard, sample), self.remote.attempts)

    def _read(self, shard: int, sample: int) -> RawSample:
        try:
            return self._read_from(self._opened(shard), shard, sample)
        except ShardAmissError:  # what is open may be of a file that was replaced since
            if shard in self._open:
                self._open.pop(shard).close()
            raise

    def _read_from(self, opened: OpenShard, shard: int, sample: int) -> RawSample:
        row = sample if self._rows is None else int(self._rows[shard][sample])
        label = int(opened.labels[row])
        if label >= 0 and self._narrowed:
            label = self._chosen.index(label)
        return RawSample(
            key=opened.key(row),
            image=opened.image(row),
            label=None if label < 0 else label,
            shard_name=opened.path.stem,
            extension=opened.extension(row),
        )

    def name(self, shard: int, sample: int) -> str:
        """Return shard and key of a sample, as messages call it."""
        opened = self._opened(shard)
        row = sample if self._rows is None else int(self._rows[shard][sample])
        return f"{opened.path.stem}/{opened.key(row)}"

    def labels(self, shard: int) -> np.ndarray:
        """Return the label of each sample of a shard, int64, -1 where there is none."""
        labels = self._opened(shard).labels
        if self._rows is not None:
            labels = labels[self._rows[shard]]
        if self._narrowed:
            numbers = np.full(len(self.manifest.classes) + 1, -1)  # the last is for no label, -1
            numbers[list(self._chosen)] = np.arange(len(self._chosen))
            labels = numbers[labels]
        return labels

    @property
    def _narrowed(self) -> bool:
        return len(self._chosen) < len(self.manifest.classes)

    def require_labels(self) -> None:
        """Raise ValueError unless the images have at least two classes."""
        if len(self.classes) < 2:
            raise ValueError(
                f"the shards in {self.folder} name {len(self.classes)} classes, and telling classes"
                " apart needs two: keep each class's images in a folder of its own and run"
                " `data-prep shard` again"
            )

    def split(self, validation_shards: int) -> tuple["ShardSet", "ShardSet"]:
        """Return (training, validation): the last shards are held out.

        Raises ValueError where that leaves nothing to train on.
        """
        total = len(self.numbers)
        if not 0 <= validation_shards < total:
            raise ValueError(
                f"{validation_shards} shards cannot be held out of the {total} in {self.folder};"
                f" hold out at most {total - 1}, or write more and smaller shards with"
                " `data-prep shard --samples-per-shard`"
            )
        cut = total - validation_shards
        return self._only(range(cut)), self._only(range(cut, total))

    def share(self, share: float, *, seed: int) -> "ShardSet":
        """Return this share of each class's samples, at least one of each class, in order.

        Which ones is a pure function of the seed; a larger share contains every smaller one.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}; it must be above 0 and at most 1")
        labels = [self.labels(shard) for shard in range(len(self.numbers))]
        joined = np.concatenate(labels)
        chosen = np.zeros(len(joined), dtype=bool)
        for label in np.unique(joined).tolist():
            members = np.flatnonzero(joined == label)
            count = max(1, round(share * len(members)))
            chosen[members[shuffled(len(members), "share", seed, label)[:count]]] = True
        edges = np.cumsum([len(part) for part in labels])[:-1]
        return self._keeping([np.flatnonzero(part) for part in np.split(chosen, edges)])

    def only_classes(self, names: Sequence[str]) -> "ShardSet":
        """Return the samples of these classes; labels then count within them, in the set's order.

        Raises ValueError naming the classes that there are not.
        """
        unknown = [name for name in names if name not in self.classes]
        if unknown or not names:
            raise ValueError(
                f"the shards in {self.folder} have no class {', '.join(unknown) or '(none given)'};"
                f" choose of {', '.join(self.classes) or 'none: nothing is labelled'}"
            )
        labels = [self.labels(shard) for shard in range(len(self.numbers))]
        wanted = [label for label, name in enumerate(self.classes) if name in names]
        selection = self._keeping([np.flatnonzero(np.isin(part, wanted)) for part in labels])
        selection._chosen = tuple(self._chosen[label] for label in wanted)
        return selection

    def _keeping(self, rows: list[np.ndarray]) -> "ShardSet":
        """Return these samples of each shard, by their places among those that are there now."""
        if self._rows is not None:
            rows = [known[part] for known, part in zip(self._rows, rows, strict=True)]
        selection = self._only(range(len(self.numbers)))
        selection._rows = tuple(rows)
        return selection

    def _only(self, places: range) -> "ShardSet":
        """Return some of these shards, keeping the samples chosen in them."""
        selection = object.__new__(ShardSet)
        selection.__dict__ |= self.__getstate__()
        selection.numbers = tuple(self.numbers[place] for place in places)
        if self._rows is not None:
            selection._rows = tuple(self._rows[place] for place in places)
        return selection

    def _opened(self, shard: int) -> OpenShard:
        """Return an open shard; the least recently used is closed where too many are."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        entry = self.manifest.shards[self.numbers[shard]]
        try:
            opened = OpenShard(self.folder, entry, self._place(entry), cache=self._cache_for(entry))
        except ManifestError as error:
            if self._is_whole(entry):
                raise
            raise ShardAmissError(str(error).rstrip(".")) from None
        self._open[shard] = opened
        return opened

    def _place(self, entry: ShardEntry) -> Location | PipedFile:
        """Return where a shard is, to be asked as often as `remote` says."""
        place = entry.location(self.folder)
        return place if isinstance(place, Path) else replace(place, attempts=self.remote.attempts)

    def _is_whole(self, entry: ShardEntry) -> bool:
        """Tell whether tar and index of a shard are there, the tar at its full length."""
        place = self._place(entry)
        if isinstance(place, PipedFile):
            return True  # a command is run again for each attempt
        try:
            (self.folder / entry.index).stat()
            return bool(place.stat().st_size == entry.bytes)
        except OSError:
            return False
        except ValueError:  # a store that does not answer, which was tried often enough
            return True

    def _cache_for(self, entry: ShardEntry) -> ShardCache | None:
        place = entry.location(self.folder)
        if isinstance(place, Path):
            return None
        if isinstance(place, PipedFile):
            return self.remote.cache  # a command gives no parts
        known = sum(self.manifest.shards[number].samples for number in self.numbers)
        return self.remote.cache_for(self.manifest, self.samples / max(1, known))

    @property
    def fetches_whole_shards(self) -> bool:
        """Whether reading brings whole shards into a cache, so that fetching ahead helps."""
        return self._cache_for(self.manifest.shards[0]) is not None

    def fetch(self, shard: int) -> None:
        """Bring a shard into the cache before it is read; raises DataError where that fails."""
        entry = self.manifest.shards[self.numbers[shard]]
        place = self._place(entry)
        if not isinstance(place, Path):
            RemoteShard(place, entry, self._cache_for(entry)).fetch()
