"""What an export's README says of the preparation of pictures."""

import pytest

from swinv2.bridges.preprocessing import Preparation, sentences
from swinv2.config import variant_config


@pytest.mark.parametrize(
    ("crop", "size", "words"),
    [
        (1.0, (192, 192), "the central square is cropped"),
        (0.875, (192, 192), "the central 0.875 of the short side is cropped"),
        (1.0, (192, 256), "of that aspect ratio is cropped"),
    ],
)
def test_the_crop_is_named(crop: float, size: tuple[int, int], words: str) -> None:
    config = variant_config("tiny", image_size=size)
    text = sentences(config, Preparation(crop_pct=crop))
    assert words in text
    assert f"{size[1]}x{size[0]}" in text
