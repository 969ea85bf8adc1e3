"""What batches ask of a list of samples, be they images in shards or clips in folders."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, TypeVar


class Located(Protocol):
    """What stands at an address, before it is decoded."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def key(self) -> str:
        """What it is called in its shard."""

    @property
    def shard_name(self) -> str:
        """What its shard is called."""


class EncodedImage(Located, Protocol):
    """An image with its label, before it is decoded."""

    @property
    def image(self) -> bytes:
        """The encoded file. Raises BadSampleError where it cannot be read."""

    @property
    def extension(self) -> str:
        """Of its file name, in lower case and without the dot."""

    @property
    def label(self) -> int | None:
        """Place in the list of classes; None where it has none."""

    @property
    def about(self) -> bytes | None:
        """The JSON beside it; None where there is none. Raises as `image` does."""


Raw = TypeVar("Raw", bound=Located)
Raw_co = TypeVar("Raw_co", bound=Located, covariant=True)


class Source(Protocol[Raw_co]):
    """What samples are read from: shards (`simmim.data.datasets.mixture`), or other lists."""

    @property
    def sizes(self) -> list[int]:
        """Samples in each shard."""

    @property
    def samples(self) -> int:
        """Samples in all shards."""

    @property
    def digest(self) -> str:
        """SHA-256 over what is known of the samples without reading them."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; none where samples have no labels."""

    @property
    def fetches_whole_shards(self) -> bool:
        """Whether shards are to be fetched before their samples are read."""

    def fetch(self, shard: int) -> None:
        """Bring a shard near."""

    def folder_of(self, shard: int) -> str:
        """Return where a shard is from, for messages."""

    def name(self, shard: int, sample: int) -> str:
        """Return shard and key of a sample, as messages call it."""

    def read(self, shard: int, sample: int) -> Raw_co:
        """Return a sample."""


class LocalFiles(ABC):
    """What lists of files on this machine have in common as a `Source`."""

    classes: tuple[str, ...] = ()
    """Names of the classes; none where no class stands for a whole sample."""
    fetches_whole_shards = False
    folder: Path
    """Where they were listed from, for messages."""

    @abstractmethod
    def files(self) -> Iterator[Path]:
        """Yield every file that samples are read from."""

    def fetch(self, shard: int) -> None:
        """Bring nothing near: the files are here."""
        del shard

    def folder_of(self, shard: int) -> str:
        """Return where a shard is from."""
        del shard
        return str(self.folder)
