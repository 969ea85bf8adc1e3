"""TIFF: orientation, pages, few bits, colours, missing packages, hostile files."""

import contextlib
import io
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.images.checking import RejectedImageError, check_image, read_pixels
from data_prep.images.settings import Encoding
from data_prep.images.tiff import reads_right
from data_prep.images.tiff_layout import TiffError, read_layout
from simmim.data.order.source import BadSampleError
from simmim.data.transforms.decoding import decode_pixels
from tests.data_prep.images.tiff_files import stored_values, write_tiff

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")


CONTIGUOUS = {"photometric": "minisblack", "planarconfig": "contig"}


def _by_hand(
    rows: bytes, *, size: tuple[int, int], bits: int, photometric: int, **tags: int
) -> bytes:
    """Write an uncompressed grey or palette TIFF, which tifffile cannot for every depth."""
    known = {
        "fill_order": 266,
        "orientation": 274,
        "subfile": 254,
        "predictor": 317,
        "samples": 277,
    }
    entries = {256: size[0], 257: size[1], 258: bits, 259: 1, 262: photometric}
    entries |= {known[name]: value for name, value in tags.items()}
    entries |= {278: size[1], 279: len(rows)}
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    entries[273] = start
    body = b"".join(struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4) + rows


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32", "float64"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_values_are_turned_upright(kind: str, orientation: int) -> None:
    values = np.arange(6 * 9).reshape(6, 9).astype(kind)
    data = write_tiff(values, extratags=[(274, 3, 1, orientation, True)])
    image = Image.new("L", (9, 6))
    image.putdata(list(range(54)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    png = io.BytesIO()
    image.save(png, "PNG", exif=exif)
    expected = decode_pixels(png.getvalue(), "png", channels=1).pixels
    assert np.array_equal(stored_values(data), expected)
    assert np.array_equal(decode_pixels(data, "tif", channels=1).pixels, expected)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits"])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "int32", "float32"])
@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_plain_values_in_every_kind_of_file(
    byteorder: str, bigtiff: bool, kind: str, compression: str | None
) -> None:
    values = (np.arange(72).reshape(8, 9) * 3.5).astype(kind)
    values[0, 0] = {"uint8": 250, "int16": -300, "int32": -70_000}.get(kind, 60_000)
    options = {"byteorder": byteorder, "bigtiff": bigtiff, "compression": compression}
    assert np.array_equal(stored_values(write_tiff(values, **options))[..., 0], values)
    tiled = write_tiff(np.pad(values, ((0, 8), (0, 7))), tile=(16, 16), **options)
    assert np.array_equal(stored_values(tiled)[:8, :9, 0], values)


def test_the_first_of_several_pages_is_noted() -> None:
    values = np.random.default_rng(0).integers(0, 255, (3, 8, 9), dtype=np.uint8)
    checked = check_image(write_tiff(values, photometric="minisblack"))
    assert "first of several pages" in checked.notes
    assert np.array_equal(read_pixels(checked.data, "png")[..., 0], values[0])


def test_smaller_copies_of_a_page_are_no_pages() -> None:
    buffer = io.BytesIO()
    values = np.zeros((16, 16), dtype=np.uint8)
    with tifffile.TiffWriter(buffer) as file:
        file.write(values, metadata=None)
        file.write(values[::2, ::2], subfiletype=1, metadata=None)
    assert "first of several pages" not in check_image(buffer.getvalue()).notes


def test_a_preview_is_no_picture() -> None:
    data = write_tiff(np.zeros((8, 8, 3), dtype=np.uint8), photometric="rgb", subfiletype=1)
    with pytest.raises(RejectedImageError, match="preview"):
        check_image(data)


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_grey_of_any_depth_has_black_as_zero(bits: int, photometric: int) -> None:
    stored = (np.arange(64).reshape(8, 8) * 37) % 2**bits
    flat = "".join(f"{value:0{bits}b}" for value in stored.ravel())
    if bits == 16:
        rows = stored.astype("<u2").tobytes()
    else:
        rows = int(flat, 2).to_bytes(len(flat) // 8, "big")
    data = _by_hand(rows, size=(8, 8), bits=bits, photometric=photometric)
    expected = 2**bits - 1 - stored if photometric == 0 else stored
    if bits < 8:
        expected = np.rint(expected * 255 / (2**bits - 1))
    found = stored_values(data)
    assert found.dtype == (np.uint16 if bits > 8 else np.uint8)
    assert np.array_equal(found[..., 0], expected)


def test_bits_in_reverse_order() -> None:
    stored = np.arange(64, dtype=np.uint8).reshape(8, 8)
    reverse = np.array([int(f"{value:08b}"[::-1], 2) for value in range(256)], dtype=np.uint8)
    data = _by_hand(reverse[stored].tobytes(), size=(8, 8), bits=8, photometric=1, fill_order=2)
    assert np.array_equal(stored_values(data)[..., 0], stored)


def test_cmyk_is_the_same_whoever_decodes_it() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    cmyk = Image.fromarray(rgb).convert("CMYK")
    values = np.asarray(cmyk)
    by_pillow = write_tiff(values, photometric="separated")
    assert reads_right(read_layout(by_pillow))
    expected = np.asarray(cmyk.convert("RGB"))
    others = (
        write_tiff(values, photometric="separated", compression="zstd"),
        write_tiff(np.moveaxis(values, -1, 0), photometric="separated", planarconfig="separate"),
    )
    for data in (by_pillow, *others):
        checked = check_image(data)
        assert "CMYK converted to RGB" in checked.notes
        assert np.array_equal(read_pixels(checked.data, "png"), expected)
        assert np.array_equal(decode_pixels(data, "tif").pixels, expected)


def test_photographs_in_jpeg_within_tiff_keep_their_colours() -> None:
    ramp = np.linspace(0, 255, 64)
    rgb = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp, (64, 1)).T, np.full((64, 64), 90)], 2)
    rgb = rgb.astype(np.uint8)
    by_pillow = io.BytesIO()
    Image.fromarray(rgb).save(by_pillow, "TIFF", compression="jpeg", quality=95)
    options = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 95}}
    for data in (write_tiff(rgb, **options), by_pillow.getvalue()):
        assert np.abs(stored_values(data).astype(int) - rgb).mean() < 3


