"""Statistics equal the plain definition for every order, format and type."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.format.manifest import (
    Manifest,
    ManifestError,
    read_manifest,
)
from data_prep.format.statistics_file import read_statistics, write_statistics
from data_prep.images.checking import read_pixels
from data_prep.inspect.info import spread_rows
from data_prep.inspect.statistics import measure_moments, measure_set
from data_prep.write.build import build_shards
from data_prep.write.options import ShardOptions

Build = Callable[[dict[str, bytes]], Manifest]


def _png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    return buffer.getvalue()


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Return a function that makes a set of shards of two samples from (name → file)."""

    def made(files: dict[str, bytes]) -> Manifest:
        folder = tmp_path / "images"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        options = ShardOptions(samples_per_shard=2)
        return build_shards(folder, tmp_path / "out", options).manifest

    return made


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64"])
def test_merged_parts_equal_the_whole(dtype: str) -> None:
    values = np.random.default_rng(0).integers(90, 110, (60, 7, 3)).astype(dtype)
    scale = np.iinfo(dtype).max if dtype.startswith("u") else 1
    numbers = values.reshape(-1, 3).astype(np.float64) / scale
    moments = measure_moments(values[:1])
    for start, stop in ((1, 2), (2, 30), (30, 60)):
        moments = measure_moments(values[start:stop]).merged(moments)
    assert moments.count.tolist() == [420] * 3
    np.testing.assert_allclose(moments.mean, numbers.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.squares / 420, numbers.var(axis=0), rtol=1e-9)


def test_a_large_array_is_measured_in_parts_and_far_from_zero() -> None:
    values = 1e6 + np.random.default_rng(0).normal(size=(900, 2500, 4)).astype(np.float32)
    moments = measure_moments(values)
    numbers = values.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(moments.mean, numbers.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.squares / len(numbers), numbers.var(axis=0), rtol=1e-9)


def test_pictures_of_all_kinds_count_every_pixel(build: Build) -> None:
    generator = np.random.default_rng(0)
    colour = [generator.integers(0, 256, (9, 4 + n, 3), dtype=np.uint8) for n in range(5)]
    grey = generator.integers(0, 256, (8, 8), dtype=np.uint8)
    deep = generator.integers(0, 65_536, (5, 6), dtype=np.uint16)
    files = {f"{number}.png": _png(values) for number, values in enumerate(colour)}
    manifest = build({**files, "grey.png": _png(grey), "deep.png": _png(deep)})
    parts = [values.reshape(-1, 3) / 255 for values in colour]
    parts += [(grey / 255).reshape(-1, 1).repeat(3, 1), (deep / 65_535).reshape(-1, 1).repeat(3, 1)]
    pixels = np.concatenate(parts)
    one, two = (measure_set(manifest, workers=workers) for workers in (1, 2))
    assert one == two
    (statistics,) = one.statistics
    assert (statistics.images, statistics.scale, statistics.missing) == (7, "0 to 1", 0)
    np.testing.assert_allclose(statistics.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, pixels.std(axis=0), rtol=1e-12)


def test_arrays_are_measured_separately_and_without_nan(build: Build) -> None:
    values = np.random.default_rng(0).normal(5, 2, (6, 7, 5)).astype(np.float32)
    values[2, 3, 1] = np.nan
    manifest = build(
        {
            "a.npy": _npy(values),
            "b.npy": _npy(values + 1),
            "c.npy": _npy(np.full((3, 3, 5), 65_535, dtype=np.uint16)),
            "d.png": _png(np.zeros((4, 4, 3), dtype=np.uint8)),
        }
    )
    assert manifest.notes["NaN values"] == 2
    fractions, picture, whole = measure_set(manifest).statistics
    both = np.concatenate([values.reshape(-1, 5), values.reshape(-1, 5) + 1]).astype(np.float64)
    assert (fractions.images, fractions.scale, fractions.missing) == (2, "as stored", 2)
    np.testing.assert_allclose(fractions.mean, np.nanmean(both, axis=0), rtol=1e-7)
    np.testing.assert_allclose(fractions.std, np.nanstd(both, axis=0), rtol=1e-6)
    assert (picture.channels, picture.is_array) == (3, False)
    assert (whole.mean, whole.std, whole.is_array) == ((1.0,) * 5, (0.0,) * 5, True)


def test_statistics_are_read_back_only_for_the_same_shards(build: Build) -> None:
    manifest = build({f"{n}.png": _png(np.full((4, 4), 51 * n, np.uint8)) for n in range(5)})
    with pytest.raises(ManifestError, match=r"has no statistics\.json"):
        read_statistics(manifest)
    before = (manifest.folder / "manifest.json").read_bytes()
    measured = measure_set(manifest).statistics
    write_statistics(manifest, measured)
    assert read_statistics(manifest) == measured
    assert (manifest.folder / "manifest.json").read_bytes() == before
    path = manifest.folder / "statistics.json"
    whole = path.read_text()
    other = read_manifest(manifest.folder).shards[0].sha256
    changed = (manifest.folder / "manifest.json").read_text().replace(other, "0" * 64)
    (manifest.folder / "manifest.json").write_text(changed)
    with pytest.raises(ManifestError, match="other shards"):
        read_statistics(read_manifest(manifest.folder))
    for text in ("[]", "{}", "", whole.replace("0.4", '"x"'), whole.replace("mean", "men")):
        path.write_text(text)
        with pytest.raises(ManifestError, match="damaged"):
            read_statistics(manifest)


def test_transparent_pixels_are_white() -> None:
    assert (
        read_pixels(_png(np.zeros((2, 2, 4), dtype=np.uint8)), "png").tolist()
        == [[[255] * 3] * 2] * 2
    )


@pytest.mark.parametrize(
    ("samples", "most"), [([3, 4, 5], 100), ([3, 4, 5], 5), ([1, 1000, 1], 7), ([2**40, 5], 9)]
)
def test_spread_rows_are_even(samples: list[int], most: int) -> None:
    rows = spread_rows(samples, most)
    assert sum(map(len, rows)) == min(most, sum(samples))
    starts = np.cumsum([0, *samples[:-1]])
    places = np.concatenate([start + part for start, part in zip(starts, rows, strict=True)])
    for part, number in zip(rows, samples, strict=True):
        assert not len(part) or (part.min() >= 0 and part.max() < number)
    gaps = np.diff(places)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
