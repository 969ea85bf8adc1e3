"""Random numbers named by what they are for: no stream is shared, none is carried over."""

import hashlib
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2**64 over the golden ratio, odd: neighbouring multiples share no pattern of bits."""


class HashedWords(ISeedSequence):
    """What numpy starts a generator from: words of a hash, which need no further mixing."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """Return the first words of the hash."""
        return np.frombuffer(self.digest, dtype, n_words)


def stream_seed(purpose: str, *key: int | str) -> int:
    """Return 128 bits that stand for this purpose and key alone."""
    return int.from_bytes(_hash(16, purpose, *key), "little")


def numpy_stream(purpose: str, *key: int | str) -> np.random.Generator:
    """Return a fresh numpy generator for this purpose and key.

    It is one for each sample: with a `SeedSequence` making it would take eight times as long.
    """
    words: Any = HashedWords(_hash(32, purpose, *key))  # numpy's own types forget that it may
    return np.random.Generator(np.random.PCG64(words))


def shuffled(count: int, purpose: str, *key: int | str) -> np.ndarray:
    """Return a permutation of `range(count)`, int64.

    It sorts raw 64-bit numbers: numpy promises those streams for good, but not the ones that
    `Generator.permutation` makes of them, and an order must outlive a numpy release.
    """
    bits = np.random.PCG64(stream_seed(purpose, *key))
    return np.argsort(bits.random_raw(count), kind="stable")


def sample_bits(seed: int, purpose: str, keys: np.ndarray, count: int) -> np.ndarray:
    """Return `count` random words for each key: uint64 (keys, count), a pure function of all.

    For what is drawn for all samples of a batch at once, thousands of numbers in some hundred
    microseconds. Source of the mixing: splitmix64.

    Args:
        seed: of the whole training.
        purpose: what they are for.
        keys: int64 (keys, parts), an address a row for example.
        count: words for each.
    """
    state = np.full(len(keys), stream_seed(purpose, seed) % 2**64, np.uint64)
    for part in keys.astype(np.uint64).T:
        state = _mixed(state + GOLDEN) ^ part
    steps = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    return _mixed(_mixed(state)[:, None] + steps)


def _mixed(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = words ^ (words >> np.uint64(31))
    return mixed


def _hash(size: int, purpose: str, *key: int | str) -> bytes:
    """Return `size` bytes; the parts are hashed with their lengths, so that none run together."""
    digest = hashlib.blake2b(digest_size=size)
    for part in (purpose, *key):
        encoded = repr(part).encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.digest()
