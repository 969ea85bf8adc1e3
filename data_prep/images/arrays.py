"""NumPy arrays as images: pictures with any number of channels, as satellites and scanners make.

An array is an image of height x width, or of height x width x channels. Its header is read and
checked before memory is taken for its values, and nothing is ever unpickled.
"""

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"\x93NUMPY"
"""What every `.npy` file begins with."""
MAX_CHANNELS = 1024
"""Most channels an array may have."""

_TYPES = ("uint8", "uint16", "float16", "float32", "float64")
_HEADER_BYTES = 4096


class ArrayError(ValueError):
    """A `.npy` file that is no image; the text says why."""


@dataclass(frozen=True, kw_only=True)
class ArrayHeader:
    """What an array's file says of it."""

    shape: tuple[int, ...]
    """(height, width) or (height, width, channels)."""
    dtype: np.dtype[Any]
    """Type of its values, in the byte order of the file."""
    fortran_order: bool
    """Whether its values lie in Fortran's order."""
    offset: int
    """First byte of the values in the file."""

    @property
    def channels(self) -> int:
        """Channels, 1 for an array of two axes."""
        return self.shape[2] if len(self.shape) == 3 else 1

    @property
    def is_plain(self) -> bool:
        """Whether the values lie row by row and in little-endian order, as shards hold them."""
        return not self.fortran_order and self.dtype == self.dtype.newbyteorder("<")


def read_header(data: bytes) -> ArrayHeader:
    """Return what a `.npy` file says of its array, which is then certain to be all there.

    Raises:
        ArrayError: the file is damaged, cut, too long, holds objects, a type or a shape that is no
            image's.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = read(stream, max_header_size=_HEADER_BYTES)
    except KeyError:
        raise ArrayError("its .npy header is of a version that is not read here") from None
    # NumPy parses headers with Python's own parser, which raises many types.
    except Exception as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ArrayError(f"its .npy header is damaged: {reason}") from None
    if dtype.name not in _TYPES or dtype.fields is not None or dtype.subdtype is not None:
        kinds = ", ".join(_TYPES)
        raise ArrayError(f"its values are of type {dtype}: an image's are {kinds}")
    _check_shape(shape)
    expected = math.prod(shape) * dtype.itemsize
    held = len(data) - stream.tell()
    if held != expected:
        fault = "is cut" if held < expected else "has more than its header says"
        raise ArrayError(f"it {fault}: {held:,} bytes of values, {expected:,} by its header")
    return ArrayHeader(shape=shape, dtype=dtype, fortran_order=fortran_order, offset=stream.tell())


def read_array(data: bytes) -> NDArray[Any]:
    """Return the array of a `.npy` file, read-only and without a copy.

    Raises:
        ArrayError: see `read_header`.
    """
    return read_values(data, read_header(data))


def read_values(data: bytes, header: ArrayHeader) -> NDArray[Any]:
    """Return the array of a file whose header was read, read-only and without a copy."""
    flat = np.frombuffer(data, dtype=header.dtype, offset=header.offset)
    return flat.reshape(header.shape, order="F" if header.fortran_order else "C")


def write_array(values: NDArray[Any]) -> bytes:
    """Return an array as a `.npy` file, row by row and in little-endian order."""
    plain = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, plain, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def count_nan(values: NDArray[Any]) -> int:
    """Return how many values are NaN, which stands for what was not measured.

    Raises:
        ArrayError: values are infinite, or none is a number.
    """
    if values.dtype.kind != "f":
        return 0
    missing = int(np.count_nonzero(np.isnan(values)))
    infinite = int(np.count_nonzero(np.isinf(values)))
    if infinite:
        raise ArrayError(f"{infinite:,} of its {values.size:,} values are infinite")
    if missing == values.size:
        raise ArrayError("all of its values are NaN")
    return missing


def _check_shape(shape: tuple[int, ...]) -> None:
    text = "x".join(map(str, shape)) or "no axes"
    # The header's parser lets True pass for 1, which nothing else does.
    if len(shape) not in (2, 3) or any(type(side) is bool or side < 1 for side in shape):
        raise ArrayError(f"its shape is {text}: an image's is height x width (x channels)")
    if len(shape) == 2:
        return
    if shape[2] > MAX_CHANNELS:
        raise ArrayError(f"its shape is {text}: that is more than {MAX_CHANNELS:,} channels")
    # No image has so few rows and so many channels, but every array of a channel-first library.
    if shape[0] <= 4 and shape[2] > 16:
        raise ArrayError(f"its shape is {text}: move its channels to the last axis")
