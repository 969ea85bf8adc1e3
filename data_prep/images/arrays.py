"""NumPy arrays as images: any number of channels, as from satellites and medical scanners.

An array has shape (height, width) or (height, width, channels). Its header is checked before memory
is allocated for the values, and nothing is ever unpickled.
"""

import io
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"\x93NUMPY"
"""First bytes of every `.npy` file."""
MAX_CHANNELS = 1024
"""Maximum number of channels."""

MAX_FIRST_CHANNELS = 64
"""Maximum length of a first axis that is recognised as channels."""

_TYPES = ("uint8", "uint16", "float16", "float32", "float64")
_CONVERTED = {
    "bool": "uint8",
    "int8": "float32",
    "int16": "float32",
    **dict.fromkeys(("int32", "int64", "uint32", "uint64"), "float64"),
}
"""Other types → type that holds their values, as of the same values in TIFF."""
_EXACT_IN_FLOAT64 = 2**53
_HEADER_BYTES = 4096


class ArrayError(ValueError):
    """A `.npy` file is not an image; the message says why."""


@dataclass(frozen=True, kw_only=True)
class ArrayHeader:
    """The header of a `.npy` file."""

    shape: tuple[int, ...]
    """(height, width) or (height, width, channels)."""
    dtype: np.dtype[Any]
    """Type of the values, in the byte order of the file."""
    fortran_order: bool
    """Whether the values are in Fortran (column-major) order."""
    offset: int
    """Offset of the first value in the file, in bytes."""

    @property
    def channels(self) -> int:
        """Number of channels, 1 for an array with two axes."""
        return self.shape[2] if len(self.shape) == 3 else 1

    @property
    def is_plain(self) -> bool:
        """Whether the values are row-major and little-endian, as shards store them."""
        is_plain = not self.fortran_order and self.dtype == self.dtype.newbyteorder("<")
        return is_plain and self.dtype.name in _TYPES

    @property
    def stored_type(self) -> np.dtype[Any]:
        """Type of the values as they are read, in native byte order."""
        name = _CONVERTED.get(self.dtype.name)
        return self.dtype.newbyteorder("=") if name is None else np.dtype(name)


def read_header(data: bytes, *, channels_last: bool = True) -> ArrayHeader:
    """Read the header of a `.npy` file and check that all of its values are there.

    Args:
        data: the file.
        channels_last: whether the shape is to be that of an image as shards store it; otherwise its
            axes may be in another order.

    Raises:
        ArrayError: the file is damaged, truncated or too long, or its type or shape is not that of
            an image.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers of Python 2, which are read right
            shape, fortran_order, dtype = read(stream, max_header_size=_HEADER_BYTES)
    except KeyError:
        raise ArrayError("its .npy header has an unsupported version") from None
    # NumPy parses headers with Python's parser, which raises many types.
    except Exception as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ArrayError(f"its .npy header is damaged: {reason}") from None
    is_known = dtype.name in _TYPES or dtype.name in _CONVERTED
    if not is_known or dtype.fields is not None or dtype.subdtype is not None:
        kinds = ", ".join(_TYPES)
        raise ArrayError(
            f"its values are of type {dtype}: supported are {kinds}, to which integers and bool "
            "are converted; save it with values.astype('float32')"
        )
    check_shape(shape, channels_last=channels_last)
    expected = math.prod(shape) * dtype.itemsize
    held = len(data) - stream.tell()
    if held != expected:
        fault = "is truncated" if held < expected else "is longer than its header says"
        raise ArrayError(f"it {fault}: {held:,} bytes of values, {expected:,} by its header")
    return ArrayHeader(shape=shape, dtype=dtype, fortran_order=fortran_order, offset=stream.tell())


def read_array(data: bytes) -> NDArray[Any]:
    """Return the array of a `.npy` file; see `read_values`.

    Raises:
        ArrayError: see `read_header`.
    """
    return read_values(data, read_header(data))


def read_values(data: bytes, header: ArrayHeader) -> NDArray[Any]:
    """Return the array of a `.npy` file whose header is known.

    Values of a supported type are read-only and not copied. int8 and int16 become float32, longer
    integers float64, and bool 0 and 255 of uint8, as in TIFF.

    Raises:
        ArrayError: integers are not exact in float64.
    """
    flat = np.frombuffer(data, dtype=header.dtype, offset=header.offset)
    values: NDArray[Any] = flat.reshape(header.shape, order="F" if header.fortran_order else "C")
    if header.dtype.name not in _CONVERTED:
        return values
    if header.dtype.kind == "b":
        white: NDArray[Any] = np.where(values, 255, 0).astype(np.uint8)
        return white
    low, high = int(values.min()), int(values.max())
    if max(-low, high) > _EXACT_IN_FLOAT64:
        raise ArrayError(
            f"its values of {header.dtype} from {low:,} to {high:,} are not exact in float64: save "
            "it as float64 or uint16"
        )
    return values.astype(header.stored_type)


def write_array(values: NDArray[Any]) -> bytes:
    """Return an array as a `.npy` file, row-major and little-endian."""
    plain = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, plain, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def count_nan(values: NDArray[Any]) -> int:
    """Return the number of NaN values, which stand for missing measurements.

    Raises:
        ArrayError: some values are infinite, or all are NaN.
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


def is_measured(values: NDArray[Any], no_data: float | None) -> NDArray[np.bool_]:
    """Return which values are measurements: neither NaN nor the no-data value.

    Args:
        values: any values, as they are stored.
        no_data: the no-data value; None if there is none. It may be one that the type of the
            values cannot hold.
    """
    known = np.ones(values.shape, dtype=bool)
    if values.dtype.kind == "f":
        known = ~np.isnan(values)
        if no_data is not None:
            with np.errstate(over="ignore"):
                known &= values != values.dtype.type(no_data)
    elif no_data is not None and float(no_data).is_integer():
        limits = np.iinfo(values.dtype)
        if limits.min <= no_data <= limits.max:
            known = values != values.dtype.type(no_data)
    return known


def is_channels_first(shape: tuple[int, ...]) -> bool:
    """Return whether a shape is that of a few channels, followed by rows and columns.

    They are the shortest axis, of at most 64. Patches of many channels, such as 11 x 11 x 200 or
    40 x 50 x 200, are not taken for it: their first two axes are alike, and the last is far longer.
    """
    if len(shape) != 3 or shape[0] > MAX_FIRST_CHANNELS or shape[0] >= min(shape[1:]):
        return False
    first, second, last = shape
    return not (2 * first > second and last > 2 * second)


def check_shape(shape: tuple[int, ...], *, channels_last: bool = True) -> None:
    """Check that a shape is (height, width) or (height, width, channels).

    Args:
        shape: the shape.
        channels_last: whether to check the number of channels and that they are the last axis too.

    Raises:
        ArrayError: it is not.
    """
    text = "x".join(map(str, shape)) or "no axes"
    # The header's parser accepts True as 1, which nothing else does.
    if len(shape) not in (2, 3) or any(type(side) is bool or side < 1 for side in shape):
        raise ArrayError(f"its shape is {text}: it must be height x width (x channels)")
    if len(shape) == 2 or not channels_last:
        return
    if shape[2] > MAX_CHANNELS:
        raise ArrayError(f"its shape is {text}: that is more than {MAX_CHANNELS:,} channels")
    # No image has so few rows and so many channels, but every channel-first array does.
    if shape[0] <= 4 and shape[2] > 16:
        raise ArrayError(
            f"its shape is {text}: move its channels to the last axis, as "
            "`data-prep shard --channels-first` does"
        )
