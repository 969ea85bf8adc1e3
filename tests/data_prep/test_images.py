"""Images are kept as they are where they can be, rewritten without loss, or rejected by name."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep.images import RejectedImageError, check_image


def _save(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def _pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("image_format", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")]
)
@pytest.mark.parametrize("decode", [True, False])
def test_common_formats_are_kept_byte_for_byte(
    image_format: str, extension: str, decode: bool
) -> None:
    data = _save(Image.fromarray(_pixels(5, 9, 3)), image_format)
    checked = check_image(data, decode=decode)
    assert checked.data == data
    assert (checked.extension, checked.width, checked.height) == (extension, 9, 5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("image_format", ["TIFF", "GIF", "BMP", "TGA", "PPM"])
def test_other_formats_are_rewritten_without_loss(mode: str, image_format: str) -> None:
    original = Image.fromarray(_pixels(6, 7, 4)).convert(mode)
    try:
        data = _save(original, image_format)
    except OSError:
        pytest.skip(f"{image_format} has no mode {mode}")
    checked = check_image(data)
    assert checked.extension == "png"
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(checked.data)) as after:
        assert np.array_equal(before.convert("RGBA"), after.convert("RGBA"))


def test_sixteen_bits_survive() -> None:
    values = np.arange(0, 65_536, 1024, dtype=np.uint16).reshape(8, 8)
    checked = check_image(_save(Image.fromarray(values), "TIFF"))
    with Image.open(io.BytesIO(checked.data)) as image:
        assert np.array_equal(np.asarray(image, dtype=np.int64), values)
    wide = Image.fromarray(values.astype(np.int32))
    checked = check_image(_save(wide, "TIFF"))
    with Image.open(io.BytesIO(checked.data)) as image:
        assert np.array_equal(np.asarray(image, dtype=np.int64), values)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(_pixels(4, 4, 3)).convert("CMYK"),
        Image.fromarray(np.ones((4, 4), dtype=np.float32)),
        Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)),
    ],
)
def test_what_png_cannot_hold_is_rejected(image: Image.Image) -> None:
    with pytest.raises(RejectedImageError, match=f"mode {image.mode}"):
        check_image(_save(image, "TIFF"))


def test_a_cut_jpeg_is_rejected_only_when_decoded() -> None:
    data = _save(Image.fromarray(_pixels(64, 64, 3)), "JPEG")[:-800]
    with pytest.raises(RejectedImageError, match="does not decode"):
        check_image(data)
    assert check_image(data, decode=False).width == 64


@pytest.mark.parametrize("data", [b"", b"some text", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_rejected(data: bytes) -> None:
    with pytest.raises(RejectedImageError):
        check_image(data)


def test_a_bomb_is_rejected_by_its_header() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(RejectedImageError, match=r"pixels"):
        check_image(bomb)
    small = _save(Image.fromarray(_pixels(10, 11, 3)), "PNG")
    assert check_image(small, max_pixels=110).width == 11
    with pytest.raises(RejectedImageError, match="11x10 pixels, more than --max-pixels 109"):
        check_image(small, max_pixels=109)


def test_orientation_of_a_rewritten_image_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    checked = check_image(_save(Image.fromarray(_pixels(5, 9, 3)), "TIFF", exif=exif))
    assert (checked.width, checked.height) == (5, 9)
