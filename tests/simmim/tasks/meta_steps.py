"""A training step on the meta device, which stands in for a GPU.

Its tensors have no values, so whatever would wait for one fails, and host memory is the CPU's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode

from simmim.data.loader.batch import Batch
from simmim.engine.loop import training_step
from simmim.recipe import parse
from simmim.tasks.all_tasks import task_named

DEVICE = torch.device("meta")
READS: dict[str, Callable[[Tensor], Any]] = {
    "__bool__": bool,
    "cpu": Tensor.cpu,
    "item": Tensor.item,
    "tolist": Tensor.tolist,
}


class Waits(TorchFunctionMode):
    """Record the calls that wait for the device: copies to it, unless asynchronous, and from it.

    Values that are read are zeros. There are generators of random numbers on the CPU alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []
        self.reads: list[str] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in READS and args[0].device == DEVICE:
            self.reads.append(f"{name} of shape {tuple(args[0].shape)}")
            return READS[name](torch.zeros_like(args[0], device="cpu"))
        if name == "rand" and kwargs.get("device") == torch.device("cpu"):
            kwargs = kwargs | {"device": DEVICE, "generator": None}
        result = function(*args, **kwargs)
        made = name in ("tensor", "as_tensor", "new_tensor", "to", "copy_", "type_as")
        if made and result.device == DEVICE and not kwargs.get("non_blocking"):
            source = args[1] if name == "copy_" else args[0]
            if not isinstance(source, Tensor) or source.device != DEVICE or name == "new_tensor":
                self.copies.append(f"{name} of shape {tuple(result.shape)}")
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


def take_step(values: dict[str, Any]) -> tuple[Waits, DeviceDecides]:
    """Take a step on the device; return what waits in a second one, and the optimiser."""
    task = task_named(values["task"], Path("test"))
    stage: Any = task.stage(parse(task.recipe, values, "test"))  # type: ignore[arg-type]
    accelerator = Accelerator(cpu=True)
    accelerator.state.device = DEVICE
    size = values["training"]["batch_size"]
    batches: list[Batch] = list(stage.batches(rank=0, world=1, start=0, end=2 * size))
    module = stage.module.to(DEVICE)
    optimizer = DeviceDecides(module.parameters(), lr=0.1)
    generator = torch.Generator()

    def step(batch: Batch) -> Waits:
        with Waits() as waits, mock.patch.object(torch, "Generator", return_value=generator):
            loss, norm = training_step(
                accelerator,
                module.train(),
                optimizer,
                [batch],
                clip_norm=5.0,
                normalisers=stage.normalisers,
            )
        assert {loss.device, norm.device} == {DEVICE}
        return waits

    step(batches[0])  # makes the tables
    return step(batches[1]), optimizer
