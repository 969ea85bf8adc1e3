"""Several datasets of images read as one, mixed by weight; one of them may be a stream."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.format.text import count_noun
from simmim.data.datasets.image_set import ImageSet
from simmim.data.datasets.stream import StreamedImage, TarStream
from simmim.data.order.order import MixedOrder, Order, SampleOrder, Slots, StreamOrder, choose_slots
from simmim.data.order.source import EncodedImage, SampleSource


class MixedShards(SampleSource[EncodedImage]):
    """The concatenated shards of several datasets.

    Labels need the same classes in all datasets; otherwise the samples count as unlabelled.
    Raises ValueError unless every dataset has a weight above 0.
    """

    def __init__(self, sets: Sequence[ImageSet], weights: Sequence[float]) -> None:
        if not sets or len(sets) != len(weights) or not min(weights) > 0:
            raise ValueError("a mixture needs at least one dataset, each with a weight above 0.")
        self.sets = tuple(sets)
        self.weights = tuple(weights)
        self._firsts = np.cumsum([0, *(len(one.sizes) for one in self.sets)])

    @property
    def folder(self) -> str:
        """The folders of all datasets, for messages."""
        return ", ".join(str(one.folder) for one in self.sets)

    def folder_of(self, shard: int) -> str:
        """Return the folder of a shard, for messages."""
        return str(self.sets[self._locate(shard)[0]].folder)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; empty if the datasets have different ones."""
        first = self.sets[0].classes
        return first if all(one.classes == first for one in self.sets) else ()

    @property
    def sizes(self) -> list[int]:
        """Number of samples in each shard, dataset after dataset."""
        return [size for one in self.sets for size in one.sizes]

    def _digest_parts(self) -> Iterator[bytes]:
        """Yield the digests and weights of the datasets."""
        for one, weight in zip(self.sets, self.weights, strict=True):
            yield f"{one.digest} {weight!r}\n".encode()

    def read(self, shard: int, sample: int) -> EncodedImage:
        """Return a sample. Raises DataError naming the shard if it cannot be read."""
        number, own = self._locate(shard)
        return self.sets[number].read(own, sample)

    def name(self, shard: int, sample: int) -> str:
        """Return shard and key of a sample, for messages."""
        number, own = self._locate(shard)
        return self.sets[number].name(own, sample)

    @property
    def fetches_whole_shards(self) -> bool:
        """Whether reading any of the datasets caches whole shards."""
        return any(one.fetches_whole_shards for one in self.sets)

    def fetch(self, shard: int) -> None:
        """Fetch a shard into the cache of its dataset, if it has one."""
        number, own = self._locate(shard)
        self.sets[number].fetch(own)

    def labels(self, shard: int) -> NDArray[np.int64]:
        """Return the labels of a shard's samples, -1 for none."""
        number, own = self._locate(shard)
        labels = self.sets[number].labels(own)
        return labels if self.classes else np.full_like(labels, -1)

    def require_labels(self) -> None:
        """Raise ValueError unless there are at least two classes, the same in all datasets."""
        for one in self.sets:
            one.require_labels()
        if not self.classes:
            raise ValueError(
                f"the datasets {self.folder} have different classes, so their labels do not match:"
                " make them with the same class folders."
            )

    def require_own_metadata(self) -> None:
        """Raise ValueError if two images would share their JSON."""
        for one in self.sets:
            one.require_own_metadata()

    def split(self, validation_shards: int) -> tuple["MixedShards", "MixedShards"]:
        """Return (training, validation), the last shards of each dataset being held out."""
        parts = [one.split(validation_shards) for one in self.sets]
        training, validation = zip(*parts, strict=True)
        return MixedShards(training, self.weights), MixedShards(validation, self.weights)

    def share(self, share: float, *, seed: int) -> "MixedShards":
        """Return a fraction of each class's samples of each dataset; see `ImageSet.share`."""
        return self._map(lambda one: one.share(share, seed=seed))

    def only_classes(self, names: Sequence[str]) -> "MixedShards":
        """Return the samples of these classes; see `ImageSet.only_classes`."""
        return self._map(lambda one: one.only_classes(names))

    def _map(self, function: Callable[[ImageSet], ImageSet]) -> "MixedShards":
        return MixedShards([function(one) for one in self.sets], self.weights)

    def _locate(self, shard: int) -> tuple[int, int]:
        """Return the dataset that contains a shard, and the number of the shard there."""
        number = int(np.searchsorted(self._firsts, shard, side="right")) - 1
        return number, shard - int(self._firsts[number])


