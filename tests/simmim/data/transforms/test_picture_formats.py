import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.images.decoding import to_mode
from data_prep.images.orientation import ORIENTATIONS
from simmim.data.order.source import BadSampleError, DataError
from simmim.data.transforms.decoding import decode_pixels

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


def decoded(data: bytes, *, channels: int = 3, max_pixels: int = 2**28) -> np.ndarray:
    """Decode a picture, whatever its format; without the axis of a single channel."""
    found = decode_pixels(data, "png", channels=channels, max_pixels=max_pixels).pixels
    return found[..., 0] if channels == 1 else found


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
    found = decode_pixels(saved(image, form), form.lower(), channels=channels).pixels
    assert found.shape == (12, 20, channels)
    assert found.dtype == (np.uint16 if mode == "I;16" else np.uint8)
    if found.dtype == np.uint16:
        found = (found // 257).astype(np.uint8)
    if channels == 4:
        assert found[..., 3].min() == 255
    if mode != "1":
        shown = Image.fromarray(found[..., 0] if channels == 1 else found).convert("L")
        tolerance = 40 if mode in ("LAB", "P") else 12
        assert np.abs(pixels(shown) - pixels(grey)).max() <= tolerance


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
    found = decoded(saved(stored, form, exif=exif, **options))
    assert found.shape == (*upright.size[::-1], 3)
    difference = np.abs(found.astype(int) - pixels(upright))
    assert difference.mean() < 8
    assert difference[3, 3].max() < 30


def test_grey_of_16_bits_keeps_all_of_them() -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    data = saved(Image.fromarray(ramp))
    for channels in (1, 3):
        found = decode_pixels(data, "png", channels=channels).pixels
        assert found.dtype == np.uint16
        assert np.array_equal(found, np.repeat(ramp[..., None], channels, axis=2))
    found = decode_pixels(data, "png", channels=4).pixels
    assert np.array_equal(found[..., :3], np.repeat(ramp[..., None], 3, axis=2))
    assert (found[..., 3] == 65535).all()


@pytest.mark.parametrize("kind", ["int16", "int32", "float32"])
def test_other_values_are_trained_on_as_they_are(kind: str) -> None:
    values = np.array([[-100, 0, 32000]]).astype(kind)
    image = Image.fromarray(values.astype(np.int32) if kind == "int16" else values)
    data = saved(image, "TIFF")
    assert np.array_equal(decoded(data, channels=1), values)
    with pytest.raises(BadSampleError, match="1 channel, but in_channels is 3"):
        decoded(data, channels=3)
    missing = np.array([[0.0, np.nan]], dtype=np.float32)
    with pytest.raises(BadSampleError, match="non-finite"):
        decoded(saved(Image.fromarray(missing), "TIFF"), channels=1)


def test_transparent_parts_become_white() -> None:
    colour = np.zeros((8, 8, 4), dtype=np.uint8)
    colour[..., 0], colour[:4, :, 3] = 200, 255
    found = decoded(saved(Image.fromarray(colour)))
    assert found[0, 0].tolist() == [200, 0, 0]
    assert found[7, 7].tolist() == [255, 255, 255]
    kept = decoded(saved(Image.fromarray(colour)), channels=4)
    assert kept[7, 7, 3] == 0

    palette = Image.fromarray(np.repeat([[0], [1]], 4, axis=1).astype(np.uint8), mode=None)
    palette = palette.convert("P")
    palette.putpalette([200, 0, 0, 0, 0, 200])
    seen = decoded(saved(palette, transparency=0))
    assert seen[0, 0].tolist() == [255, 255, 255]
    assert seen[1, 0].tolist() == [0, 0, 200]

    keyed = Image.fromarray(CORNERS)
    seen = decoded(saved(keyed, transparency=(255, 0, 0)))
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
        decoded(data)


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
        assert decoded(bytes(cut), max_pixels=10_000).shape[2] == 3


def test_bombs_are_refused_from_their_header() -> None:
    with pytest.raises(DataError, match="10000x10000 pixels, more than the 50,000,000"):
        decoded(png_header(10_000, 10_000), max_pixels=50_000_000)
    with pytest.raises(DataError, match="60000x60000 pixels"):
        decoded(png_header(60_000, 60_000))
    with pytest.raises(DataError, match="max_pixels"):
        decoded(saved(Image.fromarray(CORNERS)), max_pixels=CORNERS.shape[0] * CORNERS.shape[1] - 1)


def test_unsupported_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="not 2: change in_channels"):
        decoded(saved(Image.fromarray(CORNERS)), channels=2)
