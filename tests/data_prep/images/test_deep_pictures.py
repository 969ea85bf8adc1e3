"""Pictures of more than 8 bits in PNG, PGM, PPM and JPEG 2000 keep their values."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep.images.checking import RejectedImageError, check_image, read_pixels
from data_prep.images.settings import Encoding
from simmim.data.order.source import BadSampleError
from simmim.data.transforms.decoding import decode_pixels
from tests.data_prep.images.jpeg2000_files import encode_jpeg2000, with_cdef

COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(values: np.ndarray, *, filtered: int = 0, transparent: bytes = b"") -> bytes:
    """Write a 16-bit PNG of (height, width, channels), each row with a filter of PNG."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, COLOUR_TYPES[channels], 0, 0, 0)
    rows, before = [], np.zeros(width * channels * 2, dtype=np.uint8)
    for row in values:
        raw = np.frombuffer(row.astype(">u2").tobytes(), dtype=np.uint8)
        left = np.concatenate([np.zeros(2 * channels, dtype=np.uint8), raw[: -2 * channels]])
        rows.append(bytes([filtered]) + (raw - (0, left, before)[filtered]).astype("u1").tobytes())
        before = raw
    key = _chunk(b"tRNS", transparent) if transparent else b""
    body = _chunk(b"IHDR", header) + key + _chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + body + _chunk(b"IEND", b"")


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**16, shape, dtype=np.uint16)


@pytest.mark.parametrize("filtered", [0, 1, 2])
def test_colour_png_of_16_bits_keeps_every_bit(filtered: int) -> None:
    values = _random(13, 17, 3)
    data = _png(values, filtered=filtered)
    assert check_image(data).data == data
    for found in (read_pixels(data, "png"), decode_pixels(data, "png").pixels):
        assert found.dtype == np.uint16
        assert np.array_equal(found, values)
    opaque = decode_pixels(data, "png", channels=4).pixels
    assert np.array_equal(opaque[..., :3], values)
    assert (opaque[..., 3] == 65_535).all()
    grey = decode_pixels(data, "png", channels=1).pixels[..., 0]
    assert np.abs(grey - values @ np.array([0.299, 0.587, 0.114])).max() < 1.5


def test_transparency_of_16_bits_is_laid_on_white() -> None:
    values = _random(13, 17, 4)
    values[0, :, 3], values[1, :, 3] = 0, 65_535
    data = _png(values)
    assert np.array_equal(decode_pixels(data, "png", channels=4).pixels, values)
    found = read_pixels(data, "png")
    assert (found[0] == 65_535).all()
    assert np.array_equal(found[1], values[1, :, :3])
    alpha = values[..., 3:] / 65_535
    assert np.abs(found - (values[..., :3] * alpha + 65_535 * (1 - alpha))).max() < 1
    grey = _random(13, 17, 2)
    shown = decode_pixels(_png(grey), "png", channels=4).pixels
    assert np.array_equal(shown[..., [0, 3]], grey)


def test_a_transparent_colour_of_16_bits() -> None:
    values = _random(13, 17, 3)
    key = values[2, 3].astype(">u2").tobytes()
    found = read_pixels(_png(values, transparent=key), "png")
    assert (found[2, 3] == 65_535).all()
    assert np.array_equal(found[2, 4:], values[2, 4:])


