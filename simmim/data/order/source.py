"""Sample sources, encoded samples, and errors of unusable data."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

import numpy as np

from data_prep.channels import ChannelNames


class DataError(ValueError):
    """Shards or images that cannot be used; the message says which, why and what to do."""


class BadSampleError(DataError):
    """One sample is damaged, too large or of the wrong kind; its neighbours may be good."""


class EncodedSample(Protocol):
    """A sample before decoding."""

    @property
    def name(self) -> str:
        """Name in messages."""

    @property
    def key(self) -> str:
        """Key within its shard."""

    @property
    def shard_name(self) -> str:
        """Name of its shard."""


class EncodedImage(EncodedSample, Protocol):
    """An image with its label, before decoding."""

    @property
    def image(self) -> bytes:
        """The encoded file. Raises BadSampleError if it cannot be read."""

    @property
    def extension(self) -> str:
        """File name extension, in lower case and without the dot."""

    @property
    def channels(self) -> ChannelNames | None:
        """Names of its channels, if its set has them; None if only the file may have them."""

    @property
    def label(self) -> int | None:
        """Index of its class; None if it has no label."""

    @property
    def about(self) -> bytes | None:
        """Its JSON metadata; None if there is none. Raises as `image` does."""


Encoded = TypeVar("Encoded", bound=EncodedSample)
Encoded_co = TypeVar("Encoded_co", bound=EncodedSample, covariant=True)


class SampleSource(ABC, Generic[Encoded_co]):
    """A list of samples in shards, which batches are read from: images, clips, or others."""

    @property
    @abstractmethod
    def sizes(self) -> list[int]:
        """Number of samples in each shard."""

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(self.sizes)

    def __len__(self) -> int:
        return self.samples

    @property
    def digest(self) -> str:
        """SHA-256 over what is known of the samples without reading them."""
        digest = hashlib.sha256()
        for part in self._digest_parts():
            digest.update(part)
        return digest.hexdigest()

    @abstractmethod
    def _digest_parts(self) -> Iterator[bytes]:
        """Yield texts that identify the samples, in order."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; empty if samples have no labels."""
        return ()

    @property
    def fetches_whole_shards(self) -> bool:
        """Whether reading caches whole shards, so that fetching them ahead helps."""
        return False

    def fetch(self, shard: int) -> None:
        """Fetch a shard into the cache, if there is one. Raises DataError if that fails."""
        del shard

    def spread(self, count: int) -> list[tuple[int, int]]:
        """Return shard and number of up to `count` samples at equal distances, always the same.

        They are of the first shard that has samples, if reading one fetches its whole shard.
        """
        sizes = self.sizes
        first = next((shard for shard, size in enumerate(sizes) if size), 0)
        if self.fetches_whole_shards:
            sizes = sizes[: first + 1]
        total = sum(sizes)
        places = np.unique(np.linspace(0, total - 1, min(count, total)).astype(int))
        ends = np.cumsum(sizes)
        shards = np.searchsorted(ends, places, side="right")
        return [
            (shard, place - int(ends[shard] - sizes[shard]))
            for shard, place in zip(shards.tolist(), places.tolist(), strict=True)
        ]

    @abstractmethod
    def folder_of(self, shard: int) -> str:
        """Return the folder of a shard, for messages."""

    @abstractmethod
    def name(self, shard: int, sample: int) -> str:
        """Return shard and key of a sample, for messages."""

    @abstractmethod
    def read(self, shard: int, sample: int) -> Encoded_co:
        """Return a sample. Raises DataError naming what cannot be read."""
