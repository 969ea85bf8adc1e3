"""JPEG headers read without Pillow give what Pillow gives."""

import io
import random
import warnings
from collections.abc import Callable

import pytest
import simplejpeg
from PIL import Image, ImageCms, UnidentifiedImageError

from data_prep.images.checking import RejectedImageError, check_image
from data_prep.images.headers import plain_jpeg_size

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _jpegs() -> list[bytes]:
    files = []
    for mode, options in (
        ("RGB", {}),
        ("L", {"quality": 30}),
        ("RGB", {"progressive": True, "comment": b"a picture", "dpi": (72, 72)}),
        ("RGB", {"icc_profile": PROFILE, "optimize": True, "restart_marker_blocks": 1}),
    ):
        buffer = io.BytesIO()
        Image.new(mode, (37, 19)).save(buffer, "JPEG", **options)
        files.append(buffer.getvalue())
    return files


def _pillow_size(data: bytes) -> tuple[int, int] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                return image.size if image.mode in ("L", "RGB") else None
        except (UnidentifiedImageError, Image.DecompressionBombError):
            return None


@pytest.mark.parametrize("data", _jpegs())
def test_ordinary_files_are_plain(data: bytes) -> None:
    assert plain_jpeg_size(data) == (37, 19)
    for stop in range(data.index(b"\xff\xda") + 4):
        assert plain_jpeg_size(data[:stop]) is None


@pytest.mark.parametrize("data", _jpegs())
def test_pillow_agrees_on_every_damaged_header_that_is_plain(data: bytes) -> None:
    draw = random.Random(0)
    header = data.index(b"\xff\xda") + 10
    taken = 0
    for _ in range(1500):
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(header)
            match draw.randrange(3):
                case 0:
                    damaged[place] = draw.choice((0, 1, 2, 0xFF, draw.randrange(256)))
                case 1:
                    damaged[place:place] = draw.randbytes(draw.randint(1, 4))
                case 2:
                    del damaged[place : place + draw.randint(1, 4)]
        size = plain_jpeg_size(bytes(damaged))
        if size is not None and size[0] * size[1] < Image.MAX_IMAGE_PIXELS:
            taken += 1
            assert size == _pillow_size(bytes(damaged))
    assert taken > 100


def test_other_headers_are_left_to_pillow(draw_image: Callable[..., bytes]) -> None:
    plain = _jpegs()[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", exif=exif)
    for data in (b"", plain[:3], buffer.getvalue(), draw_image(0, image_format="PNG")):
        assert plain_jpeg_size(data) is None
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(buffer, "JPEG")
    assert plain_jpeg_size(buffer.getvalue()) is None


def test_headers_that_only_libjpeg_accepts_are_not_plain() -> None:
    plain = _jpegs()[0]
    tables, frame = plain.index(b"\xff\xdb"), plain.index(b"\xff\xc0")
    twelve_bits = plain[: frame + 4] + b"\x0c" + plain[frame + 5 :]
    short_adobe = plain[:tables] + b"\xff\xee\x00\x08Adobe\0" + plain[tables:]
    stray_marker = plain[:tables] + b"\xff\x01" + plain[tables:]
    for data in (twelve_bits, short_adobe, stray_marker):
        assert simplejpeg.decode_jpeg_header(data)[:2] == (19, 37)
        assert _pillow_size(data) is None
        assert plain_jpeg_size(data) is None
        with pytest.raises(RejectedImageError):
            check_image(data, decode=False)


def test_limits_hold_without_pillow() -> None:
    data = _jpegs()[0]
    assert check_image(data, decode=False).width == 37
    with pytest.raises(RejectedImageError, match="37x19 pixels, more than --max-pixels 700"):
        check_image(data, max_pixels=700, decode=False)
    frame = data.index(b"\xff\xc0") + 5
    forged = data[:frame] + b"\xfd\xe8\xfd\xe8" + data[frame + 4 :]
    assert plain_jpeg_size(forged) == (65000, 65000)
    with pytest.raises(RejectedImageError, match="65000x65000 pixels"):
        check_image(forged)
    with pytest.raises(RejectedImageError, match="cannot be decoded"):
        check_image(data[: len(data) // 2 + 200])