def test_premultiplied_alpha_is_undone_and_other_bands_are_kept() -> None:
    values = np.zeros((8, 8, 4), dtype=np.uint8)
    values[..., :3], values[..., 3] = 100, 128
    data = write_tiff(values, photometric="rgb", extrasamples=["assocalpha"])
    checked = check_image(data)
    with Image.open(io.BytesIO(checked.data)) as image:
        assert image.getpixel((0, 0)) == (199, 199, 199, 128)
    data = write_tiff(values, photometric="rgb", extrasamples=["unspecified"])
    checked = check_image(data)
    assert checked.extension == "npy"
    assert "stored as an array" in checked.notes
    assert np.array_equal(read_pixels(checked.data, "npy"), values)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_infinite_and_missing_values_are_met_at_once(compression: str | None) -> None:
    values = np.ones((8, 9), dtype=np.float32)
    values[2, 3] = np.nan
    checked = check_image(write_tiff(values, compression=compression))
    assert "NaN values" in checked.notes
    assert "NaN values" in check_image(checked.data).notes
    values[2, 4] = np.inf
    with pytest.raises(RejectedImageError, match="infinite"):
        check_image(write_tiff(values, compression=compression))
    with pytest.raises(RejectedImageError, match="all of its values are NaN"):
        check_image(write_tiff(np.full((8, 9), np.nan, dtype=np.float32), compression=compression))


def test_colour_of_16_bits_becomes_an_array_or_8_bits_if_asked_for() -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (8, 9, 3), dtype=np.uint16)
    data = write_tiff(values, photometric="rgb", byteorder=">")
    assert np.array_equal(stored_values(data), values)
    checked = check_image(data, encoding=Encoding(format="webp"))
    assert "16 bits cut to 8" in checked.notes
    assert checked.extension == "webp"


def test_64_bits_are_exact_or_rejected() -> None:
    exact = np.array([[0, 2**53]], dtype=np.uint64)
    assert np.array_equal(stored_values(write_tiff(exact))[..., 0], exact.astype(np.float64))
    with pytest.raises(RejectedImageError, match=r"uint64.*9,007,199,254,740,993"):
        check_image(write_tiff(exact + np.uint64(1)))


