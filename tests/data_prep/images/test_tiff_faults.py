"""TIFF as odd writers leave it: sparse, cut, inks, small palettes, slices without pages."""

import io
import struct
import zlib

import numpy as np
import pytest

from data_prep.images.checking import RejectedImageError, check_image, read_pixels
from simmim.data.order.source import BadSampleError
from simmim.data.transforms.decoding import decode_pixels
from tests.data_prep.images.tiff_files import stored_values, write_tiff

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")


def _erase(data: bytes, names: tuple[str, ...], number: int) -> bytes:
    """Set one of the offsets or lengths of strips or tiles to 0, as in a file not yet written."""
    erased = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        for name in names:
            tag = file.pages[0].tags[name]
            size = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
            start = tag.valueoffset + size * number
            erased[start : start + size] = bytes(size)
    return bytes(erased)


@pytest.mark.parametrize("photometric", ["rgb", "minisblack", "miniswhite"])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_strips_and_tiles_that_were_never_written_are_no_zeros(
    tile: tuple[int, int] | None,
    compression: str | None,
    kind: str,
    photometric: str,
) -> None:
    if kind == "float32" and photometric == "miniswhite":
        pytest.skip("refused in any case")
    values = np.random.default_rng(0).integers(1, 200, (40, 24, 3)).astype(kind)
    values = values if photometric == "rgb" else values[..., 0]
    options = {"compression": compression, "bigtiff": kind == "uint16", "photometric": photometric}
    data = write_tiff(values, **options, **({"tile": tile} if tile else {"rowsperstrip": 10}))
    check_image(data)
    place = "TileOffsets" if tile else "StripOffsets"
    length = "TileByteCounts" if tile else "StripByteCounts"
    for names in ((place, length), (length,), (place,)):
        wrong = _erase(data, names, 2)
        with pytest.raises(RejectedImageError, match=r"truncated TIFF: 1 of its .* number 3"):
            check_image(wrong)
        with pytest.raises(BadSampleError, match="truncated TIFF"):
            decode_pixels(wrong, "tif", channels=3)


