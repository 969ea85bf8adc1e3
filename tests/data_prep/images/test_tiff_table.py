"""TIFF of every layout: the same values, or a rejection that names what it is."""

import io
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.images.checking import CheckedImage, RejectedImageError, check_image
from simmim.data.order.source import BadSampleError
from simmim.data.transforms.decoding import decode_pixels

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

AXES: dict[str, tuple[Any, ...]] = {
    "byteorder": ("<", ">"),
    "dtype": (
        *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64", "bool", "complex64"),
    ),
    "photometric": ("minisblack", "miniswhite", "rgb", "palette", "separated"),
    "bands": (1, 2, 3, 4, 5, 6, 12),
    "extra": ("unspecified", "unassalpha", "assocalpha"),
    "planar": ("contig", "separate"),
    "compression": (
        *(None, "lzw", "deflate", "packbits", "zstd", "lzma"),
        *("jpeg", "jpeg2000", "png", "lerc"),
    ),
    "predictor": (1, 2, 3),
    "tile": (None, (16, 16)),
    "bigtiff": (False, True),
}
COLOURS = {"minisblack": 1, "miniswhite": 1, "rgb": 3, "palette": 1, "separated": 4}
PALETTE = np.arange(3 * 256, dtype=np.uint16).reshape(3, 256) * 85

Cell = dict[str, Any]


def _draw(cell: Cell) -> np.ndarray:
    """Values from the lowest to the highest of the type, (rows, columns, bands)."""
    rng = np.random.default_rng(0)
    shape, dtype = (19, 23, cell["bands"]), np.dtype(cell["dtype"])
    match dtype.kind:
        case "b":
            return rng.random(shape) < 0.5
        case "f" | "c":
            return (rng.normal(0, 1000, shape)).astype(dtype)
    if cell["compression"] == "jpeg":
        smooth = np.linspace(0, 200, 23)[:, None] + np.arange(cell["bands"])
        return np.tile(smooth, (19, 1, 1)).astype(dtype)
    limits = np.iinfo(dtype)
    low, high = max(limits.min, -(2**53)), min(limits.max, 2**53)
    values = rng.integers(low, high, shape, dtype=dtype, endpoint=True)
    values[0, 0], values[0, 1] = low, high
    return values


def _write(cell: Cell, values: np.ndarray) -> bytes | None:
    """Write a file of this cell; None if the format or the writer has no such file."""
    options: dict[str, Any] = {}
    extra = cell["bands"] - COLOURS[cell["photometric"]]
    if extra < 0 or (extra == 0 and cell["extra"] != "unspecified"):
        return None
    if extra:
        options["extrasamples"] = [cell["extra"]] + ["unspecified"] * (extra - 1)
    if cell["compression"] == "jpeg2000" and cell["byteorder"] == ">" and values.itemsize > 1:
        return None  # the writer swaps the bytes
    if cell["photometric"] == "palette":
        if cell["dtype"] != "uint8":
            return None
        options["colormap"] = PALETTE
    if cell["bands"] > 1:
        options["planarconfig"] = cell["planar"]
    elif cell["planar"] == "separate":
        return None
    written = values[..., 0] if cell["bands"] == 1 else values
    if cell["bands"] > 1 and cell["planar"] == "separate":
        written = np.moveaxis(values, -1, 0)
    if cell["compression"] == "jpeg" and cell["dtype"] != "uint8":
        return None  # of 12 bits, whatever the type
    if cell["compression"] == "jpeg":
        options["compressionargs"] = {"level": 98}
    buffer = io.BytesIO()
    try:
        tifffile.imwrite(
            buffer,
            written,
            byteorder=cell["byteorder"],
            photometric=cell["photometric"],
            compression=cell["compression"],
            predictor=cell["predictor"] if cell["predictor"] > 1 else None,
            tile=cell["tile"],
            bigtiff=cell["bigtiff"],
            metadata=None,
            **options,
        )
    # Many types, for what the format or a codec has not.
    except Exception:
        return None
    return buffer.getvalue()


def _expected(cell: Cell, values: np.ndarray) -> np.ndarray | None:
    """Return the values as they should be, black as zero; None for a rejection."""
    kind = values.dtype.kind
    if cell["compression"] == "jpeg2000" and values.itemsize > 2:
        return None  # no codec keeps all bits
    if kind == "b" and cell["bands"] > 1 and cell["planar"] == "contig":
        return None  # writers do not agree on the order of the bits
    if cell["compression"] == "lerc" and cell["predictor"] > 1:
        return None
    if cell["dtype"] == "uint64" and cell["photometric"] == "miniswhite":
        return None  # inverted, they are beyond 2⁵³
    if kind == "c" or (cell["photometric"] == "miniswhite" and kind in "if"):
        return None
    if cell["photometric"] == "palette":
        return (PALETTE.T[values[..., 0]] >> 8) if cell["bands"] == 1 else None
    if cell["photometric"] == "miniswhite":
        values = values.copy()
        grey = values[..., 0]
        values[..., 0] = ~grey if kind == "b" else np.iinfo(grey.dtype).max - grey
    return values.astype(np.uint8) * 255 if kind == "b" else values