NO_TIFFFILE = """
import sys
sys.modules["tifffile"] = None
from data_prep.images.checking import RejectedImageError, check_image
for name in sys.argv[1:]:
    try:
        print(check_image(open(name, "rb").read()).extension)
    except RejectedImageError as error:
        print(error)
"""


def test_without_tifffile_plain_files_are_read_and_others_named(tmp_path: Path) -> None:
    plain = {
        "grey": np.zeros((8, 9), dtype=np.uint8),
        "deep": np.zeros((8, 9), dtype=np.uint16),
        "float": np.zeros((8, 9), dtype=np.float32),
    }
    files = {name: write_tiff(values) for name, values in plain.items()}
    files["bands"] = write_tiff(np.zeros((8, 9, 12), dtype=np.float16), **CONTIGUOUS)
    for name, data in files.items():
        (tmp_path / f"{name}.tif").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", NO_TIFFFILE, *(str(tmp_path / f"{name}.tif") for name in files)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    *accepted, refused = done.stdout.splitlines()
    assert accepted == ["png", "png", "npy"]
    assert "a TIFF with 12 bands of float16" in refused
    assert "pip install 'simmim[tiff]'" in refused
    assert ".npy" in refused


@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_bombs_are_refused_by_their_tags(tile: tuple[int, int] | None) -> None:
    values = np.zeros((4, 4, 512), dtype=np.float64)
    data = write_tiff(values, compression="zlib", tile=tile, **CONTIGUOUS)
    assert check_image(data, max_pixels=2048 if tile is None else 2**15).extension == "npy"
    with pytest.raises(RejectedImageError, match=r"512 bands of float64.*max-pixels"):
        check_image(data, max_pixels=2047)
    with pytest.raises(BadSampleError, match=r"512 bands of float64.*max-pixels"):
        decode_pixels(data, "tif", channels=512, max_pixels=2047)


def test_a_tile_larger_than_the_limit_is_refused_unread() -> None:
    data = bytearray(write_tiff(np.zeros((16, 16), dtype=np.uint8), tile=(16, 16)))
    for tag in (322, 323):
        place = next(
            at for at in range(8, len(data)) if data[at : at + 2] == struct.pack("<H", tag)
        )
        data[place : place + 12] = struct.pack("<HHII", tag, 4, 1, 2**30)
    with pytest.raises(RejectedImageError, match="max-pixels"):
        check_image(bytes(data))


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd"])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float64"])
def test_truncated_files_are_rejected(kind: str, compression: str | None) -> None:
    values = np.random.default_rng(0).integers(0, 200, (40, 50)).astype(kind)
    data = write_tiff(values, compression=compression, rowsperstrip=8)
    for keep in (0.2, 0.6, 0.95):
        with pytest.raises(RejectedImageError):
            check_image(data[: int(keep * len(data))])


def test_any_change_gives_a_picture_or_a_rejection(
    draw_image: Callable[..., bytes],
) -> None:
    rng = np.random.default_rng(0)
    files = [
        draw_image(0, image_format="TIFF"),
        write_tiff(rng.random((9, 9, 5), dtype=np.float32), **CONTIGUOUS),
        write_tiff(rng.integers(0, 99, (9, 9), dtype=np.int16), compression="zlib", bigtiff=True),
    ]
    for number in range(300):
        data = bytearray(files[number % 3])
        for _ in range(1 + number % 4):
            place = int(rng.integers(min(400, len(data)) if number % 2 else len(data)))
            data[place] = int(rng.integers(256))
        with contextlib.suppress(RejectedImageError):
            checked = check_image(bytes(data), max_pixels=2**16)
            assert read_pixels(checked.data, checked.extension).size


def test_a_layout_describes_itself() -> None:
    layout = read_layout(write_tiff(np.zeros((4, 5, 12), np.float16), **CONTIGUOUS))
    assert str(layout) == "a TIFF with 12 bands of float16 (grey, no compression)"
    for data in (b"II*\0", b"II*\0\x08\0\0\0", b"II*\0\0\0\0\0" + bytes(40), b"MM\0+" + bytes(20)):
        with pytest.raises(TiffError, match=r"truncated|damaged"):
            read_layout(data)
