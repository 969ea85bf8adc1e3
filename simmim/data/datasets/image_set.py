"""Images in shards or folders, of which classes, shares and splits can be selected."""

import copy
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from data_prep.channels import ChannelNames
from data_prep.format.storage import Location, retry
from data_prep.format.text import count_noun
from simmim.data.order.randomness import choose_share
from simmim.data.order.source import DataError, EncodedImage, SampleSource

WARN_FROM = 4
"""First failed attempt that a warning is printed for, after pauses of half a second in total."""

Result = TypeVar("Result")


class ShardUnavailableError(DataError):
    """A shard is missing or shorter than it should be; it may come back."""


def read_patiently(read: Callable[[], Result], attempts: int) -> Result:
    """Return the result of `read`, called again while a shard is unavailable.

    Raises:
        DataError: it is still unavailable after `attempts` calls.
    """

    def warn(error: Exception, attempt: int, pause: float) -> None:
        if attempt >= WARN_FROM:
            sys.stderr.write(
                f"\nWARNING: {error}; retrying in {pause:.1f} s"
                f" (attempt {attempt} of {attempts} failed, data.attempts)\n"
            )

    try:
        return retry(read, attempts, lambda error: isinstance(error, ShardUnavailableError), warn)
    except ShardUnavailableError as error:
        tried = count_noun(attempts, "attempt")
        raise DataError(f"{error} (after {tried}, data.attempts).") from None


