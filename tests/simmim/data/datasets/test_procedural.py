from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simmim.data.datasets.procedural import SHAPES, draw_images, render


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_classes_are_folders_of_the_same_number_of_images(tmp_path: Path) -> None:
    draw_images(tmp_path / "images", count=40, size=32, seed=0)
    paths = sorted((tmp_path / "images").rglob("*.png"))
    assert Counter(path.parent.name for path in paths) == dict.fromkeys(SHAPES, 5)
    for path in paths:
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((32, 32), "RGB")


def test_an_image_depends_on_seed_size_and_number_alone(tmp_path: Path) -> None:
    for name, count, seed in [("few", 10, 1), ("many", 100, 1), ("other", 10, 2)]:
        draw_images(tmp_path / name, count=count, size=24, seed=seed)
    few, many, other = (contents(tmp_path / name) for name in ("few", "many", "other"))
    assert few.items() <= many.items()
    assert len(set(many.values())) == 100
    assert not few.items() & other.items()


def test_drawing_again_completes_and_keeps_existing_files(tmp_path: Path) -> None:
    draw_images(tmp_path, count=20, size=24, seed=0)
    whole = contents(tmp_path)
    kept, lost, cut = sorted(tmp_path.rglob("*.png"))[:3]
    before = kept.stat().st_mtime_ns
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:50])
    draw_images(tmp_path, count=20, size=24, seed=0)
    assert contents(tmp_path) == whole
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_sharp_inside_the_image_and_different(shape: str) -> None:
    axis = (np.arange(200, dtype=np.float32) + 0.5) / 100 - 1
    x, y = axis[None, :], axis[:, None]
    inside = SHAPES[shape](x, y) < 0
    assert 0.1 < inside.mean() < 0.75
    assert not inside[np.hypot(x, y) > 1.3].any()
    for other in SHAPES.keys() - {shape}:
        assert ((SHAPES[other](x, y) < 0) != inside).mean() > 0.02


def test_color_alone_does_not_determine_the_class() -> None:
    """The nearest mean colour of a class is right about as often as a guess is."""
    colors = np.stack(
        [
            render(name, range(place, 1600, len(SHAPES)), 16, seed=0).mean(axis=(1, 2))
            for place, name in enumerate(SHAPES)
        ]
    )
    means = colors[:, :100].mean(axis=1)
    distance = np.square(colors[:, 100:, None] - means).sum(axis=-1)
    right = distance.argmin(axis=-1) == np.arange(len(SHAPES))[:, None]
    assert right.mean() < 0.25


def test_shapes_contrast_with_the_background() -> None:
    images = render("disc", range(0, 400, 8), 32, seed=0).astype(np.float64)
    assert images.std(axis=(1, 2)).mean(axis=1).min() > 15


def test_impossible_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"count is .*at least 1"):
        draw_images(tmp_path, count=0, size=32, seed=0)
    with pytest.raises(ValueError, match="size is 8 pixels"):
        draw_images(tmp_path, count=1, size=8, seed=0)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"contains notes\.txt"):
        draw_images(tmp_path, count=1, size=32, seed=0)
    with pytest.raises(ValueError, match="is a file"):
        draw_images(tmp_path / "notes.txt", count=1, size=32, seed=0)
    assert contents(tmp_path) == {"notes.txt": b"mine"}
