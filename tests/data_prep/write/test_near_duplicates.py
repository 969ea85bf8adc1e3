"""Near duplicates agree with brute force."""

import importlib.util
import io
import json
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep.write.build import build_shards
from data_prep.write.duplicates import SimilarImages, perceptual_hash
from data_prep.write.options import ShardOptions


@given(st.integers(0, 16), st.lists(st.integers(0, 2**64 - 1), max_size=8), st.data())
def test_near_duplicates_agree_with_brute_force(
    distance: int, values: list[int], data: st.DataObject
) -> None:
    base = data.draw(st.sampled_from(values)) if values else 0
    for bit in data.draw(st.sets(st.integers(0, 63), max_size=20)):
        base ^= 1 << bit
    with closing(SimilarImages(distance, Path(tempfile.gettempdir()))) as similar:
        for number, value in enumerate(values):
            assert similar.find(value) == brute_force(values[:number], value, distance)
            similar.add(value, f"ä\n\udcff{number}")
        assert similar.find(base) == brute_force(values, base, distance)


def brute_force(values: list[int], value: int, distance: int) -> str | None:
    near = (n for n, other in enumerate(values) if (value ^ other).bit_count() <= distance)
    first = next(near, None)
    return None if first is None else f"ä\n\udcff{first}"


def _write(path: Path, seed: int, quality: int) -> None:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC).save(path, quality=quality)


def test_images_of_16_bits_are_compared_by_their_content() -> None:
    pytest.importorskip("imagehash")
    hashes = []
    for seed in range(2):
        buffer = io.BytesIO()
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 6), dtype=np.uint8)
        large = Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)
        Image.fromarray(np.asarray(large).astype(np.uint16) * 16 + 1000).save(buffer, "PNG")
        found = perceptual_hash(buffer.getvalue(), max_pixels=10_000)
        hashes.append(found)
        assert found is not None
        buffer = io.BytesIO()
        large.save(buffer, "PNG")
        other = perceptual_hash(buffer.getvalue(), max_pixels=10_000)
        assert other is not None
        assert (found ^ other).bit_count() <= 6
    assert (hashes[0] ^ hashes[1]).bit_count() > 6
    assert perceptual_hash(b"no image", max_pixels=10_000) is None


def test_a_second_encoding_of_an_image_is_a_near_duplicate(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, seed, quality in (("b", 0, 90), ("a", 0, 60), ("c", 1, 90)):
        _write(tmp_path / "in" / f"{name}.jpg", seed, quality)
    options = ShardOptions(near_duplicates=6)
    if importlib.util.find_spec("imagehash") is None:
        with pytest.raises(ValueError, match=r"pip install 'simmim\[dedup\]'"):
            build_shards(tmp_path / "in", tmp_path / "out", options)
        assert not (tmp_path / "out").exists()
        return
    built = build_shards(tmp_path / "in", tmp_path / "out", options)
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"path": "b.jpg", "reason": "a near duplicate of a.jpg"}
    ]
    assert built.found == 3
