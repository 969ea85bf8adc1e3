"""Random numbers named by what they are for: no stream is shared, none is carried over."""

import hashlib

import numpy as np
import torch


def stream_seed(purpose: str, *key: int | str) -> int:
    """Return 128 bits that stand for this purpose and key alone.

    The parts are hashed with their lengths, so that no two keys run together.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in (purpose, *key):
        encoded = repr(part).encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return int.from_bytes(digest.digest(), "little")


def numpy_stream(purpose: str, *key: int | str) -> np.random.Generator:
    """Return a fresh numpy generator for this purpose and key."""
    return np.random.Generator(np.random.PCG64(stream_seed(purpose, *key)))


def torch_stream(purpose: str, *key: int | str) -> torch.Generator:
    """Return a fresh torch generator (CPU) for this purpose and key."""
    return torch.Generator().manual_seed(stream_seed(purpose, *key) % 2**63)


def shuffled(count: int, purpose: str, *key: int | str) -> np.ndarray:
    """Return a permutation of `range(count)`, int64.

    It sorts raw 64-bit numbers: numpy promises those streams for good, but not the ones that
    `Generator.permutation` makes of them, and an order must outlive a numpy release.
    """
    bits = np.random.PCG64(stream_seed(purpose, *key))
    return np.argsort(bits.random_raw(count), kind="stable")
