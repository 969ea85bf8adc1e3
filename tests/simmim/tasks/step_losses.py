"""The loss and gradient of one optimiser step of many recipes, on one or several processes.

Started by torchrun with a JSON file of recipes by name; rank 0 prints the results.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from simmim.engine.devices import prepare
from simmim.engine.distributed.launcher import run_as_rank
from simmim.engine.loop import accumulate_gradients
from simmim.recipe import parse
from simmim.tasks.all_tasks import task_named


def without_batch_norms(module: nn.Module) -> None:
    """Leave out what sees the micro-batch of a process, and no other, by its nature."""
    for part in list(module.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(part, name, nn.Identity())


def step(values: dict[str, Any], accumulation: int, accelerator: Accelerator) -> dict[str, float]:
    """Return the loss of the first batch, the norm of its gradient and two projections of it."""
    values = values | {"training": values["training"] | {"accumulation": accumulation}}
    task = task_named(values["task"], Path("test"))
    stage: Any = task.stage(parse(task.recipe, values, "test"))  # type: ignore[arg-type]
    without_batch_norms(stage.module)
    module, _ = prepare(stage, accelerator)
    module.train()
    rank, world = accelerator.process_index, accelerator.num_processes
    size = values["training"]["batch_size"]
    batches = list(stage.batches(rank=rank, world=world, start=0, end=size))
    assert len(batches) == accumulation
    loss = accumulate_gradients(accelerator, module, batches, stage.normalisers)
    gradients = [part.grad for part in stage.module.parameters() if part.grad is not None]
    gradient = torch.cat([part.flatten() for part in gradients]).double()
    places = torch.arange(len(gradient)).double()
    return {
        "loss": float(accelerator.reduce(loss, "mean")),
        "norm": float(gradient.norm()),
        "sines": float(gradient @ places.sin()),
        "cosines": float(gradient @ places.cos()),
    }


def main(file: Path) -> int:
    accelerator = Accelerator(cpu=True)
    found = {}
    for name, (values, accumulations) in json.loads(file.read_text()).items():
        for accumulation in accumulations:
            found[f"{name}/{accumulation}"] = step(values, accumulation, accelerator)
    if accelerator.is_main_process:
        sys.stdout.write(json.dumps(found) + "\n")
    if accelerator.num_processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_as_rank(lambda: main(Path(sys.argv[1])))