class ImageSet(SampleSource[EncodedImage]):
    """Images in shards, with or without labels: all, or a selection.

    Public methods count shards and samples within the selection. The abstract methods, which
    subclasses implement, take the number of a shard and the row of a sample among all.

    Args:
        folder: folder of the images.
        numbers: numbers of the selected shards, in order.
        names: names of all classes.
    """

    samples_are = "the images in"
    """Name of the samples in messages, before the folder."""

    def __init__(self, folder: Location, numbers: Sequence[int], names: Sequence[str]) -> None:
        self.folder = folder
        self.numbers = tuple(numbers)
        self._names = tuple(names)
        self._rows: tuple[NDArray[np.int64], ...] | None = None
        self._chosen = tuple(range(len(self._names)))

    @abstractmethod
    def _size(self, number: int) -> int:
        """Return the number of samples of a shard."""

    @abstractmethod
    def _labels(self, number: int) -> NDArray[np.int64]:
        """Return the labels of a shard's samples among all classes, -1 for none."""

    @abstractmethod
    def _read(self, number: int, row: int) -> EncodedImage:
        """Return a sample, with its label mapped by `_label`."""

    @abstractmethod
    def _name(self, number: int, row: int) -> str:
        """Return shard and key of a sample."""

    @abstractmethod
    def _fingerprint(self, number: int) -> str:
        """Return text that changes with the content of a shard."""

    @property
    def channels(self) -> ChannelNames | None:
        """Names of the channels of all images; None if only the files themselves may have them."""
        return None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the selected classes; labels are indices into them."""
        return tuple(self._names[label] for label in self._chosen)

    def folder_of(self, shard: int) -> str:
        """Return the folder of a shard, for messages."""
        del shard
        return str(self.folder)

    @property
    def sizes(self) -> list[int]:
        """Number of samples in each shard."""
        if self._rows is not None:
            return [len(rows) for rows in self._rows]
        return [self._size(number) for number in self.numbers]

    def _digest_parts(self) -> Iterator[bytes]:
        """Yield the fingerprints of the shards, and the selection."""
        for number in self.numbers:
            yield f"{self._fingerprint(number)}\n".encode()
        for rows in self._rows or ():
            yield rows.astype("<i8").tobytes()
        if self._narrowed:
            yield repr(self._chosen).encode()

    def read(self, shard: int, sample: int) -> EncodedImage:
        """Return a sample. Raises DataError naming what cannot be read."""
        return self._read(self.numbers[shard], self._row(shard, sample))

    def name(self, shard: int, sample: int) -> str:
        """Return shard and key of a sample, for messages."""
        return self._name(self.numbers[shard], self._row(shard, sample))

    def labels(self, shard: int) -> NDArray[np.int64]:
        """Return the labels of a shard's samples, -1 for none."""
        labels = self._labels(self.numbers[shard])
        if self._rows is not None:
            labels = labels[self._rows[shard]]
        if self._narrowed:
            numbers = np.full(len(self._names) + 1, -1)  # the last one maps -1, no label
            numbers[list(self._chosen)] = np.arange(len(self._chosen))
            labels = numbers[labels]
        return labels

    def require_labels(self) -> None:
        """Raise ValueError unless the images have at least two classes."""
        if len(self.classes) < 2:
            raise ValueError(
                f"{self.samples_are} {self.folder} have"
                f" {count_noun(len(self.classes), 'class', 'classes')};"
                " classification needs at least 2: put the images of each class in a folder of its"
                " own, and give their parent folder, or shards made of it by `data-prep shard`."
            )

    def require_own_metadata(self) -> None:
        """Raise ValueError if two images would share their JSON; in shards each has its own."""
        return

    def split(self, validation_shards: int) -> tuple[Self, Self]:
        """Return (training, validation), the last shards being held out for validation.

        Raises ValueError if nothing is left to train on.
        """
        total = len(self.numbers)
        if not 0 <= validation_shards < total:
            raise ValueError(
                f"data.validation_shards is {validation_shards}, and {self.folder} has"
                f" {count_noun(total, 'shard')}, at least one of which has to be trained on: set it"
                f" to {total - 1} or less, or write more, smaller shards with"
                " `data-prep shard --samples-per-shard` (`data-prep reshard` of existing ones)."
            )
        cut = total - validation_shards
        return self._only(range(cut)), self._only(range(cut, total))

    def share(self, share: float, *, seed: int) -> Self:
        """Return a fraction of each class's samples, at least one of each, in order.

        See `choose_share`.
        """
        labels = [self.labels(shard) for shard in range(len(self.numbers))]
        joined = np.concatenate(labels)
        chosen = np.zeros(len(joined), dtype=bool)
        for label in np.unique(joined).tolist():
            members = np.flatnonzero(joined == label)
            chosen[members[choose_share(len(members), share, seed, label)]] = True
        edges = np.cumsum([len(part) for part in labels])[:-1]
        return self._keeping([np.flatnonzero(part) for part in np.split(chosen, edges)])

    def only_classes(self, names: Sequence[str]) -> Self:
        """Return the samples of these classes, relabelled among them in the order of `classes`.

        Raises ValueError naming the unknown classes.
        """
        unknown = [name for name in names if name not in self.classes]
        if unknown or not names:
            raise ValueError(
                f"{self.samples_are} {self.folder} have no class"
                f" {', '.join(unknown) or '(none given)'};"
                f" choose from {', '.join(self.classes) or 'none: nothing is labelled'}."
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
        """Return a label among the selected classes; None for -1, no label."""
        if label < 0:
            return None
        return self._chosen.index(label) if self._narrowed else label

    def _row(self, shard: int, sample: int) -> int:
        return sample if self._rows is None else int(self._rows[shard][sample])

    def _keeping(self, rows: list[NDArray[np.int64]]) -> Self:
        """Return these rows of each shard, counted within the current selection."""
        if self._rows is not None:
            rows = [known[part] for known, part in zip(self._rows, rows, strict=True)]
        selection = self._only(range(len(self.numbers)))
        selection._rows = tuple(rows)
        return selection

    def _only(self, indices: range) -> Self:
        """Return some of these shards, with the same selection within them."""
        selection = copy.copy(self)
        selection.numbers = tuple(self.numbers[index] for index in indices)
        if self._rows is not None:
            selection._rows = tuple(self._rows[index] for index in indices)
        return selection
