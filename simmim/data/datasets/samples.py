"""Sets of images that samples are chosen from, be they in shards or in a folder."""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from data_prep.format.storage import Location
from simmim.data.order.randomness import shuffled
from simmim.data.order.source import EncodedImage

Own = TypeVar("Own", bound="SampleSet")


class SampleSet(ABC):
    """Images in shards, each with a label or without: all there are, or a choice of them.

    Callers count shards from 0 among those chosen, and samples from 0 among those chosen in a
    shard. The methods with an underscore, which each kind of set has its own of, take the number
    of a shard and the row of a sample among all there are.

    Args:
        folder: where the images are.
        numbers: of the shards that are chosen, in order.
        names: of all classes.
    """

    samples_are = "the images in"
    """What messages call the samples, before the folder."""

    def __init__(self, folder: Location, numbers: Sequence[int], names: Sequence[str]) -> None:
        self.folder = folder
        self.numbers = tuple(numbers)
        self._names = tuple(names)
        self._rows: tuple[np.ndarray, ...] | None = None
        self._chosen = tuple(range(len(self._names)))

    @abstractmethod
    def _size(self, number: int) -> int:
        """Return how many samples a shard has."""

    @abstractmethod
    def _labels(self, number: int) -> np.ndarray:
        """Return the label of each sample of a shard among all classes, int64, -1 for none."""

    @abstractmethod
    def _read(self, number: int, row: int) -> EncodedImage:
        """Return a sample, its label put through `_label`."""

    @abstractmethod
    def _name(self, number: int, row: int) -> str:
        """Return shard and key of a sample."""

    @abstractmethod
    def _fingerprint(self, number: int) -> str:
        """Return a line that changes with what a shard holds."""

    @property
    def fetches_whole_shards(self) -> bool:
        """Whether reading brings whole shards into a cache, so that fetching ahead helps."""
        return False

    def fetch(self, shard: int) -> None:
        """Bring a shard into the cache before it is read; raises DataError where that fails."""
        del shard

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; a label is a place in this list."""
        return tuple(self._names[label] for label in self._chosen)

    def folder_of(self, _shard: int) -> str:
        """Return the folder of a shard."""
        return str(self.folder)

    @property
    def sizes(self) -> list[int]:
        """Samples in each shard."""
        if self._rows is not None:
            return [len(rows) for rows in self._rows]
        return [self._size(number) for number in self.numbers]

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(self.sizes)

    @property
    def digest(self) -> str:
        """SHA-256 over what these shards hold and the choice among it."""
        digest = hashlib.sha256()
        for number in self.numbers:
            digest.update(f"{self._fingerprint(number)}\n".encode())
        for rows in self._rows or ():
            digest.update(rows.astype("<i8").tobytes())
        if self._narrowed:
            digest.update(repr(self._chosen).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.samples

    def read(self, shard: int, sample: int) -> EncodedImage:
        """Return a sample. Raises DataError naming what cannot be read."""
        return self._read(self.numbers[shard], self._row(shard, sample))

    def name(self, shard: int, sample: int) -> str:
        """Return shard and key of a sample, as messages call it."""
        return self._name(self.numbers[shard], self._row(shard, sample))

    def labels(self, shard: int) -> np.ndarray:
        """Return the label of each sample of a shard, int64, -1 where there is none."""
        labels = self._labels(self.numbers[shard])
        if self._rows is not None:
            labels = labels[self._rows[shard]]
        if self._narrowed:
            numbers = np.full(len(self._names) + 1, -1)  # the last is for no label, -1
            numbers[list(self._chosen)] = np.arange(len(self._chosen))
            labels = numbers[labels]
        return labels

    def require_labels(self) -> None:
        """Raise ValueError unless the images have at least two classes."""
        if len(self.classes) < 2:
            raise ValueError(
                f"{self.samples_are} {self.folder} have {len(self.classes)} classes, and telling"
                " classes apart needs two: keep each class's images in a folder of its own, and"
                " name the folder of these folders, or of shards that `data-prep shard` made of it"
            )

    def split(self: Own, validation_shards: int) -> tuple[Own, Own]:
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

    def share(self: Own, share: float, *, seed: int) -> Own:
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

    def only_classes(self: Own, names: Sequence[str]) -> Own:
        """Return the samples of these classes; labels then count within them, in the set's order.

        Raises ValueError naming the classes that there are not.
        """
        unknown = [name for name in names if name not in self.classes]
        if unknown or not names:
            raise ValueError(
                f"{self.samples_are} {self.folder} have no class"
                f" {', '.join(unknown) or '(none given)'};"
                f" choose of {', '.join(self.classes) or 'none: nothing is labelled'}"
            )
        labels = [self.labels(shard) for shard in range(len(self.numbers))]
        wanted = [label for label, name in enumerate(self.classes) if name in names]
        selection = self._keeping([np.flatnonzero(np.isin(part, wanted)) for part in labels])
        selection._chosen = tuple(self._chosen[label] for label in wanted)
        return selection

    @property
    def _narrowed(self) -> bool:
        return len(self._chosen) < len(self._names)

    def _label(self, label: int) -> int | None:
        """Return a label among the chosen classes; -1, of none, is None."""
        if label < 0:
            return None
        return self._chosen.index(label) if self._narrowed else label

    def _row(self, shard: int, sample: int) -> int:
        return sample if self._rows is None else int(self._rows[shard][sample])

    def _keeping(self: Own, rows: list[np.ndarray]) -> Own:
        """Return these samples of each shard, by their places among those that are there now."""
        if self._rows is not None:
            rows = [known[part] for known, part in zip(self._rows, rows, strict=True)]
        selection = self._only(range(len(self.numbers)))
        selection._rows = tuple(rows)
        return selection

    def _only(self: Own, places: range) -> Own:
        """Return some of these shards, keeping the samples chosen in them."""
        selection = copy.copy(self)
        selection.numbers = tuple(self.numbers[place] for place in places)
        if self._rows is not None:
            selection._rows = tuple(self._rows[place] for place in places)
        return selection
