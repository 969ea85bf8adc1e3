"""JPEG 2000 files, written for the tests."""

import struct

import numpy as np
import pytest


def encode_jpeg2000(values: np.ndarray, bits: int, **options: object) -> bytes:
    """Write values of that many bits without loss."""
    imagecodecs = pytest.importorskip("imagecodecs")
    settings = {"level": 0, "reversible": True, "bitspersample": bits, **options}
    return bytes(imagecodecs.jpeg2k_encode(values, **settings))


def with_cdef(data: bytes, channels: list[tuple[int, int, int]]) -> bytes:
    """Define the channels of a JP2 that does not: (channel, type, colour) of each."""
    body = struct.pack(">H", len(channels)) + b"".join(
        struct.pack(">HHH", *one) for one in channels
    )
    start = data.index(b"jp2h") - 4
    (length,) = struct.unpack_from(">I", data, start)
    header = struct.pack(">I", length + 8 + len(body)) + data[start + 4 : start + length]
    box = struct.pack(">I4s", 8 + len(body), b"cdef") + body
    return data[:start] + header + box + data[start + length :]