class StreamedShards(SampleSource[EncodedImage]):
    """A stream of tars, alone or after indexed datasets that it is mixed with.

    The shards of the datasets come first, then the tars. The order counts the stream as one shard,
    with the samples of an epoch.

    Args:
        indexed: indexed datasets, if there are any.
        weights: their weights.
        stream: the stream.
    """

    def __init__(
        self, indexed: Sequence[ImageSet], weights: Sequence[float], stream: TarStream
    ) -> None:
        self.indexed = MixedShards(indexed, weights) if indexed else None
        self.stream = stream
        self.weights = (*weights, stream.settings.weight)
        self.first_tar = len(self.indexed.sizes) if self.indexed else 0
        """Number of the shard that stands for the stream in the order, and of the first tar."""
        self._first: dict[tuple[int, int], StreamedImage] = {}

    def describe(self, readers: int) -> str:
        """Return what a person should know of the stream before training.

        Args:
            readers: data workers of all processes.
        """
        tars, settings = len(self.stream.places), self.stream.settings
        text = (
            f"data.stream: {count_noun(tars, 'tar')} of {settings.tars}, read in sequence. Not "
            "guaranteed: the same order on another number of processes or workers, and an exact "
            "resume (a resumed run starts a new shuffle at its step, and images of the epoch may "
            f"come again). For both, run `{settings.index_command}` and give FOLDER as data.shards."
        )
        if tars < readers:
            text += (
                f" Each tar is read by several of the {readers:,} data workers, which share its "
                "samples: use fewer, or more tars."
            )
        return text

    @property
    def sets(self) -> tuple[ImageSet, ...]:
        """The indexed datasets."""
        return self.indexed.sets if self.indexed else ()

    @property
    def parts(self) -> tuple[SampleSource[EncodedImage], ...]:
        """The indexed datasets, and the stream alone."""
        return (*self.sets, StreamedShards((), (), self.stream) if self.sets else self)

    @property
    def sizes(self) -> list[int]:
        """Number of samples in each shard, the stream being the last."""
        return [*(self.indexed.sizes if self.indexed else ()), self.stream.samples]

    def _digest_parts(self) -> Iterator[bytes]:
        """Yield the digest of the datasets, and the names of the tars."""
        if self.indexed:
            yield self.indexed.digest.encode()
        yield repr((self.weights, self.stream.settings.image_key)).encode()
        for name in self.stream.names:
            yield f"{name.rpartition('/')[2]}\n".encode()

    def folder_of(self, shard: int) -> str:
        """Return the folder of a shard, or the pattern of the stream, for messages."""
        if self.indexed and shard < self.first_tar:
            return self.indexed.folder_of(shard)
        return self.stream.settings.tars

    def name(self, shard: int, sample: int) -> str:
        """Return shard and key of a sample, for messages; of the stream, tar and number."""
        if self.indexed and shard < self.first_tar:
            return self.indexed.name(shard, sample)
        return f"{self.stream.names[shard - self.first_tar]}, sample {sample:,} from 0"

    def read(self, shard: int, sample: int) -> EncodedImage:
        """Return a sample of an indexed dataset, or one of `spread`."""
        if self.indexed and shard < self.first_tar:
            return self.indexed.read(shard, sample)
        return self._first[shard, sample]

    def spread(self, count: int) -> list[tuple[int, int]]:
        """Return shard and number of samples of the datasets, and of the first of the stream.

        Raises:
            ValueError: the first tar of the stream has no image.
        """
        found = self.indexed.spread(count // 2) if self.indexed else []
        if len(self._first) < count - len(found):
            images = self.stream.first_images(count - len(found))
            self._first = {(self.first_tar + one.tar, one.row): one for one in images}
        return found + list(self._first)[: count - len(found)]


class NoImages(SampleSource[EncodedImage]):
    """No images: what validates a training on a stream alone, unless the recipe names others."""

    @property
    def sizes(self) -> list[int]:
        """No shards."""
        return []

    def _digest_parts(self) -> Iterator[bytes]:
        """Yield nothing."""
        yield from ()

    def folder_of(self, shard: int) -> str:
        """Raise IndexError."""
        raise IndexError(shard)

    def name(self, shard: int, sample: int) -> str:
        """Raise IndexError."""
        raise IndexError(shard, sample)

    def read(self, shard: int, sample: int) -> EncodedImage:
        """Raise IndexError."""
        raise IndexError(shard, sample)


Shards = ImageSet | MixedShards
"""One dataset of images, or a mixture."""


def slots_of(shards: SampleSource[Any], batch_size: int) -> Slots:
    """Return the slots of a source, or of a mixture, for this global batch size."""
    if isinstance(shards, StreamedShards):
        if not shards.sets:
            return 1
        return choose_slots([*(one.samples for one in shards.sets), 0], batch_size)
    sets = shards.sets if isinstance(shards, MixedShards) else (shards,)
    return choose_slots([one.samples for one in sets], batch_size)


def order_of(shards: SampleSource[Any], *, seed: int, slots: Slots) -> Order:
    """Return the order of the samples of a source, or of a mixture.

    Raises:
        ValueError: the numbers of slots do not fit the datasets.
    """
    if isinstance(shards, StreamedShards):
        if not shards.sets:
            if slots != 1:
                raise ValueError("data.slots is for indexed datasets: remove it.")
            return StreamOrder(shards.stream.samples)
        sizes = [*(one.sizes for one in shards.sets), [shards.stream.samples]]
        return MixedOrder(sizes, shards.weights, seed=seed, slots=slots, stream=True)
    if isinstance(shards, MixedShards):
        sizes = [one.sizes for one in shards.sets]
        return MixedOrder(sizes, shards.weights, seed=seed, slots=slots)
    if not isinstance(slots, int):
        raise ValueError(
            f"data.slots is {list(slots)}; a list is for mixtures: give one number or null."
        )
    return SampleOrder(shards.sizes, seed=seed, slots=slots)
