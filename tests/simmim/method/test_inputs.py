"""What people hand to SimMIM gives a result or an error that says what to do."""

from typing import Any

import numpy as np
import pytest
import torch

from simmim import SimMIM, random_mask
from swinv2 import SwinV2, SwinV2Config, build_encoder

CONFIG = SwinV2Config(image_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)
IMAGES, MASK = torch.rand(1, 3, 32, 32), torch.ones(1, 4, 4, dtype=torch.bool)


def test_float64_images_have_the_loss_of_float32_images() -> None:
    model = SimMIM(SwinV2(CONFIG), mask_cell=8)
    expected = model(IMAGES, MASK).loss.item()
    assert model(IMAGES.double(), MASK).loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("images", "mask", "word"),
    [
        (IMAGES[:0], MASK[:0], "one image or more"),
        (IMAGES[..., :0], MASK, "one image or more"),
        (np.zeros((1, 3, 32, 32), np.float32), MASK, "from_numpy"),
        (np.zeros((1, 3, 32, 32)), MASK, "from_numpy"),
        (IMAGES, MASK.numpy(), "the mask must be a tensor"),
        (IMAGES, None, "the mask must be a tensor"),
        ([IMAGES[0]], MASK, "must be a tensor"),
        (IMAGES.byte(), MASK, "floating point"),
        (IMAGES[0], MASK, "shape"),
        (torch.rand(1, 4, 32, 32), MASK, "3 channels"),
        (IMAGES.movedim(1, -1), MASK, "3 channels"),
        (IMAGES[..., :24], MASK, r"of shape \(1, 4, 3\)"),
        (IMAGES[..., :20], MASK, "a cell of 4 pixels"),
        (IMAGES[..., :31], MASK, "a multiple of 8 pixels"),
        (IMAGES, MASK.float(), "bool"),
        (IMAGES, MASK[0], "shape"),
    ],
)
def test_other_inputs_are_named(images: Any, mask: Any, word: str) -> None:
    model = SimMIM(SwinV2(CONFIG), mask_cell=8)
    for call in (model, model.mean_color_loss):
        with pytest.raises(ValueError, match=word):
            call(images, mask)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: SimMIM(None), "build_encoder"),  # type: ignore[type-var]
        (lambda: SimMIM("tiny"), "build_encoder"),  # type: ignore[type-var]
        (lambda: SimMIM(SwinV2(CONFIG), mask_cell="4"), "mask_cell is '4'"),  # type: ignore[arg-type]
        (lambda: SimMIM(SwinV2(CONFIG), mask_cell=4.0), "mask_cell is 4.0"),  # type: ignore[arg-type]
        (lambda: random_mask("2", (4, 4), 0.5), "batch is '2'"),  # type: ignore[arg-type]
        (lambda: random_mask(2, 4, 0.5), "rows and columns"),  # type: ignore[arg-type]
        (lambda: random_mask(2, (4, 4), "half"), "ratio is 'half'"),  # type: ignore[arg-type]
        (lambda: random_mask(2, (4, 4), 0.5, 3), "manual_seed"),  # type: ignore[arg-type]
        (lambda: build_encoder(None), "name of a variant"),  # type: ignore[arg-type]
        (lambda: SwinV2({"embed_dim": 8}), "SwinV2Config"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_other_types_are_named(call: Any, word: str) -> None:
    with pytest.raises(TypeError, match=word):
        call()


def test_numpy_numbers_are_numbers() -> None:
    mask = random_mask(np.int64(2), (np.int32(4), 4), np.float32(0.5))  # type: ignore[arg-type]
    assert mask.shape == (2, 4, 4)
    assert mask.sum() == 16
