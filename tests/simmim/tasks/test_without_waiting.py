"""A training step gives the device its work without waiting for any result of it.

The meta device stands in for a GPU: its tensors have no values, so whatever would wait for one
fails, and host memory is the CPU's.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

from simmim.data.loader.batch import Batch
from simmim.engine.loop import training_step
from simmim.engine.optimizer import step_if_finite
from simmim.recipe import parse
from simmim.tasks.all_tasks import task_named

DEVICE = torch.device("meta")


class BlockingCopies(TorchFunctionMode):
    """Record the calls that copy to the device and wait until it has the copy."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        made = name in ("tensor", "as_tensor", "new_tensor", "to", "copy_", "type_as")
        if made and result.device == DEVICE and not kwargs.get("non_blocking"):
            source = args[1] if name == "copy_" else args[0]
            if not isinstance(source, Tensor) or source.device != DEVICE or name == "new_tensor":
                self.found.append(f"{name} of shape {tuple(result.shape)}")
        return result


class DeviceDecides(torch.optim.SGD):
    """An optimiser that decides on the device whether to skip a step."""

    _step_supports_amp_scaling = True
    found_inf: Tensor
    seen: torch.device | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen = self.found_inf.device
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.sub_((1 - self.found_inf) * parameter.grad)


def take_step(values: dict[str, Any]) -> tuple[list[str], DeviceDecides]:
    """Take a step on the device; return the blocking copies of a second one."""
    task = task_named(values["task"], Path("test"))
    stage: Any = task.stage(parse(task.recipe, values, "test"))  # type: ignore[arg-type]
    accelerator = Accelerator(cpu=True)
    accelerator.state.device = DEVICE
    size = values["training"]["batch_size"]
    batches: list[Batch] = list(stage.batches(rank=0, world=1, start=0, end=2 * size))
    module = stage.module.to(DEVICE).train()
    optimizer = DeviceDecides(module.parameters(), lr=0.1)

    def step(batch: Batch) -> None:
        loss, norm = training_step(
            accelerator,
            module,
            optimizer,
            [batch],
            clip_norm=5.0,
            normalisers=stage.normalisers,
        )
        assert {loss.device, norm.device} == {DEVICE}

    step(batches[0])  # makes the tables
    with BlockingCopies() as copies:
        step(batches[1])
    return copies.found, optimizer


@pytest.mark.parametrize("loss", [{"area": "masked"}, {"area": "all", "norm_target": True}])
def test_a_step_of_pretraining_waits_for_nothing(
    pretrain_values: dict[str, Any], loss: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Autocast does not know the meta device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device: False)
    blocking, optimizer = take_step(pretrain_values | {"loss": loss})
    assert not blocking
    assert optimizer.seen == DEVICE


@pytest.mark.parametrize("augmentation", [{}, {"mixup": 0.8, "cutmix": 1.0}])
def test_a_step_of_classification_waits_for_nothing(
    classification_values: dict[str, Any], augmentation: dict[str, Any]
) -> None:
    blocking, _ = take_step(classification_values | {"augmentation": augmentation})
    assert not blocking


def test_a_step_of_segmentation_waits_for_nothing(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="needs simmim[finetune]")
    random = np.random.default_rng(0)
    for number in range(16):
        for folder, shape in (("images", (32, 32, 3)), ("annotations", (32, 32))):
            file = tmp_path / "scenes" / folder / "training" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 3, shape, dtype=np.uint8)).save(file)
    data = {"folder": str(tmp_path / "scenes"), "validation": None, "num_classes": 3}
    sizes = {"image_size": 32, "workers": 0, "largest_class": 1.0}
    values = {
        "task": "segmentation",
        "encoder": classification_values["encoder"] | {"depths": [1, 1, 1, 1]},
        "data": data | sizes,
        "head": {"channels": 8, "auxiliary_channels": 8},
        "training": {"batch_size": 4, "steps": 2, "optimizer": {"lr": 1e-3}},
    }
    values["encoder"] |= {"num_heads": [1, 2, 2, 2], "window_size": 4, "patch_size": 2}
    blocking, _ = take_step(values)
    assert not blocking


@pytest.mark.parametrize("norm", [np.nan, np.inf])
def test_a_fused_optimiser_skips_a_step_on_its_own(norm: float) -> None:
    weight = torch.nn.Parameter(torch.arange(3.0))
    fused = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for value in (1.0, norm):
        weight.grad = torch.full((3,), value)
        before = weight.detach().clone(), copy.deepcopy(fused.state_dict()["state"])
        step_if_finite(fused, weight.grad.norm())
    assert torch.equal(weight, before[0])
    for name, moment in before[1][0].items():
        assert torch.equal(moment, fused.state[weight][name]), name
    assert fused.state[weight]["step"] == 1
    weight.grad = torch.ones(3)
    step_if_finite(fused, weight.grad.norm())
    assert not torch.equal(weight, before[0])
    assert not hasattr(fused, "found_inf")
