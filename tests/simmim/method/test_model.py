from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim import SimMIM, random_mask
from simmim.method.losses import l1, masked_mean
from simmim.method.masking import enlarge_mask
from simmim.method.targets import normalise_target
from swinv2 import SwinV2, build_encoder

SMALL: dict[str, Any] = {"embed_dim": 12, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4)}


def small_encoder(**overrides: Any) -> SwinV2:
    torch.manual_seed(0)
    encoder = build_encoder("tiny", **{**SMALL, "image_size": 64, "window_size": 4, **overrides})
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.5)
    return encoder.double()


def small_model(
    mask_cell: int = 16, *, encoder: dict[str, Any] | None = None, **choices: Any
) -> SimMIM:
    return SimMIM(small_encoder(**(encoder or {})), mask_cell, **choices).double()


def batch(model: SimMIM, *size: int, ratio: float = 0.6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    channels = model.encoder.config.in_channels
    images = torch.randn(2, channels, *size, generator=generator, dtype=torch.float64)
    grid = (size[0] // model.mask_cell, size[1] // model.mask_cell)
    return images, random_mask(2, grid, ratio, generator)


def decode_everything(model: SimMIM, images: Tensor, mask: Tensor) -> Tensor:
    """The method as the paper writes it: convolve the whole map, then PixelShuffle."""
    patch = model.encoder.config.patch_size
    hidden = enlarge_mask(mask, model.mask_cell // patch)[..., None].double()
    tokens = model.encoder.embed(images)
    features = model.encoder.encode(tokens * (1 - hidden) + model.mask_token * hidden)
    pixels = model.decoder.projection(features.permute(0, 3, 1, 2))
    whole = F.pixel_shuffle(pixels, model.encoder.strides[-1])
    return whole[:, :, : images.shape[2], : images.shape[3]]


CASES = [
    pytest.param(16, (64, 64), {}, id="cells smaller than the stride"),
    pytest.param(32, (64, 96), {"image_size": (64, 96)}, id="cells of one stride, not square"),
    pytest.param(64, (64, 128), {}, id="cells larger than the stride"),
    pytest.param(8, (40, 72), {}, id="sizes that the stride does not divide"),
    pytest.param(4, (32, 32), {"image_size": 32, "patch_size": 2, "in_channels": 1}, id="patch 2"),
]


@pytest.mark.parametrize(("cell", "size", "encoder"), CASES)
@pytest.mark.parametrize("norm_target", [False, True])
@pytest.mark.parametrize("area", ["masked", "all"])
def test_loss_equals_that_of_decoding_everything(
    cell: int, size: tuple[int, int], encoder: dict[str, Any], norm_target: bool, area: str
) -> None:
    model = small_model(cell, encoder=encoder, norm_target=norm_target, loss_area=area)
    images, mask = batch(model, *size, ratio=0.3)
    output = model(images, mask)
    whole = decode_everything(model, images, mask)
    target = normalise_target(images) if norm_target else images
    counted = enlarge_mask(mask, cell)
    counted = counted if area == "masked" else torch.ones_like(counted)
    loss = masked_mean(l1(whole, target), counted)
    torch.testing.assert_close(output.reconstruction, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.loss, loss, rtol=1e-12, atol=0)

    parameters = list(model.parameters())
    fast = torch.autograd.grad(output.loss, parameters)
    full = torch.autograd.grad(loss, parameters)
    for first, second in zip(fast, full, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def test_only_what_the_loss_needs_is_decoded() -> None:
    model = small_model(32)
    images, mask = batch(model, 64, 128, ratio=0.25)
    decoded: list[int] = []
    decode = model.decoder.patches

    def count(features: Tensor) -> Tensor:
        decoded.append(features.shape[0])
        return decode(features)

    model.decoder.patches = count  # type: ignore[method-assign]
    model(images, mask)
    assert decoded == [int(mask.sum())]


def test_hidden_pixels_do_not_reach_the_prediction() -> None:
    model = small_model()
    images, mask = batch(model, 64, 64)
    hidden = enlarge_mask(mask, 16)[:, None]
    other = torch.where(hidden, torch.randn_like(images), images)
    first, second = model(images, mask), model(other, mask)
    assert torch.equal(first.reconstruction, second.reconstruction)
    assert first.loss != second.loss
    visible = torch.where(hidden, images, images + 1)
    assert not torch.equal(model(visible, mask).reconstruction, first.reconstruction)


def test_every_parameter_learns() -> None:
    model = small_model()
    model(*batch(model, 64, 64)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_parameters_have_the_names_of_the_contract() -> None:
    model = small_model()
    own = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if not name.startswith("encoder.")
    }
    assert own == {
        "mask_token": (1, 1, 1, 12),
        "decoder.projection.weight": (3 * 32 * 32, 96, 1, 1),
        "decoder.projection.bias": (3 * 32 * 32,),
    }


def test_a_few_steps_beat_the_mean_color() -> None:
    torch.manual_seed(0)
    model = SimMIM(build_encoder("tiny", **SMALL, image_size=64, window_size=4), mask_cell=16)
    ramp = torch.linspace(-2, 2, 64)
    images = torch.stack([ramp + shift for shift in torch.linspace(-1, 1, 4)])
    images = images[:, None, :, None].expand(4, 3, 64, 64).contiguous()
    mask = random_mask(4, (4, 4), 0.6, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(50):
        optimizer.zero_grad()
        model(images, mask).loss.backward()
        optimizer.step()
    assert model(images, mask).loss < 0.7 * model.mean_color_loss(images, mask)


def test_the_loss_is_in_full_precision_under_autocast() -> None:
    model = small_model().float()
    images, mask = batch(model, 64, 64)
    exact = model(images.float(), mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(images.float(), mask)
    assert rounded.loss.dtype == torch.float32
    torch.testing.assert_close(rounded.loss, exact.loss, rtol=2e-2, atol=0)
    # Looked at after autocast has ended, as the loop does.
    torch.testing.assert_close(rounded.reconstruction, exact.reconstruction, rtol=0.1, atol=0.1)


def test_the_loss_without_masked_cells_is_zero() -> None:
    model = small_model()
    images, _ = batch(model, 64, 64)
    output = model(images, torch.zeros(2, 4, 4, dtype=torch.bool))
    output.loss.backward()
    assert output.loss == 0


@pytest.mark.parametrize(
    ("cell", "choices", "message"),
    [
        (18, {}, "choose a multiple of 4"),
        (0, {}, "choose a multiple of 4"),
        (48, {}, "do not divide an image of 64x64 pixels: choose a cell of 4, 8, 16, 32, 64"),
        (16, {"loss": "huber"}, "choose l1, smooth_l1 or l2"),
        (16, {"loss_area": "visible"}, "choose masked or all"),
    ],
)
def test_impossible_choices_are_refused(cell: int, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(cell, **choices)


def test_masks_that_do_not_fit_are_refused() -> None:
    model = small_model()
    images, mask = batch(model, 64, 64)
    for wrong in (mask[:1], mask[:, :3], mask.int(), mask[0]):
        with pytest.raises(ValueError, match=r"bool mask of shape \(2, 4, 4\)"):
            model(images, wrong)
    with pytest.raises(ValueError, match="do not divide an image of 64x72"):
        model(F.pad(images, (0, 8)), mask)
    with pytest.raises(ValueError, match="channels, height, width"):
        model(images[0], mask)