def _is_readable(data: bytes) -> bool:
    """Tell whether tifffile reads what it has written; it does not, for a few layouts."""
    try:
        tifffile.imread(io.BytesIO(data))
    except Exception:
        return False
    return True


def _stored(checked: CheckedImage) -> np.ndarray:
    if checked.extension == "npy":
        values = np.load(io.BytesIO(checked.data), allow_pickle=False)
    else:
        with Image.open(io.BytesIO(checked.data)) as image:
            shown = image.convert("L") if image.mode == "1" else image
            shown = shown.convert("RGB") if shown.mode == "P" else shown
            values = np.asarray(shown)
    return values[..., None] if values.ndim == 2 else values


def _names(cell: Cell, message: str) -> bool:
    """Tell whether a rejection says what the file is and what to do."""
    dtype = {"bool": "uint1", "complex64": "complex64"}.get(cell["dtype"], cell["dtype"])
    return "TIFF" in message and f"of {dtype}" in message and ".npy" in message


def _is_converted(cell: Cell) -> bool:
    """Tell whether a file holds colours that are converted: plain CMYK, premultiplied alpha."""
    extra = cell["bands"] - COLOURS[cell["photometric"]]
    if cell["photometric"] == "separated":
        return extra == 0 and cell["dtype"] in ("uint8", "bool")
    premultiplied = cell["photometric"] == "rgb" and extra == 1 and cell["extra"] == "assocalpha"
    return premultiplied and cell["dtype"] == "uint8"


def _check(cell: Cell) -> bool:
    """Check one cell; return whether there is such a file."""
    values = _draw(cell)
    data = _write(cell, values)
    if data is None:
        return False
    expected = _expected(cell, values) if _is_readable(data) else None
    if expected is None:
        with pytest.raises(RejectedImageError) as caught:
            check_image(data)
        assert _names(cell, str(caught.value)), f"{cell}: {caught.value}"
        with pytest.raises(BadSampleError, match="TIFF"):
            decode_pixels(data, "tif", channels=cell["bands"])
        return True
    checked = check_image(data)
    stored = _stored(checked)
    if not _is_converted(cell):
        assert stored.shape == expected.shape, cell
        difference = np.abs(stored.astype(np.float64) - expected.astype(np.float64)).max()
        assert difference <= (9 if cell["compression"] == "jpeg" else 0), f"{cell}: {difference}"
        assert checked.extension == "npy" or stored.dtype in (np.uint8, np.uint16)
    elif cell["dtype"] == "bool":  # inks are all or nothing, so their colour is exact
        *inks, black = np.moveaxis(values.astype(np.uint8), -1, 0)
        colours = np.stack([255 * (1 - ink) * (1 - black) for ink in inks], axis=-1)
        assert np.array_equal(stored, colours), cell
    channels = stored.shape[2] if checked.extension == "npy" else 3
    trained = decode_pixels(data, "tif", channels=channels).pixels
    again = decode_pixels(checked.data, checked.extension, channels=channels).pixels
    assert trained.dtype == again.dtype, cell
    assert np.array_equal(trained, again), cell
    return True


def _cells(**fixed: Any) -> Iterator[Cell]:
    axes = {name: (fixed[name],) if name in fixed else axis for name, axis in AXES.items()}
    for choice in itertools.product(*axes.values()):
        yield dict(zip(axes, choice, strict=True))


def _pairs(cell: Cell) -> set[tuple[str, Any, str, Any]]:
    return {(one, cell[one], other, cell[other]) for one, other in itertools.combinations(AXES, 2)}


def test_every_pair_of_layouts() -> None:
    rng = random.Random(0)
    missing: set[tuple[str, Any, str, Any]] = set()
    for one, other in itertools.combinations(AXES, 2):
        missing |= {(one, a, other, b) for a in AXES[one] for b in AXES[other]}
    total, checked = len(missing), 0
    for pair in sorted(missing, key=str):
        one, first, other, second = pair
        for _ in range(25):
            if pair not in missing:
                break
            cell = {name: rng.choice(axis) for name, axis in AXES.items()}
            cell |= {one: first, other: second}
            if _check(cell):
                checked += 1
                missing -= _pairs(cell)
    assert checked > 100
    assert len(missing) < total * 0.3, sorted(missing, key=str)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", AXES["dtype"])
def test_every_cell(dtype: str) -> None:
    found = sum(_check(cell) for cell in _cells(dtype=dtype))
    assert found > 50
