"""The picture that exports are compared on is a real one, whatever is left of a run."""

from pathlib import Path

import pytest
import torch

from simmim.data.datasets.shards import ShardSet
from simmim.data.transforms.cropping import center_crop_resize
from simmim.data.transforms.decoding import decode_pixels
from simmim.export.trial_image import trial_image
from swinv2 import SwinV2Config

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def config(channels: int = 3, size: int | tuple[int, int] = 16) -> SwinV2Config:
    return SwinV2Config(
        embed_dim=8, depths=(1,), num_heads=(1,), image_size=size, in_channels=channels
    )


def test_it_is_the_first_image_of_the_shards(shards: Path) -> None:
    trial = trial_image(config(), MEAN, STD, shards)
    sample = ShardSet(shards).read(0, 0)
    pixels = center_crop_resize(decode_pixels(sample.image, "png").pixels, (16, 16))
    expected = (pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(trial.images[0], expected)
    assert trial.origin == f"{sample.name} of {shards}"
    assert trial_image(config(channels=4), (0.5,) * 4, (0.5,) * 4, shards).images.shape[1] == 4


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [8, 48, (32, 64)])
def test_without_shards_it_is_drawn(channels: int, size: int | tuple[int, int]) -> None:
    described = config(channels, size)
    trial = trial_image(described, (0.5,) * channels, (0.25,) * channels)
    assert trial.images.shape == (1, channels, *described.image_size)
    assert trial.origin == "a drawn image"
    assert trial.images.std() > 0.1
    assert float(trial.images.abs().max()) <= 2
    again = trial_image(described, (0.5,) * channels, (0.25,) * channels)
    assert torch.equal(trial.images, again.images)
    # Neighbours are alike in a picture, and not in noise.
    assert trial.images.diff(dim=-1).abs().mean() < 0.8 * trial.images.std()


def test_without_readable_shards_an_image_is_drawn(shards: Path, tmp_path: Path) -> None:
    drawn = trial_image(config(), MEAN, STD)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").write_text("{}")
    for place in (tmp_path / "gone", tmp_path / "shards"):
        trial = trial_image(config(), MEAN, STD, place)
        assert torch.equal(trial.images, drawn.images)
        assert trial.origin == drawn.origin