def test_orientation_holds_for_16_bits_too() -> None:
    data = _png(_random(13, 17, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = data[:33] + _chunk(b"eXIf", exif.tobytes()[6:]) + data[33:]
    expected = np.rot90(read_pixels(data, "png"), -1)
    assert np.array_equal(decode_pixels(turned, "png").pixels, expected)


def test_damage_in_16_bits_is_found() -> None:
    data = _png(_random(13, 17, 3))
    with pytest.raises(RejectedImageError):
        read_pixels(data[: len(data) // 2], "png")


@pytest.mark.parametrize("maximum", [256, 1023, 4095, 65_534, 65_535])
@pytest.mark.parametrize("plain", [False, True])
def test_pgm_values_are_kept_whatever_stands_for_white(maximum: int, plain: bool) -> None:
    values = np.random.default_rng(0).integers(0, maximum, (9, 11), endpoint=True)
    values[0, :2] = 0, maximum
    if plain:
        data = f"P2 # deep\n11 9\n{maximum}\n".encode() + " ".join(map(str, values.flat)).encode()
    else:
        data = f"P5\n11 9 {maximum}\n".encode() + values.astype(">u2").tobytes()
    checked = check_image(data)
    assert checked.extension == "png"
    assert np.array_equal(read_pixels(checked.data, "png")[..., 0], values)
    assert np.array_equal(decode_pixels(data, "pgm", channels=1).pixels[..., 0], values)


def _levels(bits: int) -> np.ndarray:
    levels = np.linspace(0, 2**bits - 1, 32 * 32).round().astype(np.uint16)
    return levels.reshape(32, 32)


def _pgm(values: np.ndarray, maximum: int) -> bytes:
    height, width = values.shape
    return f"P5\n{width} {height} {maximum}\n".encode() + values.astype(">u2").tobytes()


def _tiff(values: np.ndarray, bits: int) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    buffer = io.BytesIO()
    photometric = "rgb" if values.ndim == 3 else "minisblack"
    packed = bits if bits < 16 else None
    tifffile.imwrite(buffer, values, photometric=photometric, bitspersample=packed, metadata=None)
    return buffer.getvalue()


@pytest.mark.parametrize("target", ["jpeg", "webp"])
@pytest.mark.parametrize("bits", [9, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["jp2", "pgm", "tiff", "colour tiff"])
def test_white_of_any_depth_is_white_in_8_bits(kind: str, bits: int, target: str) -> None:
    values = _levels(bits)
    match kind:
        case "jp2":
            data = encode_jpeg2000(values, bits)
        case "pgm":
            data = _pgm(values, 2**bits - 1)
        case _:
            colours = np.stack([values] * 3, axis=2) if kind == "colour tiff" else values
            data = _tiff(colours, bits)
    checked = check_image(data, encoding=Encoding(format=target, quality=100))
    assert any(note.startswith(f"{bits} bits") for note in checked.notes), checked.notes
    shown = read_pixels(checked.data, checked.extension)[..., 0].astype(float)
    assert np.abs(shown - values * (255 / (2**bits - 1))).max() < 4


@pytest.mark.parametrize("maximum", [300, 1000, 40_000])
def test_white_of_a_pgm_is_what_its_header_says(maximum: int) -> None:
    values = np.linspace(0, maximum, 32 * 32).round().reshape(32, 32)
    encoding = Encoding(format="webp", quality=100, max_side=31)
    checked = check_image(_pgm(values, maximum), encoding=encoding)
    shown = read_pixels(checked.data, checked.extension)[..., 0]
    assert shown[0, 0] < 4
    assert shown[-1, -1] > 251


@pytest.mark.parametrize("bits", [9, 10, 12, 16])
@pytest.mark.parametrize("kind", ["ppm", "colour jp2", "grey jp2 with alpha"])
def test_training_refuses_depth_that_sharding_refuses(kind: str, bits: int) -> None:
    values = np.stack([_levels(bits)] * (2 if "alpha" in kind else 3), axis=2)
    if kind == "ppm":
        header = f"P6\n32 32\n{2**bits - 1}\n".encode()
        data = header + values.astype(">u2").tobytes()
    else:
        data = encode_jpeg2000(values, bits, codecformat="jp2")
    with pytest.raises(RejectedImageError, match=rf"{bits} bits per colour channel.*\.npy"):
        check_image(data)
    for channels in (1, 3):
        with pytest.raises(BadSampleError, match=rf"{bits} bits per colour channel.*\.npy"):
            decode_pixels(data, kind.split(maxsplit=1)[0], channels=channels)
    if "alpha" in kind:
        data = with_cdef(data, [(0, 0, 1), (1, 1, 0)])
    assert check_image(data, encoding=Encoding(format="jpeg")).extension == "jpg"


def _few_bits_png(values: np.ndarray, bits: int, key: int) -> bytes:
    """Write a grey PNG of 1 to 16 bits with a transparent value."""
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    rows = []
    for row in values:
        packed = "".join(f"{value:0{bits}b}" for value in row)
        packed += "0" * (-len(packed) % 8)
        rows.append(b"\0" + int(packed, 2).to_bytes(len(packed) // 8, "big"))
    body = _chunk(b"IHDR", header) + _chunk(b"tRNS", struct.pack(">H", key))
    body += _chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + body + _chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_the_right_one_at_every_depth(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**bits, (9, 13))
    key = int(values[2, 3])
    data = _few_bits_png(values, bits, key)
    white = 65_535 if bits == 16 else 255
    shown = values * white // (2**bits - 1)
    on_white = np.where(values == key, white, shown)
    assert np.array_equal(decode_pixels(data, "png", channels=1).pixels[..., 0], on_white)
    assert np.array_equal(read_pixels(data, "png"), np.stack([on_white] * 3, axis=2))
    with_alpha = decode_pixels(data, "png", channels=4).pixels
    assert np.array_equal(with_alpha[..., 3] == 0, values == key)
    checked = check_image(data, encoding=Encoding(format="webp", quality=100))
    alpha = decode_pixels(checked.data, "webp", channels=4).pixels[..., 3]
    assert np.array_equal(alpha == 0, values == key)
    if bits == 16:
        with pytest.raises(RejectedImageError, match="16 bits"):
            check_image(data, encoding=Encoding(max_side=5))


def test_a_transparent_colour_of_16_bits_is_kept_in_8() -> None:
    values = _random(9, 13, 3)
    data = _png(values, transparent=values[2, 3].astype(">u2").tobytes())
    checked = check_image(data, encoding=Encoding(format="webp", quality=100))
    alpha = decode_pixels(checked.data, "webp", channels=4).pixels[..., 3]
    assert alpha[2, 3] == 0
    assert np.count_nonzero(alpha == 0) == 1
