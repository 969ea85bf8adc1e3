import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from simmim.data.order.source import DataError
from simmim.data.transforms.decoding import ORIENTATIONS, decode_pillow, to_mode

CORNERS = np.kron(
    np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]]), np.ones((8, 12, 1))
).astype(np.uint8)
"""Red, green / blue, white: no two orientations look alike."""


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises much and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("L", "JPEG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGB", "PNG"),
        ("RGB", "JPEG"),
        ("RGB", "WEBP"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("LAB", "TIFF"),
        ("I;16", "PNG"),
        ("I", "TIFF"),
        ("F", "TIFF"),
        ("P", "GIF"),
    ],
)
def test_every_mode_is_converted_to_the_channels(mode: str, form: str, channels: int) -> None:
    grey = Image.fromarray(np.arange(0, 240, dtype=np.uint8).reshape(12, 20))
    match mode:
        case "I;16":
            image = Image.fromarray(pixels(grey).astype(np.uint16) * 257)
        case "LAB":
            image = Image.merge("LAB", [grey, *[Image.new("L", grey.size, 128)] * 2])
        case _:
            image = grey.convert("RGB").convert(mode)
    decoded = decode_pillow(saved(image, form), channels=channels)
    assert decoded.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    assert decoded.size == (20, 12)
    if mode != "1":
        tolerance = 40 if mode in ("LAB", "P") else 12
        assert np.abs(pixels(decoded.convert("L")) - pixels(grey)).max() <= tolerance


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "PA", "La", "RGBa", "RGBX"])
@pytest.mark.parametrize("wanted", ["L", "RGB", "RGBA"])
def test_rare_modes(mode: str, wanted: str) -> None:
    grey = Image.fromarray(np.arange(0, 240, dtype=np.uint8).reshape(12, 20))
    by_way_of = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode, "RGB")
    converted = to_mode(grey.convert(by_way_of).convert(mode), wanted)
    assert converted.mode == wanted
    assert np.abs(pixels(converted.convert("L")) - pixels(grey)).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_images_are_turned_upright(orientation: int, form: str) -> None:
    upright = Image.fromarray(CORNERS)
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    stored = upright.transpose(ORIENTATIONS[inverse]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if form == "PNG" else {"quality": 95}
    decoded = decode_pillow(saved(stored, form, exif=exif, **options))
    assert decoded.size == upright.size
    difference = np.abs(pixels(decoded) - pixels(upright))
    assert difference.mean() < 8
    assert difference[3, 3].max() < 30


def test_grey_of_16_bits_is_scaled_by_its_full_range() -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    decoded = pixels(decode_pillow(saved(Image.fromarray(ramp)), channels=1))
    assert np.array_equal(decoded.ravel(), np.arange(256))
    dark = decode_pillow(saved(Image.fromarray(np.full((4, 4), 300, dtype=np.uint16))), channels=1)
    assert pixels(dark).max() == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 100, 255]], dtype=np.int32), [0, 100, 255]),
        (np.array([[0, 32768, 65535]], dtype=np.int32), [0, 128, 255]),
        (np.array([[-100, -50, 100]], dtype=np.int32), [0, 64, 255]),
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0.0, 51.0, 255.0]], dtype=np.float32), [0, 51, 255]),
        (np.array([[0.0, np.nan, 1.0]], dtype=np.float32), [0, 0, 255]),
        (np.array([[7e9, 7e9, 7e9]], dtype=np.float32), [0, 0, 0]),
    ],
)
def test_wide_values_are_scaled_not_clipped(values: np.ndarray, expected: list[int]) -> None:
    decoded = pixels(decode_pillow(saved(Image.fromarray(values), "TIFF"), channels=1))
    assert decoded[0].tolist() == expected


def test_transparent_parts_become_white() -> None:
    colour = np.zeros((8, 8, 4), dtype=np.uint8)
    colour[..., 0], colour[:4, :, 3] = 200, 255
    decoded = pixels(decode_pillow(saved(Image.fromarray(colour))))
    assert decoded[0, 0].tolist() == [200, 0, 0]
    assert decoded[7, 7].tolist() == [255, 255, 255]
    kept = pixels(decode_pillow(saved(Image.fromarray(colour)), channels=4))
    assert kept[7, 7, 3] == 0

    palette = Image.fromarray(np.repeat([[0], [1]], 4, axis=1).astype(np.uint8), mode=None)
    palette = palette.convert("P")
    palette.putpalette([200, 0, 0, 0, 0, 200])
    seen = pixels(decode_pillow(saved(palette, transparency=0)))
    assert seen[0, 0].tolist() == [255, 255, 255]
    assert seen[1, 0].tolist() == [0, 0, 200]

    keyed = Image.fromarray(CORNERS)
    seen = pixels(decode_pillow(saved(keyed, transparency=(255, 0, 0))))
    assert seen[0, 0].tolist() == [255, 255, 255]
    assert seen[0, -1].tolist() == [0, 255, 0]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"this is a text file, whatever its name says\n",
        saved(Image.fromarray(CORNERS), "JPEG")[:-80],
        saved(Image.fromarray(CORNERS), "PNG")[:60],
        saved(Image.fromarray(CORNERS), "WEBP")[:40],
        png_header(16, 16),
    ],
)
def test_damaged_images_are_reported(data: bytes) -> None:
    with pytest.raises(DataError, match="the image is damaged"):
        decode_pillow(data)


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    length=st.floats(0, 1),
)
def test_arbitrary_bytes_raise_only_data_errors(
    form: str, places: list[tuple[float, int]], length: float
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(saved(Image.fromarray(CORNERS), form, exif=exif))
    for place, value in places:
        data[int(place * (len(data) - 1))] = value
    cut = data if length > 0.5 else data[: int(2 * length * len(data))]
    with contextlib.suppress(DataError):
        assert decode_pillow(bytes(cut), max_pixels=10_000).mode == "RGB"


def test_bombs_are_refused_from_their_header() -> None:
    with pytest.raises(DataError, match="10000x10000 pixels, more than the 50,000,000"):
        decode_pillow(png_header(10_000, 10_000), max_pixels=50_000_000)
    with pytest.raises(DataError, match="60000x60000 pixels"):
        decode_pillow(png_header(60_000, 60_000))
    with pytest.raises(DataError, match="max_pixels"):
        decode_pillow(
            saved(Image.fromarray(CORNERS)), max_pixels=CORNERS.shape[0] * CORNERS.shape[1] - 1
        )


def test_unsupported_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="not 2: change in_channels"):
        decode_pillow(saved(Image.fromarray(CORNERS)), channels=2)
