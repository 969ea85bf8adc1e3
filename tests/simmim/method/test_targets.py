"""What is predicted: pixels as before, and features of a frozen encoder."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simmim import SimMIM, random_mask
from simmim.method.masking import enlarge_mask
from simmim.method.settings import LossArea, LossName, LossSettings
from simmim.method.targets import Features, NormalisedPixels, Pixels
from swinv2 import SwinV2, SwinV2Config

SIZES: dict[str, Any] = {"patch_size": 2, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}


def encoder(seed: int, **sizes: Any) -> SwinV2:
    torch.manual_seed(seed)
    return SwinV2(SwinV2Config(**{"image_size": 32, "embed_dim": 16, **SIZES, **sizes}))


def teacher(**sizes: Any) -> SwinV2:
    """An encoder with no trivial weight: in fresh ones every block is the identity."""
    built = encoder(1, **sizes)
    for parameter in built.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return built


GOLDEN = {
    (False, "l1", "masked"): (0.6291445960052858, 0.2520516213357719),
    (False, "l1", "all"): (0.6275995814172818, 0.250688257262013),
    (False, "smooth_l1", "masked"): (0.28287699014097584, 0.042254395997616656),
    (False, "l2", "all"): (0.5911244114593794, 0.08374013227378801),
    (True, "l1", "masked"): (0.9408081580213413, 0.8703391810162756),
    (True, "smooth_l1", "all"): (0.5384311114665432, 0.46140503163522495),
    (True, "l2", "masked"): (1.237015231889149, 1.0072489764998684),
}
"""Loss and baseline before targets were a choice, by norm_target, loss and area."""


@pytest.mark.parametrize("choice", GOLDEN)
@pytest.mark.parametrize("by_name", [False, True], ids=["norm_target", "target"])
def test_pixels_have_the_losses_they_had(
    choice: tuple[bool, LossName, LossArea], by_name: bool
) -> None:
    normalised, loss, area = choice
    torch.manual_seed(0)
    target = (NormalisedPixels if normalised else Pixels)(3) if by_name else None
    model = SimMIM(
        SwinV2(SwinV2Config(image_size=32, embed_dim=16, **SIZES)),
        mask_cell=8,
        norm_target=normalised and not by_name,
        loss=loss,
        loss_area=area,
        target=target,
    ).double()
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 40, 48, generator=generator, dtype=torch.float64)
    mask = random_mask(2, (5, 6), 0.6, torch.Generator().manual_seed(2))
    found = model(images, mask).loss.item(), model.mean_color_loss(images, mask).item()
    assert found == pytest.approx(GOLDEN[choice], rel=1e-12)


def expected_loss(model: SimMIM, frozen: SwinV2, images: Tensor, mask: Tensor) -> Tensor:
    """The loss by its definition: over the tokens of hidden cells, of all predicted channels."""
    with torch.no_grad():
        tokens = frozen(images)
    target = F.layer_norm(tokens, tokens.shape[-1:]).permute(0, 3, 1, 2)
    prediction = model(images, mask).reconstruction
    assert prediction.shape == target.shape
    hidden = enlarge_mask(mask, target.shape[2] // mask.shape[1])[:, None].expand_as(target)
    return (prediction - target).abs()[hidden].mean()


@pytest.mark.parametrize(
    ("student", "side"), [({}, 1), ({"depths": (1, 1, 1), "num_heads": (1, 1, 1)}, 2)]
)
def test_hidden_features_are_predicted(student: dict[str, Any], side: int) -> None:
    frozen = teacher(embed_dim=12)
    model = SimMIM(encoder(0, **student), mask_cell=8, target=Features(frozen))
    assert model.decoder.projection.weight.shape[0] == 24 * side**2
    images = torch.randn(3, 3, 40, 48, generator=torch.Generator().manual_seed(1))
    mask = random_mask(3, (5, 6), 0.6, torch.Generator().manual_seed(2))
    loss = model(images, mask).loss
    torch.testing.assert_close(loss, expected_loss(model, frozen, images, mask))
    loss.backward()
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen.training


def test_the_frozen_encoder_is_no_part_of_the_model() -> None:
    plain = SimMIM(encoder(0), mask_cell=8)
    model = SimMIM(encoder(0), mask_cell=8, target=Features(teacher()))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    assert len(list(model.modules())) == len(list(plain.modules()))
    assert not model.train().target.encoder.training  # type: ignore[attr-defined]


def test_images_are_normalised_as_the_frozen_encoder_was_trained() -> None:
    frozen = teacher(in_channels=1)
    images = torch.randn(2, 1, 32, 32)
    converted = Features(frozen, scale=(2.0,), shift=(-0.5,))(images)
    torch.testing.assert_close(converted, Features(frozen)(images * 2 - 0.5))


@pytest.mark.parametrize(
    ("cell", "student", "message"),
    [
        (2, {}, "mask cells are of 2 pixels: choose a multiple of 4"),
        (8, {"patch_size": 1}, "features of the encoder are of 2 pixels"),
    ],
)
def test_targets_of_a_larger_stride_are_refused(
    cell: int, student: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SimMIM(encoder(0, **student), mask_cell=cell, target=Features(teacher()))


def test_two_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="norm_target is for pixels"):
        SimMIM(encoder(0), mask_cell=8, norm_target=True, target=Pixels(3))
    with pytest.raises(ValueError, match="leave one of them out"):
        LossSettings(norm_target=True, target="features", target_encoder="somewhere")
    with pytest.raises(ValueError, match="name their encoder directory in target_encoder"):
        LossSettings(target="features")
    with pytest.raises(ValueError, match="set target to features"):
        LossSettings(target_encoder="somewhere")


def test_names_of_targets() -> None:
    assert LossSettings().target_name == "pixels"
    assert LossSettings(norm_target=True).target_name == "normalised_pixels"
    assert LossSettings(norm_target=True, target="normalised_pixels").target_name == (
        LossSettings(target="normalised_pixels").target_name
    )
