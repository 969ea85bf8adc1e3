"""`.npy` images: headers are checked before reading, and values are kept."""

import io
import struct
import warnings

import numpy as np
import pytest

from data_prep.images.arrays import MAGIC, ArrayError, read_array, read_header
from data_prep.images.checking import RejectedImageError, check_image
from simmim.data.order.source import BadSampleError
from simmim.data.transforms.decoding import decode_pixels


def _save(values: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=allow_pickle)
    return buffer.getvalue()


def _forge(header: str) -> bytes:
    text = header.encode("latin1") + b" " * 16 + b"\n"
    return MAGIC + b"\1\0" + struct.pack("<H", len(text)) + text + bytes(64)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1), (6, 5, 13)])
def test_plain_arrays_are_kept_byte_for_byte(dtype: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    data = _save(values)
    checked = check_image(data)
    assert (checked.data, checked.extension) == (data, "npy")
    assert (checked.height, checked.width) == shape[:2]
    assert np.array_equal(read_array(data), values)
    assert read_header(data).channels == (shape[2] if len(shape) == 3 else 1)


@pytest.mark.parametrize(
    "values",
    [
        np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
        np.arange(24, dtype=">u2").reshape(2, 3, 4),
    ],
    ids=["by columns", "big-endian"],
)
def test_other_orders_are_rewritten_with_the_same_values(values: np.ndarray) -> None:
    checked = check_image(_save(values))
    assert read_header(checked.data).is_plain
    assert np.array_equal(np.load(io.BytesIO(checked.data), allow_pickle=False), values)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros(7, dtype=np.uint8), "its shape is 7"),
        (np.zeros((1, 2, 3, 4), dtype=np.uint8), "its shape is 1x2x3x4"),
        (np.zeros((0, 5), dtype=np.uint8), "its shape is 0x5"),
        (np.zeros((3, 40, 50), dtype=np.uint8), "--channels-first"),
        (np.zeros((5, 5, 1025), dtype=np.uint8), "more than 1,024 channels"),
        (np.zeros((4, 5), dtype=np.complex64), "type complex64.*astype"),
        (np.zeros((4, 5), dtype=[("a", "u1")]), "type"),
        (np.full((4, 5), np.inf, dtype=np.float16), "20 of its 20 values are infinite"),
        (np.full((4, 5), np.nan, dtype=np.float64), "all of its values are NaN"),
    ],
)
def test_invalid_images_are_rejected(values: np.ndarray, reason: str) -> None:
    with pytest.raises(RejectedImageError, match=reason):
        check_image(_save(values))


def test_objects_are_never_unpickled() -> None:
    data = _save(np.array([[print]], dtype=object), allow_pickle=True)
    with pytest.raises(RejectedImageError, match="type object"):
        check_image(data)


@pytest.mark.parametrize(
    "shape", ["(99999999, 99999999)", "(2, 10**9)", "(-1, 5)", "(True, 64)", "(8, 8.0)", "8"]
)
def test_hostile_shapes_are_refused_before_allocation(shape: str) -> None:
    data = _forge(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}")
    with pytest.raises(ArrayError):
        read_array(data)


def test_cut_and_overlong_files_are_refused() -> None:
    data = _save(np.zeros((4, 5), dtype=np.uint16))
    for wrong, reason in ((data[:-1], "is truncated"), (data + b"\0", "longer than its header")):
        with pytest.raises(ArrayError, match=reason):
            read_array(wrong)
    for length in range(len(data)):
        with pytest.raises(ArrayError):
            read_array(data[:length])


