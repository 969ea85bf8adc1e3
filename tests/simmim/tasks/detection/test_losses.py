"""Losses of the heads are transformers' own, where these do not depend on how a batch is cut."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("transformers", reason="needs simmim[finetune]")
pytest.importorskip("scipy", reason="needs simmim[finetune]")

from simmim.data.transforms.image_transforms import Instances
from simmim.tasks.detection.heads import build_detector
from simmim.tasks.detection.recipe import DetectionHead
from swinv2 import build_encoder

SIDE, POINTS = 32, 64


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
    head = DetectionHead(kind=kind, channels=32, queries=5, decoder_layers=3, points=POINTS)
    return build_detector(encoder, ["a", "b"], head)


def objects(count: int) -> Instances:
    corners = torch.arange(count)[:, None] + torch.tensor([[1.0, 2.0, 12.0, 17.0]])
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    for row in range(count):
        masks[row, 2 + row : 17 + row, 1 + row : 12 + row] = True
    labels = torch.arange(count) % 2
    return Instances(labels=labels, boxes=corners, masks=masks, image=torch.tensor([1, SIDE, SIDE]))


class FixedPoints(TorchFunctionMode):
    """Draw the same points for every mask and layer, whoever draws how many at once."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is torch.rand and args[-1] == 2:
            points = torch.rand(3 * POINTS, 2, generator=torch.Generator().manual_seed(0))
            return points[torch.arange(args[-2]) % len(points)].expand(args).contiguous()
        return function(*args, **(kwargs or {}))


def ours(model: Any, images: torch.Tensor, targets: list[Instances]) -> torch.Tensor:
    seeds = list(range(len(images)))
    return model.loss(images, targets, seeds=seeds, normalisers=model.normalisers(targets))


def theirs(model: Any, images: torch.Tensor, targets: list[Instances]) -> torch.Tensor:
    torch.manual_seed(0)
    if model.has_masks:
        masks = [one.masks.to(images.dtype) for one in targets]
        labels = [one.labels for one in targets]
        found = model.net(pixel_values=images, mask_labels=masks, class_labels=labels)
        return found.loss.squeeze()
    boxes = []
    for one in targets:
        left_top, right_bottom = one.boxes.to(images.dtype).chunk(2, dim=1)
        centred = [(left_top + right_bottom) / 2, right_bottom - left_top]
        boxes.append(torch.cat(centred, dim=1) / SIDE)
    labels = [
        {"class_labels": one.labels, "boxes": box} for one, box in zip(targets, boxes, strict=True)
    ]
    return model.net(pixel_values=images, labels=labels).loss


def assert_same_loss_and_gradient(
    model: Any, images: torch.Tensor, targets: list[Instances], **tolerances: float
) -> None:
    found = []
    for loss_of in (ours, theirs):
        model.zero_grad()
        model.train(model.training)  # our loss skips a part of training
        with FixedPoints():
            loss = loss_of(model, images, targets)
        loss.backward()
        gradients = [
            torch.zeros_like(one) if one.grad is None else one.grad for one in model.parameters()
        ]
        found.append((loss.detach(), torch.cat([one.flatten() for one in gradients])))
    (our_loss, our_gradient), (their_loss, their_gradient) = found
    torch.testing.assert_close(our_loss, their_loss)
    largest = their_gradient.abs().max()
    torch.testing.assert_close(our_gradient / largest, their_gradient / largest, **tolerances)


def random_images(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, SIDE, SIDE, generator=generator, dtype=dtype)


@pytest.fixture(params=[torch.float32, torch.float64])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The type in which models are built and transformers draws points."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


TOLERANCES = {
    torch.float32: {"rtol": 0.0, "atol": 1e-5},
    torch.float64: {"rtol": 0.0, "atol": 1e-12},
}


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["mask2former", "rt_detr"])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_loss_of_an_image_is_that_of_transformers(
    kind: str, count: int, dtype: torch.dtype
) -> None:
    """With 7 objects for 5 queries, too; and with noised boxes."""
    model, images = model_of(kind).train(), random_images(1, dtype)
    assert_same_loss_and_gradient(model, images, [objects(count)], **TOLERANCES[dtype])


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["mask2former", "rt_detr"])
def test_the_loss_of_a_batch_without_noised_boxes_is_that_of_transformers(
    kind: str, dtype: torch.dtype
) -> None:
    model, targets = model_of(kind).eval(), [objects(2), objects(0), objects(7), objects(1)]
    images = random_images(4, dtype)
    assert_same_loss_and_gradient(model, images, targets, **TOLERANCES[dtype])


@pytest.mark.parametrize("kind", ["mask2former", "rt_detr"])
def test_a_batch_without_objects_has_gradients_of_the_same_parameters(kind: str) -> None:
    """Since DDP waits for those of all parameters that it saw first."""
    model, names = model_of(kind).train(), []
    for count in (2, 0):
        model.zero_grad(set_to_none=True)
        targets = [objects(count), objects(count)]
        model.loss(random_images(2), targets, seeds=[0, 1], normalisers=torch.ones(2)).backward()
        names.append([name for name, one in model.named_parameters() if one.grad is not None])
    assert names[0] == names[1]


class CostTypes(TorchFunctionMode):
    """Record the types of tensors that are copied to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.dtype] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is torch.Tensor.cpu:
            self.found.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["mask2former", "rt_detr"])
def test_costs_and_losses_are_float32_under_autocast(kind: str) -> None:
    model, targets = model_of(kind).train(), [objects(2), objects(3)]
    with torch.autocast("cpu", torch.bfloat16), CostTypes() as costs:
        loss = ours(model, random_images(2), targets)
    assert costs.found == [torch.float32]
    assert loss.dtype == torch.float32
    assert loss.isfinite()


@pytest.mark.parametrize("kind", ["mask2former", "rt_detr"])
def test_nan_predictions_have_a_nan_loss(kind: str) -> None:
    model = model_of(kind).train()
    weight = next(one for name, one in model.named_parameters() if name.endswith("fc1.weight"))
    with torch.no_grad():
        weight.fill_(torch.nan)
    assert ours(model, random_images(2), [objects(2), objects(7)]).isnan()


@pytest.mark.peer
def test_noised_boxes_are_those_of_transformers_for_equal_numbers_of_objects() -> None:
    """Then there is no padding; every image has the random numbers of its own seed."""
    model, targets = model_of("rt_detr").train(), [objects(3), objects(3)]
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval()
    image = random_images(1)
    twice = model.loss(
        image.expand(2, -1, -1, -1),
        targets,
        seeds=[0, 0],
        normalisers=model.normalisers(targets),
    )
    torch.testing.assert_close(twice, theirs(model, image, targets[:1]))
