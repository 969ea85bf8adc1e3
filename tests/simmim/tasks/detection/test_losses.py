"""Losses of the heads are transformers' own, where these do not depend on how a batch is cut."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs simmim[finetune]")
pytest.importorskip("scipy", reason="needs simmim[finetune]")

from simmim.data.transforms.image_transforms import Instances
from simmim.tasks.detection.heads import build_detector
from simmim.tasks.detection.recipe import DetectionHead
from swinv2 import build_encoder

SIDE = 32


def model_of(kind: Any) -> Any:
    torch.manual_seed(0)
    encoder = build_encoder(
        "tiny",
        image_size=SIDE,
        patch_size=2,
        window_size=4,
        embed_dim=8,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 1, 1),
    )
    head = DetectionHead(kind=kind, channels=32, queries=5, decoder_layers=3, points=64)
    return build_detector(encoder, ["a", "b"], head)


def objects(count: int) -> Instances:
    corners = torch.arange(count)[:, None] + torch.tensor([[1.0, 2.0, 12.0, 17.0]])
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    for row in range(count):
        masks[row, 2 + row : 17 + row, 1 + row : 12 + row] = True
    labels = torch.arange(count) % 2
    return Instances(labels=labels, boxes=corners, masks=masks, image=torch.tensor([1, SIDE, SIDE]))


def ours(model: Any, images: torch.Tensor, targets: list[Instances]) -> torch.Tensor:
    seeds = list(range(len(images)))
    return model.loss(images, targets, seeds=seeds, normalisers=model.normalisers(targets))


def theirs(model: Any, images: torch.Tensor, targets: list[Instances]) -> torch.Tensor:
    torch.manual_seed(0)
    if model.has_masks:
        masks, labels = [one.masks.float() for one in targets], [one.labels for one in targets]
        # Its decoder draws numbers before the loss does.
        model.net.criterion.register_forward_pre_hook(lambda *_: torch.manual_seed(0) and None)
        found = model.net(pixel_values=images, mask_labels=masks, class_labels=labels)
        return found.loss.squeeze()
    boxes = []
    for one in targets:
        left_top, right_bottom = one.boxes.chunk(2, dim=1)
        centred = [(left_top + right_bottom) / 2, right_bottom - left_top]
        boxes.append(torch.cat(centred, dim=1) / SIDE)
    labels = [
        {"class_labels": one.labels, "boxes": box} for one, box in zip(targets, boxes, strict=True)
    ]
    return model.net(pixel_values=images, labels=labels).loss


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["mask2former", "rt_detr"])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_loss_of_an_image_is_that_of_transformers(kind: str, count: int) -> None:
    model, targets = model_of(kind).train(), [objects(count)]
    images = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(model, images, targets), theirs(model, images, targets))


@pytest.mark.peer
def test_the_loss_of_a_batch_without_noised_boxes_is_that_of_transformers() -> None:
    model, targets = model_of("rt_detr").eval(), [objects(2), objects(0), objects(5)]
    images = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(model, images, targets), theirs(model, images, targets))


@pytest.mark.peer
def test_noised_boxes_are_those_of_transformers_for_equal_numbers_of_objects() -> None:
    """Then there is no padding; every image has the random numbers of its own seed."""
    model, targets = model_of("rt_detr").train(), [objects(3), objects(3)]
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval()
    image = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    twice = model.loss(
        image.expand(2, -1, -1, -1),
        targets,
        seeds=[0, 0],
        normalisers=model.normalisers(targets),
    )
    torch.testing.assert_close(twice, theirs(model, image, targets[:1]))
