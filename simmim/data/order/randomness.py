"""Named random streams: each purpose and key has its own, and none carries state over."""

import hashlib
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2**64 divided by the golden ratio, odd: consecutive multiples share no bit pattern."""


class HashedWords(ISeedSequence):
    """A numpy seed sequence of hash words, which need no further mixing."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        """Return the first words of the hash."""
        return np.frombuffer(self.digest, dtype, n_words)


def stream_seed(purpose: str, *key: int | str) -> int:
    """Return a 128-bit seed specific to this purpose and key."""
    return int.from_bytes(_hash(16, purpose, *key), "little")


def numpy_stream(purpose: str, *key: int | str) -> np.random.Generator:
    """Return a fresh numpy generator for this purpose and key.

    There is one per sample: creating it with a `SeedSequence` would take eight times as long.
    """
    words: Any = HashedWords(_hash(32, purpose, *key))  # numpy's type hints omit seed sequences
    return np.random.Generator(np.random.PCG64(words))


def shuffled(count: int, purpose: str, *key: int | str) -> NDArray[np.int64]:
    """Return a random permutation of `range(count)`.

    It sorts raw 64-bit numbers, whose stream numpy guarantees across releases, unlike the results
    of `Generator.permutation`; an order must outlive a numpy release.
    """
    bits = np.random.PCG64(stream_seed(purpose, *key))
    return np.argsort(bits.random_raw(count), kind="stable")


def choose_share(count: int, share: float, *key: int) -> NDArray[np.int64]:
    """Return a random fraction of `range(count)`, at least one, ascending.

    A pure function of the key; a larger share contains every smaller one.

    Raises:
        ValueError: the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be above 0 and at most 1.")
    chosen = shuffled(count, "share", *key)[: max(1, round(share * count))]
    return np.sort(chosen)


def sample_bits(seed: int, purpose: str, keys: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """Return `count` random words per key, (keys, count): a pure function of the arguments.

    For draws made for all samples of a batch at once: thousands of numbers in about a hundred
    microseconds. Source of the mixing: splitmix64.

    Args:
        seed: seed of the training.
        purpose: name of the stream.
        keys: (keys, parts), for example one address per row.
        count: words per key.
    """
    state = np.full(len(keys), stream_seed(purpose, seed) % 2**64, np.uint64)
    for part in keys.astype(np.uint64).T:
        state = _mix(state + GOLDEN) ^ part
    steps = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    return _mix(_mix(state)[:, None] + steps)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = words ^ (words >> np.uint64(31))
    return mixed


def _hash(size: int, purpose: str, *key: int | str) -> bytes:
    """Return a hash of `size` bytes; parts are hashed with their lengths to keep them apart."""
    digest = hashlib.blake2b(digest_size=size)
    for part in (purpose, *key):
        encoded = repr(part).encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.digest()
