"""Good pictures are opened whatever their size and metadata."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from data_prep.images.checking import RejectedImageError, check_image, read_pixels
from data_prep.images.opening import UnknownFormatError, load, open_picture
from data_prep.images.settings import Encoding
from data_prep.write.options import ShardOptions
from simmim.data.transforms.decoding import decode_pixels
from simmim.data.transforms.sampling import form_of

Draw = Callable[..., bytes]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body))


def _with_chunk(png: bytes, kind: bytes, body: bytes, *, last: bool = False) -> bytes:
    """Add a chunk before the pixels, or after them."""
    place = len(png) - 12 if last else png.index(b"IDAT") - 4
    return png[:place] + _chunk(kind, body) + png[place:]


def _packed(length: int) -> bytes:
    return zlib.compress(bytes(length))


@pytest.mark.parametrize("last", [False, True], ids=["before the pixels", "after them"])
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"zTXt", b"Comment\0\0" + _packed(2**21)),
        (b"zTXt", b"Comment\0\0" + _packed(2**28)),
        (b"iTXt", b"Comment\0\1\0\0\0" + _packed(2**22)),
        (b"iCCP", b"huge\0\0" + _packed(2**21)),
        (b"iCCP", b"unknown\0\7" + _packed(8)),
    ],
)
def test_metadata_of_a_png_never_refuse_it(
    kind: bytes, body: bytes, last: bool, draw_image: Draw
) -> None:
    plain = draw_image(0, image_format="PNG")
    data = _with_chunk(plain, kind, body, last=last)
    expected = read_pixels(plain, "png")
    assert check_image(data).data == data
    assert np.array_equal(read_pixels(data, "png"), expected)
    assert np.array_equal(decode_pixels(data, "png").pixels, expected)
    shrunk = check_image(data, encoding=Encoding(max_side=14))
    assert np.array_equal(
        read_pixels(shrunk.data, "png"),
        read_pixels(check_image(plain, encoding=Encoding(max_side=14)).data, "png"),
    )


def test_text_beyond_pillows_total_is_no_harm_either(draw_image: Draw) -> None:
    data = draw_image(0, image_format="PNG")
    for _ in range(66):
        data = _with_chunk(data, b"zTXt", b"Comment\0\0" + _packed(2**20 - 1))
    with pytest.raises(ValueError, match="Too much memory"):
        Image.open(io.BytesIO(data))
    assert check_image(data).data == data
    assert decode_pixels(data, "png").pixels.shape == (24, 28, 3)


def test_a_large_profile_survives_writing_anew(draw_image: Draw) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(2**21)
    body = b"wide\0\0" + zlib.compress(profile)
    data = _with_chunk(draw_image(0, image_format="PNG"), b"iCCP", body)
    checked = check_image(data, encoding=Encoding(format="webp"))
    with Image.open(io.BytesIO(checked.data)) as image:
        assert image.info["icc_profile"] == profile


def test_damaged_pixels_are_found_behind_large_text(draw_image: Draw) -> None:
    data = _with_chunk(draw_image(0, image_format="PNG"), b"zTXt", b"a\0\0" + _packed(2**21))
    middle = data.index(b"IDAT") + 20
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    with pytest.raises(RejectedImageError, match="IDAT"):
        check_image(flipped)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_a_limit_above_pillows_own_has_an_effect(
    image_format: str, draw_image: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    data = draw_image(0, image_format=image_format)
    pixels = 28 * 24
    checked = check_image(data, max_pixels=pixels)
    assert (checked.width, checked.height) == (28, 24)
    assert read_pixels(checked.data, checked.extension).shape[:2] == (24, 28)
    decoded = decode_pixels(data, image_format.lower(), max_pixels=pixels)
    assert decoded.pixels.shape == (24, 28, 3)
    assert ShardOptions(max_pixels=2**40).max_pixels == 2**40


def test_other_formats_are_named_as_such() -> None:
    for data in (b"", b"text", b"\x89PNG\r\n\x1a\n", PngImagePlugin._MAGIC + b"\0" * 40):
        with pytest.raises(UnknownFormatError):
            open_picture(data)


def test_what_is_opened_is_what_pillow_opens(draw_image: Draw) -> None:
    for image_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TGA", "PPM", "TIFF"):
        data = draw_image(0, image_format=image_format)
        with Image.open(io.BytesIO(data)) as expected, open_picture(data) as image:
            assert (image.format, image.mode, image.size) == (
                expected.format,
                expected.mode,
                expected.size,
            )
            assert np.array_equal(load(image, data), expected)


@pytest.mark.parametrize("packed", [False, True], ids=["raw", "packed"])
def test_a_tga_has_transparency_only_if_its_header_counts_its_bits(packed: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 4), dtype=np.uint8)
    pixels[..., 3] = 0
    buffer = io.BytesIO()
    compression = "tga_rle" if packed else None
    Image.fromarray(pixels).save(buffer, "TGA", compression=compression)
    data = bytearray(buffer.getvalue())
    assert (decode_pixels(bytes(data), "tga").pixels == 255).all()
    assert form_of(bytes(data), "tga", 10**6).channels == 4
    data[17] &= 0xF0
    for channels, expected in ((3, pixels[..., :3]), (4, np.maximum(pixels, (0, 0, 0, 255)))):
        found = decode_pixels(bytes(data), "tga", channels=channels).pixels
        assert np.array_equal(found, expected)
    checked = check_image(bytes(data))
    assert np.array_equal(read_pixels(checked.data, checked.extension), pixels[..., :3])
    assert form_of(bytes(data), "tga", 10**6).channels == 3
