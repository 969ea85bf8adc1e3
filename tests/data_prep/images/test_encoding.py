"""Re-encoding: only if needed, upright, of the right size, deterministic."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from data_prep.images.checking import CheckedImage, check_image, read_pixels
from data_prep.images.encoding import encode
from data_prep.images.settings import Encoding

DrawImage = Callable[..., bytes]
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _save(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def _open(checked: CheckedImage) -> Image.Image:
    image = Image.open(io.BytesIO(checked.data))
    image.load()
    assert image.size == (checked.width, checked.height)
    return image


@pytest.mark.parametrize(
    ("limits", "size", "expected"),
    [
        ({"max_side": 50}, (100, 40), (50, 20)),
        ({"max_side": 50}, (40, 100), (20, 50)),
        ({"max_side": 100}, (100, 40), (100, 40)),
        ({"short_side": 20}, (101, 40), (51, 20)),
        ({"short_side": 20, "max_side": 40}, (100, 40), (40, 16)),
        ({"short_side": 10, "max_side": 40}, (100, 40), (25, 10)),
        ({"max_side": 10}, (1000, 3), (10, 1)),
        ({"short_side": 256}, (64, 32), (64, 32)),
    ],
)
def test_sizes(limits: dict[str, int], size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert Encoding(**limits).target_size(*size) == expected


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="--max-side is 0; it must be 1 or more"):
        Encoding(max_side=0)
    with pytest.raises(ValueError, match="--format must be one of"):
        Encoding(format="gif")
    with pytest.raises(ValueError, match="--quality is 101; it must be from 1 to 100"):
        Encoding(quality=101)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_bytes_are_kept_if_nothing_changes(image_format: str, draw_image: DrawImage) -> None:
    data = draw_image(0, image_format=image_format)
    same = Encoding(max_side=28, short_side=24, format=image_format.lower(), quality=10)
    assert check_image(data, encoding=same).data == data


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("target", ["keep", "jpeg", "png", "webp"])
def test_shrinking_keeps_or_changes_the_format_and_is_deterministic(
    image_format: str, target: str, draw_image: DrawImage
) -> None:
    data = draw_image(0, image_format=image_format, size=60)
    encoding = Encoding(max_side=32, format=target)
    checked = check_image(data, encoding=encoding)
    own = {"JPEG": "jpeg", "WEBP": "webp"}.get(image_format, "png")
    with _open(checked) as image:
        assert image.size == (32, 30)
        assert image.format == (own if target == "keep" else target).upper()
    assert check_image(data, encoding=encoding) == checked
    assert "written anew" in checked.notes


def test_resizing_is_antialiased(draw_image: DrawImage) -> None:
    lines = np.zeros((64, 64), dtype=np.uint8)
    lines[:, ::2] = 255
    checked = check_image(_save(Image.fromarray(lines), "PNG"), encoding=Encoding(max_side=16))
    with _open(checked) as image:
        middle = np.asarray(image)[2:-2, 2:-2].astype(float)
    assert np.abs(middle - 127.5).max() < 3


def test_quality_decides_size_and_colour_resolution(draw_image: DrawImage) -> None:
    data = draw_image(0, image_format="PNG", size=64)
    for quality, sampling in ((95, (1, 1)), (90, (1, 1)), (89, (2, 2))):
        checked = check_image(data, encoding=Encoding(format="jpeg", quality=quality))
        with _open(checked) as image:
            assert image.layer[0][1:3] == sampling  # type: ignore[attr-defined]


def test_noise_at_full_quality_fits_into_the_buffer(draw_image: DrawImage) -> None:
    before = ImageFile.MAXBLOCK
    for quality in (90, 94, 100):
        pixels = np.random.default_rng(0).integers(0, 256, (700, 600, 3), dtype=np.uint8)
        encoded = encode(Image.fromarray(pixels), "jpeg", Encoding(quality=quality))
        with Image.open(io.BytesIO(encoded.data)) as image:
            image.load()
    assert before == ImageFile.MAXBLOCK


def test_orientation_is_applied_and_the_profile_kept() -> None:
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 20:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise: the right half comes to lie below
    data = _save(
        Image.fromarray(pixels), "JPEG", exif=exif, icc_profile=PROFILE, quality=95, subsampling=0
    )
    assert check_image(data).data == data
    for target in ("keep", "png", "webp"):
        checked = check_image(data, encoding=Encoding(max_side=30, format=target))
        with _open(checked) as image:
            assert image.size == (15, 30)
            upright = np.asarray(image.convert("L"))
            assert upright[:12].max() < 60 < 200 < upright[18:].min()
            assert image.info["icc_profile"] == PROFILE
            assert not image.getexif().get(0x0112)


def test_transparency_is_laid_on_white_in_jpeg_and_kept_elsewhere() -> None:
    pixels = np.zeros((16, 16, 4), dtype=np.uint8)
    pixels[:8, :, 3] = 255  # black above, nothing below
    data = _save(Image.fromarray(pixels), "PNG")
    checked = check_image(data, encoding=Encoding(format="jpeg"))
    assert "transparency laid on white" in checked.notes
    with _open(checked) as image:
        grey = np.asarray(image.convert("L"))
        assert grey[:7].max() < 20
        assert grey[9:].min() > 235
    for target in ("keep", "webp"):
        with _open(check_image(data, encoding=Encoding(max_side=8, format=target))) as image:
            assert image.mode == "RGBA"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
@pytest.mark.parametrize("target", ["jpeg", "png", "webp"])
def test_every_mode_can_be_written(mode: str, target: str) -> None:
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8))
    if mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(rgb, ImageCms.createProfile("sRGB"), lab, outputMode=mode)
        assert image is not None
    else:
        image = rgb.convert(mode)
    encoded = encode(image, target, Encoding(max_side=12, format=target))
    with Image.open(io.BytesIO(encoded.data)) as written:
        written.load()
        assert (written.size, written.format) == ((10, 12), target.upper())


def test_grey_of_16_bits_stays_or_is_rounded() -> None:
    values = np.linspace(0, 65_535, 32 * 32).round().astype(np.uint16).reshape(32, 32)
    data = _save(Image.fromarray(values), "PNG")
    with _open(check_image(data, encoding=Encoding(max_side=16))) as image:
        assert image.mode == "I;16"
        small = np.asarray(image).astype(float)
    means = values.reshape(16, 2, 16, 2).mean(axis=(1, 3))
    assert np.abs(small - means)[2:-2, 2:-2].max() < 100
    checked = check_image(data, encoding=Encoding(format="webp", quality=100))
    assert "16 bits rounded to 8" in checked.notes
    with _open(checked) as image:
        assert np.abs(np.asarray(image.convert("L")) - values / 257).max() < 3


def test_a_lossless_webp_stays_so() -> None:
    image = Image.new("RGB", (40, 40), (250, 3, 77))
    data = _save(image, "WEBP", lossless=True)
    with _open(check_image(data, encoding=Encoding(max_side=20))) as small:
        assert small.getcolors() == [(400, (250, 3, 77))]


def test_damaged_exif_does_not_reject_a_picture(draw_image: DrawImage) -> None:
    with Image.open(io.BytesIO(draw_image(0))) as image:
        image.load()
        image.info["exif"] = b"Exif\0\0MM\0*\xff\xff\xff\xff"
        data = _save(image, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3")
        encoded = encode(image, "png", Encoding(max_side=14))
    assert (encoded.width, encoded.height) == (14, 12)
    assert read_pixels(data, "png").shape == (24, 28, 3)