def test_missing_values_are_noted_and_size_is_limited() -> None:
    values = np.ones((4, 5, 2), dtype=np.float32)
    values[1, 2] = np.nan
    assert check_image(_save(values)).notes == ("NaN values",)
    with pytest.raises(RejectedImageError, match="5x4 pixels, more than --max-pixels 19"):
        check_image(_save(values), max_pixels=19)


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "float32"])
@pytest.mark.parametrize(
    "shape", [(5, 224, 224), (1, 30, 20), (3, 16, 12), (13, 64, 64), (2, 9, 200), (4, 32, 17)]
)
def test_few_channels_in_front_are_recognised_and_moved(shape: tuple[int, ...], dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    for axis in ("auto", "first"):
        checked = check_image(_save(values), channel_axis=axis)
        assert checked.notes == ("channels moved to the last axis",)
        assert (checked.height, checked.width) == shape[1:]
        assert read_header(checked.data).is_plain
        assert np.array_equal(read_array(checked.data), values.transpose(1, 2, 0))
        again = check_image(checked.data, channel_axis="auto")
        assert (again.data, again.notes) == (checked.data, ())


@pytest.mark.parametrize(
    "shape", [(6, 5, 13), (224, 224, 5), (200, 64, 64), (40, 50, 200), (3, 200, 3)]
)
def test_other_shapes_are_taken_as_they_are_unless_told(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 200, shape).astype(np.uint8)
    data = _save(values)
    for axis in ("auto", "last"):
        assert check_image(data, channel_axis=axis).data == data
    moved = read_array(check_image(data, channel_axis="first").data)
    assert np.array_equal(moved, values.transpose(1, 2, 0) if len(shape) == 3 else values)


def test_moved_channels_keep_to_the_limits() -> None:
    values = np.zeros((5, 30, 40), dtype=np.uint8)
    assert check_image(_save(values), max_pixels=1200, channel_axis="auto").width == 40
    with pytest.raises(RejectedImageError, match="40x30 pixels"):
        check_image(_save(values), max_pixels=1199, channel_axis="auto")
    with pytest.raises(RejectedImageError, match=r"more than 1,024 channels"):
        check_image(_save(np.zeros((1025, 3, 4), dtype=np.uint8)), channel_axis="first")
    values = np.full((5, 30, 40), np.nan, dtype=np.float32)
    with pytest.raises(RejectedImageError, match="all of its values are NaN"):
        check_image(_save(values), channel_axis="auto")


@pytest.mark.parametrize("size", [(60, 70), (64, 64), (48, 48), (47, 70), (40, 90), (200, 13)])
def test_arrays_of_one_kind_are_read_alike_whatever_their_size(size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).random((12, *size), dtype=np.float32)
    checked = check_image(_save(values), channel_axis="auto")
    assert read_header(checked.data).channels == 12
    assert checked.notes == ("channels moved to the last axis",)


def test_square_patches_of_many_channels_are_kept_and_pointed_out() -> None:
    data = _save(np.zeros((11, 11, 200), dtype=np.uint16))
    checked = check_image(data, channel_axis="auto")
    assert checked.data == data
    assert "not the shortest" in checked.notes[0]
    assert check_image(data, channel_axis="last").notes == ()


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        ("int8", "float32"),
        (">i2", "float32"),
        ("int32", "float64"),
        ("uint32", "float64"),
        (">i8", "float64"),
        ("uint64", "float64"),
        ("bool", "uint8"),
    ],
)
def test_other_types_are_converted_as_in_tiff(kind: str, stored: str) -> None:
    rng = np.random.default_rng(0)
    limit = np.iinfo(kind) if kind != "bool" else None
    low, high = (0, 1) if limit is None else (max(limit.min, -(2**53)), min(limit.max, 2**53))
    values = rng.integers(low, high, (9, 11, 2), endpoint=True, dtype=np.int64).astype(kind)
    values[0, 0] = low, high
    expected = values.astype(np.float64) * (255 if kind == "bool" else 1)
    data = _save(values)
    checked = check_image(data)
    found = np.load(io.BytesIO(checked.data), allow_pickle=False)
    assert found.dtype == stored
    assert np.array_equal(found, expected)
    assert any(f"converted to {stored}" in note for note in checked.notes)
    trained = decode_pixels(data, "npy", channels=2).pixels
    assert trained.dtype == stored
    assert np.array_equal(trained, expected)


def test_integers_beyond_float64_are_refused_with_a_remedy() -> None:
    data = _save(np.full((4, 5), 2**53 + 1, dtype=np.int64))
    with pytest.raises(RejectedImageError, match=r"9,007,199,254,740,993.*float64"):
        check_image(data)
    with pytest.raises(BadSampleError, match=r"9,007,199,254,740,993"):
        decode_pixels(data, "npy", channels=1)


def test_headers_of_python_2_are_read_in_silence() -> None:
    data = _forge("{'descr': '|u1', 'fortran_order': False, 'shape': (8L, 8L)}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_image(data).width == 8
        assert decode_pixels(data, "npy", channels=1).pixels.shape == (8, 8, 1)
