"""A training step on the meta device, which stands in for a GPU.

Its tensors have no values, so whatever would wait for one fails, and host memory is the CPU's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode

from simmim.data.loader.batch import Batch
from simmim.engine.loop import training_step
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