def _palette_tiff(bits: int, colormap: np.ndarray, **options: object) -> tuple[bytes, np.ndarray]:
    indices = np.random.default_rng(0).integers(0, 2**bits, (16, 24), dtype=np.uint8)
    if bits == 8:
        return write_tiff(indices, photometric="palette", colormap=colormap, **options), indices
    flat = "".join(f"{value:0{bits}b}" for value in indices.ravel())
    rows = int(flat, 2).to_bytes(len(flat) // 8, "big")
    tags = {256: 24, 257: 16, 258: bits, 259: 1, 262: 3, 273: 0, 277: 1, 278: 16, 279: len(rows)}
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    tags[273] = start + 2 * colormap.size
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
    entries.append(struct.pack("<HHII", 320, 3, colormap.size, start))
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return head + colormap.astype("<u2").tobytes() + rows, indices


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("wide", [False, True])
def test_a_palette_of_8_bits_is_not_black(wide: bool, bits: int) -> None:
    colours = np.random.default_rng(1).integers(0, 256, (3, 2**bits), dtype=np.uint16)
    colours[0, 0] = 200
    data, indices = _palette_tiff(bits, colours * 257 if wide else colours)
    assert np.array_equal(stored_values(data), colours.T[indices])
    assert np.array_equal(decode_pixels(data, "tif").pixels, colours.T[indices])


def test_a_palette_of_8_bits_is_the_same_through_tifffile() -> None:
    colours = np.random.default_rng(1).integers(0, 256, (3, 256), dtype=np.uint16)
    data, indices = _palette_tiff(8, colours, compression="zstd")
    assert np.array_equal(stored_values(data), colours.T[indices])


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("inks", [1, 2])
def test_other_inks_than_cmyk_stay_bands(inks: int, compression: str | None) -> None:
    values = np.random.default_rng(0).integers(0, 256, (9, 11, 4), dtype=np.uint8)
    data = write_tiff(
        values,
        photometric="separated",
        compression=compression,
        extratags=[(332, 3, 1, inks, True)],
    )
    checked = check_image(data)
    if inks == 2:
        assert checked.extension == "npy"
        assert np.array_equal(read_pixels(checked.data, "npy"), values)
        assert np.array_equal(decode_pixels(data, "tif", channels=4).pixels, values)
    else:
        assert "CMYK converted to RGB" in checked.notes


def test_premultiplied_alpha_is_divided_out_however_the_file_is_written() -> None:
    values = np.random.default_rng(0).integers(0, 256, (16, 20, 4), dtype=np.uint8)
    values[0, 0] = 100, 100, 100, 200
    values[..., :3] = np.minimum(values[..., :3], values[..., 3:])
    options = {"photometric": "rgb", "extrasamples": ["assocalpha"]}
    files = [
        write_tiff(values, **options),
        write_tiff(values, compression="zstd", **options),
        write_tiff(values, bigtiff=True, byteorder=">", **options),
        write_tiff(np.moveaxis(values, -1, 0), planarconfig="separate", **options),
    ]
    first = check_image(files[0])
    stored = decode_pixels(first.data, "png", channels=4).pixels
    assert stored[0, 0].tolist() == [127, 127, 127, 200]
    for data in files:
        checked = check_image(data)
        assert "premultiplied alpha divided out" in checked.notes
        assert (checked.extension, checked.data) == ("png", first.data)
        trained = decode_pixels(data, "tif", channels=4).pixels
        assert np.array_equal(trained, stored)


@pytest.mark.parametrize("kind", ["imagej", "shaped"])
def test_slices_without_a_page_of_their_own_are_noted(kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (5, 9, 11), dtype=np.uint16)
    options = {"imagej": True} if kind == "imagej" else {"photometric": "minisblack"}
    for truncate in (True, False):
        data = write_tiff(values, truncate=truncate, **{"metadata": {}, **options})
        checked = check_image(data)
        assert "first of several pages" in checked.notes
        assert np.array_equal(read_pixels(checked.data, "png")[..., 0], values[0])
    single = write_tiff(values[0], **{"metadata": {}, **options})
    assert "first of several pages" not in check_image(single).notes


def test_the_old_tag_marks_previews_too() -> None:
    values = np.zeros((8, 9), dtype=np.uint8)
    full, reduced = ([(255, 3, 1, kind, True)] for kind in (1, 2))
    assert check_image(write_tiff(values, extratags=full)).width == 9
    with pytest.raises(RejectedImageError, match="preview"):
        check_image(write_tiff(values, extratags=reduced))
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        file.write(values, metadata=None)
        file.write(values[::2, ::2], extratags=reduced, metadata=None)
    assert "first of several pages" not in check_image(buffer.getvalue()).notes


def _by_tags(payload: bytes, order: str, bits: int, **tags: int) -> bytes:
    """Write a grey TIFF of 24 by 16 values with tags that no library writes."""
    numbers = {"compression": 259, "samples": 277, "predictor": 317, "kind": 339}
    known = {256: 24, 257: 16, 258: bits, 259: 1, 262: 1, 273: 0, 278: 16, 279: len(payload)}
    known |= {numbers[name]: value for name, value in tags.items()}
    known[273] = 8 + 2 + 12 * len(known) + 4
    entries = [struct.pack(order + "HHII", tag, 4, 1, known[tag]) for tag in sorted(known)]
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    head = start + struct.pack(order + "H", len(entries))
    return head + b"".join(entries) + bytes(4) + payload


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *(("uint", bits) for bits in (17, 20, 24, 31, 40, 48)),
        *(("int", bits) for bits in (4, 12, 24)),
        *(("float", bits) for bits in (1, 8)),
    ],
)
def test_odd_depths_that_readers_disagree_on_are_named(name: str, bits: int, order: str) -> None:
    payload = np.random.default_rng(0).bytes(24 * 16 * bits // 8)
    data = _by_tags(payload, order, bits, kind={"uint": 1, "int": 2, "float": 3}[name])
    for check in (check_image, lambda data: decode_pixels(data, "tif")):
        with pytest.raises(ValueError, match=rf"1 band of {name}{bits} .*\.npy"):
            check(data)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16])
def test_values_of_undefined_format_are_unsigned(bits: int, order: str) -> None:
    values = np.random.default_rng(0).integers(0, 2**bits, (16, 24)).astype(f"{order}u{bits // 8}")
    data = _by_tags(values.tobytes(), order, bits, kind=4)
    assert np.array_equal(stored_values(data)[..., 0], values)


@pytest.mark.parametrize(
    ("bits", "compression", "predictor"),
    [(8, 1, 2), (16, 1, 2), (2, 8, 2), (4, 8, 2), (12, 8, 2), (12, 8, 3)],
)
def test_predictors_without_a_defined_meaning_are_named(
    bits: int, compression: int, predictor: int
) -> None:
    raw = np.random.default_rng(0).bytes(24 * 16 * bits // 8)
    payload = raw if compression == 1 else zlib.compress(raw)
    data = _by_tags(payload, "<", bits, compression=compression, predictor=predictor)
    with pytest.raises(RejectedImageError, match=rf"predictor {predictor}.*\.npy"):
        check_image(data)


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_last_tile_that_is_cut_in_its_padding_is_truncated(compression: str | None) -> None:
    values = np.random.default_rng(0).integers(0, 256, (37, 45), dtype=np.uint8)
    data = write_tiff(values, tile=(16, 16), compression=compression)
    check_image(data)
    for cut in (1, 20, 100):
        with pytest.raises(RejectedImageError, match="TIFF"):
            check_image(data[:-cut])
