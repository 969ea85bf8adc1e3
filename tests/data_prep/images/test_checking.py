"""Images are kept, re-encoded without loss, or rejected with a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep.images.checking import RejectedImageError, check_image
from data_prep.images.settings import Encoding


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


@pytest.mark.parametrize("image_format", ["GIF", "AVIF"])
def test_the_first_frame_of_an_animation_is_noted(image_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    if image_format.lower() not in {
        name.lower() for name in Image.registered_extensions().values()
    }:
        pytest.skip(f"Pillow was built without {image_format}")
    animated = _save(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert "first of several frames" in check_image(animated).notes
    assert "first of several frames" not in check_image(_save(frames[0], image_format)).notes


def test_sixteen_bits_survive() -> None:
    values = np.arange(0, 65_536, 1024, dtype=np.uint16).reshape(8, 8)
    checked = check_image(_save(Image.fromarray(values), "TIFF"))
    with Image.open(io.BytesIO(checked.data)) as image:
        assert np.array_equal(np.asarray(image, dtype=np.int64), values)
    wide = Image.fromarray(values.astype(np.int32))
    checked = check_image(_save(wide, "TIFF"))  # by its type, whatever the values
    assert np.array_equal(np.load(io.BytesIO(checked.data), allow_pickle=False), values)


@pytest.mark.parametrize(
    "values",
    [np.linspace(-1, 3, 20, dtype=np.float32), np.arange(20, dtype=np.int32) * 40_000_000],
    ids=["float", "32 bits"],
)
def test_values_that_only_an_array_can_hold_become_one(values: np.ndarray) -> None:
    checked = check_image(_save(Image.fromarray(values.reshape(4, 5)), "TIFF"))
    assert (checked.extension, checked.width, checked.height) == ("npy", 5, 4)
    stored = np.load(io.BytesIO(checked.data), allow_pickle=False)
    assert np.array_equal(stored, values.reshape(4, 5))


def test_cmyk_is_kept_as_jpeg_and_becomes_rgb_elsewhere() -> None:
    image = Image.fromarray(_pixels(16, 16, 3)).convert("CMYK")
    data = _save(image, "JPEG")
    assert check_image(data).data == data
    checked = check_image(_save(image, "TIFF"))
    assert "CMYK converted to RGB" in checked.notes
    with Image.open(io.BytesIO(checked.data)) as stored:
        assert stored.mode == "RGB"
        assert np.array_equal(np.asarray(stored), np.asarray(image.convert("RGB")))


def _deep_ppm() -> bytes:
    return b"P6 3 2 # deep\n65535\n" + np.arange(18, dtype=">u2").tobytes()


def _deep_png() -> bytes:
    rows = b"".join(b"\0" + np.arange(9, dtype=">u2").tobytes() for _ in range(2))
    header = struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)
    return _png(header, zlib.compress(rows))


def _png(header: bytes, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_16_bit_colour_is_kept_or_rejected_unless_8_bits_are_accepted() -> None:
    deep = _deep_png()
    assert check_image(deep).data == deep
    with pytest.raises(RejectedImageError, match="16 bits"):
        check_image(deep, encoding=Encoding(max_side=2))
    with pytest.raises(RejectedImageError, match="16 bits"):
        check_image(_deep_ppm())
    checked = check_image(_deep_ppm(), encoding=Encoding(format="jpeg"))
    assert "16 bits cut to 8" in checked.notes


def test_a_cut_jpeg_is_rejected_only_when_decoded() -> None:
    data = _save(Image.fromarray(_pixels(64, 64, 3)), "JPEG")[:-800]
    with pytest.raises(RejectedImageError, match="cannot be decoded"):
        check_image(data)
    assert check_image(data, decode=False).width == 64


@pytest.mark.parametrize("data", [b"", b"some text", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_invalid_images_are_rejected(data: bytes) -> None:
    with pytest.raises(RejectedImageError):
        check_image(data)


def test_a_bomb_is_rejected_by_its_header() -> None:
    bomb = _png(struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), b"")
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
