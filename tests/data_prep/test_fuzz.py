"""Fuzzed images, manifests and indexes: no crash, no hang, no silent loss."""

import io
import json
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.format.index import read_index
from data_prep.format.manifest import ManifestError, read_manifest
from data_prep.images.checking import RejectedImageError, check_image, read_pixels
from data_prep.images.settings import Encoding
from data_prep.inspect.info import describe_shards
from data_prep.inspect.verify import verify_shards
from data_prep.write.build import build_shards
from data_prep.write.options import ShardOptions
from data_prep.write.output_dir import REJECTED_NAME

SECONDS_AN_IMAGE = 5.0
FULL = 30_000
FEW = 2_500


def _save(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def _save_array(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def seeds() -> list[bytes]:
    """Whole small images of every format and of most of their variants."""
    smooth = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    rgb = Image.fromarray(smooth).resize((30, 25), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.arange(30 * 25, dtype=np.uint16).reshape(25, 30) * 80
    animation = {"save_all": True, "append_images": [rgb.rotate(90)]}
    files = [
        *(_save(rgb.convert(mode), "JPEG", exif=exif) for mode in ("L", "RGB", "CMYK")),
        _save(rgb, "JPEG", progressive=True),
        _save(rgb, "JPEG", restart_marker_blocks=1, comment=b"text"),
        *(_save(rgb.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        _save(Image.fromarray(deep), "PNG"),
        _save(rgb, "PNG", exif=exif, **animation),
        _save(rgb, "WEBP"),
        _save(rgb.convert("RGBA"), "WEBP", lossless=True),
        _save(rgb, "WEBP", **animation),
        _save(rgb, "GIF", **animation),
        *(_save(rgb.convert(mode), "BMP") for mode in ("1", "P", "RGB")),
        *(
            _save(rgb, "TIFF", compression=how)
            for how in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
        ),
        _save(Image.fromarray(deep), "TIFF"),
        _save(rgb.convert("CMYK"), "TIFF"),
        _save(Image.fromarray(deep.astype(np.float32)), "TIFF"),
        _save(rgb, "TGA", compression="tga_rle"),
        _save(rgb, "PPM"),
        *(_save_array(np.asarray(rgb).astype(kind)) for kind in ("uint8", "uint16", "float32")),
        _save_array(deep),
    ]
    optional = [name for name in ("JPEG2000", "AVIF") if name in Image.SAVE]
    return files + [_save(rgb, name) for name in optional]


def _mutate(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Return one image damaged in one of six ways."""
    damaged = bytearray(data)
    place = int(rng.integers(len(data)))
    match int(rng.integers(6)):
        case 0:  # a few bits flipped anywhere
            for _ in range(int(rng.integers(1, 9))):
                damaged[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        case 1:  # cut
            damaged = damaged[:place]
        case 2:  # the head of another file
            length = int(rng.integers(1, 64))
            damaged[:length] = other[:length]
        case 3:  # a forged number, most often in the header
            place = int(rng.integers(min(len(data), 120)))
            value = int(rng.choice([0, 1, 0x7FFF, 0xFFFF, 60_000, 2**31 - 1, 2**32 - 1]))
            kind = str(rng.choice(["<I", ">I", "<H", ">H"]))
            number = struct.pack(kind, value & (0xFFFFFFFF if kind[1] == "I" else 0xFFFF))
            damaged[place : place + len(number)] = number
        case 4:  # a part missing or repeated
            length = int(rng.integers(1, 200))
            damaged[place:place] = damaged[place : place + length] * int(rng.integers(2, 5))
        case _:  # a part of another file, or of nothing
            length = int(rng.integers(1, 100))
            damaged[place : place + length] = (
                other[:length] if rng.random() < 0.5 else bytes(length)
            )
    return _mend_png(bytes(damaged)) if rng.random() < 0.5 else bytes(damaged)


def _mend_png(data: bytes) -> bytes:
    """Return a PNG with the checksums that its chunks should have, so that they are read."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    mended, place = bytearray(data), 8
    while place + 12 <= len(data):
        length = struct.unpack_from(">I", data, place)[0]
        stop = place + 8 + length
        if stop + 4 > len(data):
            break
        struct.pack_into(">I", mended, stop, zlib.crc32(data[place + 4 : stop]))
        place = stop + 4
    return bytes(mended)


def _mutants(seeds: list[bytes], count: int) -> list[bytes]:
    rng = np.random.default_rng(count)
    mutants = []
    for number in range(count):
        other = seeds[int(rng.integers(len(seeds)))]
        mutants.append(_mutate(seeds[number % len(seeds)], other, rng))
    return mutants


COUNTS = [
    pytest.param(FEW, id="few"),
    pytest.param(FULL, id="full", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
]


def test_whole_images_are_accepted(seeds: list[bytes]) -> None:
    for data in seeds:
        checked = check_image(data)
        assert set(read_pixels(checked.data, checked.extension).shape[:2]) == {25, 30}
        assert {checked.width, checked.height} == {25, 30}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    "encoding",
    [Encoding(), Encoding(max_side=16), Encoding(format="jpeg"), Encoding(format="webp")],
    ids=["keep", "shrink", "jpeg", "webp"],
)
def test_a_mutant_is_rejected_or_becomes_a_valid_image(
    count: int, encoding: Encoding, seeds: list[bytes]
) -> None:
    accepted = rejected = 0
    for number, data in enumerate(_mutants(seeds, count)):
        start = time.process_time()
        try:
            checked = check_image(data, max_pixels=2**20, encoding=encoding)
        except RejectedImageError:
            rejected += 1
        else:
            read_pixels(checked.data, checked.extension)  # raises unless it decodes
            assert check_image(checked.data).data == checked.data, number
            accepted += 1
        assert time.process_time() - start < SECONDS_AN_IMAGE, number
    assert accepted + rejected == count
    assert min(accepted, rejected) > count // 20


@pytest.mark.parametrize("count", COUNTS)
def test_a_set_of_mutants_is_valid_and_all_others_are_listed(
    count: int, seeds: list[bytes], tmp_path: Path
) -> None:
    source = tmp_path / "images"
    source.mkdir()
    for number, data in enumerate(_mutants(seeds, count)):
        (source / f"{number:05d}.jpg").write_bytes(data)
    options = ShardOptions(max_pixels=2**20, samples_per_shard=100)
    built = build_shards(source, tmp_path / "out", options)
    manifest = built.manifest
    assert built.found == count == manifest.samples + manifest.rejected
    lines = (tmp_path / "out" / REJECTED_NAME).read_text().splitlines()
    named = [json.loads(line) for line in lines]
    assert len({one["path"] for one in named}) == len(named) == manifest.rejected
    assert all(one["reason"] for one in named)
    found = verify_shards(manifest, decode=True)
    assert found.count == 0, found.problems
    assert f"samples     {manifest.samples:,}" in describe_shards(manifest)


def _mutate_text(text: str, rng: np.random.Generator) -> bytes:
    values = json.loads(text)
    odd: list[Any] = [None, -1, 0, 2**70, 1e308, "", "../x.tar", "/etc/passwd", [], {}, True, "\0"]
    value = odd[int(rng.integers(len(odd)))]
    match int(rng.integers(5)):
        case 0:
            values[str(rng.choice(sorted(values)))] = value
        case 1:
            shard = values["shards"][int(rng.integers(len(values["shards"])))]
            shard[str(rng.choice(sorted(shard)))] = value
        case 2:
            del values[str(rng.choice(sorted(values)))]
        case 3:
            data = bytearray(text.encode())
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            return bytes(data)
        case _:
            return text.encode()[: int(rng.integers(len(text)))]
    return json.dumps(values).encode()


def test_mutated_manifests_are_refused_or_read_as_they_are(image_zip: Path, tmp_path: Path) -> None:
    options = ShardOptions(samples_per_shard=6)
    folder = build_shards(image_zip, tmp_path / "out", options).manifest.folder
    path = folder / "manifest.json"
    text = path.read_text()
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(250):
        path.write_bytes(_mutate_text(text, rng))
        try:
            manifest = read_manifest(folder)
            found = verify_shards(manifest, decode=False)
            refused += found.count > 0
            describe_shards(manifest)
        except ManifestError:
            refused += 1
    assert refused > 150


def test_mutated_indexes_are_refused_or_detected(
    image_zip: Path, tmp_path: Path, draw_image: Callable[..., bytes]
) -> None:
    manifest = build_shards(image_zip, tmp_path / "out", ShardOptions(samples_per_shard=6)).manifest
    shard = manifest.shards[1]
    path = manifest.folder / shard.index
    whole = path.read_bytes()
    rng = np.random.default_rng(2)
    other = draw_image(0)
    unseen = 0
    for _ in range(250):
        damaged = _mutate(whole, other, rng)
        path.write_bytes(damaged)
        if damaged == whole:
            continue
        found = verify_shards(manifest, decode=False)
        if found.count == 0:  # padding of the header may change without changing a row
            path.write_bytes(whole)
            before = read_index(manifest.folder, shard)
            path.write_bytes(damaged)
            after = read_index(manifest.folder, shard)
            assert all(
                np.array_equal(left, right)
                for left, right in zip(vars(before).values(), vars(after).values(), strict=True)
            )
            unseen += 1
    assert unseen < 50
