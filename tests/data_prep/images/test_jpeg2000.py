"""JPEG 2000: depth, sign, and what its components are."""

import io

import numpy as np
import pytest
from PIL import Image

from data_prep.images.checking import RejectedImageError, check_image, read_pixels
from data_prep.images.settings import Encoding
from simmim.data.order.source import BadSampleError, DataError
from simmim.data.transforms.decoding import decode_pixels
from simmim.data.transforms.sampling import ImageForm, form_of
from tests.data_prep.images.jpeg2000_files import encode_jpeg2000, with_cdef


def _levels(bits: int) -> np.ndarray:
    levels = np.linspace(0, 2**bits - 1, 32 * 32).round().astype(np.uint16)
    return levels.reshape(32, 32)


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_jpeg_2000_keeps_values_of_any_depth(bits: int) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    values = np.random.default_rng(0).integers(0, 2**bits, (32, 40), dtype=np.uint16)
    for codec in ("jp2", "j2k"):
        data = imagecodecs.jpeg2k_encode(
            values, codecformat=codec, bitspersample=bits, reversible=True, level=0
        )
        checked = check_image(bytes(data))
        assert np.array_equal(read_pixels(checked.data, "png")[..., 0], values)


def test_grey_of_9_bits_in_jp2_is_the_same_in_training() -> None:
    data = encode_jpeg2000(_levels(9), 9, codecformat="jp2")
    with pytest.raises(RejectedImageError, match="9 bits"):
        check_image(data)
    with pytest.raises(BadSampleError, match="9 bits"):
        decode_pixels(data, "jp2", channels=1)


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_white_in_colour_jpeg_2000_does_not_wrap_to_black(bits: int) -> None:
    values = np.stack([_levels(bits)] * 3, axis=2)
    checked = check_image(
        encode_jpeg2000(values, bits), encoding=Encoding(format="jpeg", quality=100)
    )
    assert f"{bits} bits cut to 8" in checked.notes
    shown = read_pixels(checked.data, "jpg").astype(float)
    assert np.abs(shown - values * (255 / (2**bits - 1))).max() < 4


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", range(1, 9))
def test_jpeg_2000_of_few_bits_is_scaled_to_white(bits: int, bands: int) -> None:
    shape = (32, 40) if bands == 1 else (32, 40, bands)
    values = np.random.default_rng(0).integers(0, 2**bits, shape, dtype=np.uint8)
    data = encode_jpeg2000(values, bits, codecformat="jp2")
    expected = np.rint(values * (255 / (2**bits - 1))).astype(np.uint8)
    checked = check_image(data)
    if checked.extension == "npy":
        assert bands in (2, 4)
        assert np.array_equal(read_pixels(checked.data, "npy"), expected)
        opacity = [*((band, 0, band + 1) for band in range(bands - 1)), (bands - 1, 1, 0)]
        data = with_cdef(data, opacity)
        checked = check_image(data)
    with Image.open(io.BytesIO(checked.data)) as image:
        assert np.array_equal(np.asarray(image), expected)
    if bands != 2:
        assert np.array_equal(decode_pixels(data, "jp2", channels=bands).pixels.squeeze(), expected)


@pytest.mark.parametrize("bands", [2, 4])
@pytest.mark.parametrize("codec", ["jp2", "j2k"])
def test_a_band_of_jpeg_2000_is_alpha_only_if_the_file_says_so(codec: str, bands: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, (32, 40, bands), dtype=np.uint8)
    data = encode_jpeg2000(values, 8, codecformat=codec)
    checked = check_image(data)
    assert np.array_equal(read_pixels(checked.data, checked.extension), values)
    assert np.array_equal(decode_pixels(data, "jp2", channels=bands).pixels, values)
    assert form_of(data, "jp2", 10**6) == ImageForm(bands, "uint8")
    with pytest.raises(DataError, match=f"has {bands} channels"):
        decode_pixels(data, "jp2", channels=3)
    deep = encode_jpeg2000(values.astype(np.uint16) << 4, 12, codecformat=codec)
    with pytest.raises(RejectedImageError, match="not called alpha"):
        check_image(deep, encoding=Encoding(format="jpeg"))


def test_cmyk_in_jpeg_2000_is_a_colour_picture() -> None:
    values = np.random.default_rng(0).integers(0, 256, (32, 40, 4), dtype=np.uint8)
    image, buffer = Image.fromarray(values, "CMYK"), io.BytesIO()
    image.save(buffer, "JPEG2000")
    expected = np.asarray(image.convert("RGB"))
    checked = check_image(buffer.getvalue())
    assert np.array_equal(read_pixels(checked.data, checked.extension), expected)


@pytest.mark.parametrize(
    ("channels", "found"),
    [
        ([(0, 0, 3), (1, 0, 2), (2, 0, 1), (3, 1, 0)], "another order"),
        ([(0, 1, 0), (1, 0, 1), (2, 0, 2), (3, 0, 3)], "alpha before colours"),
        ([(0, 0, 1), (1, 0, 2), (2, 0, 3), (3, 2, 0)], "multiplied by alpha"),
    ],
)
def test_odd_channels_of_jpeg_2000_are_refused_by_name(
    channels: list[tuple[int, int, int]], found: str
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (32, 40, 4), dtype=np.uint8)
    data = with_cdef(encode_jpeg2000(values, 8, codecformat="jp2"), channels)
    with pytest.raises(RejectedImageError, match=found):
        check_image(data)
    with pytest.raises(BadSampleError, match=found):
        decode_pixels(data, "jp2", channels=3)


@pytest.mark.parametrize(("number", "name"), [(14, "CIELab"), (11, "CMY"), (3, "YCbCr")])
def test_colours_that_would_be_taken_for_rgb_are_refused(number: int, name: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG2000")
    rgb, other = (b"colr\1\0\0" + colours.to_bytes(4, "big") for colours in (16, number))
    data = buffer.getvalue().replace(rgb, other)
    with pytest.raises(RejectedImageError, match=f"JPEG 2000 in {name}"):
        check_image(data)
    with pytest.raises(BadSampleError, match=f"JPEG 2000 in {name}"):
        decode_pixels(data, "jp2", channels=3)


@pytest.mark.parametrize("kind", ["int8", "int16"])
def test_signed_jpeg_2000_is_refused_by_name(kind: str) -> None:
    values = np.random.default_rng(0).integers(-100, 100, (32, 40)).astype(kind)
    data = encode_jpeg2000(values, 8 * values.itemsize)
    with pytest.raises(RejectedImageError, match=r"JPEG 2000 with signed values.*\.npy"):
        check_image(data)
    with pytest.raises(BadSampleError, match=r"JPEG 2000 with signed values.*\.npy"):
        decode_pixels(data, "jp2", channels=1)
