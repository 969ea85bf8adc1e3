"""One of two ranks: validate, probe and draw with a module that is whole, and in shards.

Started by torchrun with a recipe, a folder and a precision; prints the figures of both.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh

from simmim.engine.distributed.launcher import run_as_rank
from simmim.engine.distributed.sharding import gathered, shard_by_block
from simmim.engine.monitor.observers import PROBE
from simmim.engine.run import RunFolder
from simmim.recipe import load
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage


def main(config: Path, folder: Path, precision: str) -> int:
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    found = []
    for name in ("whole", "sharded"):
        stage = PretrainStage(load(PretrainRecipe, config))
        for parameter in stage.module.parameters():
            parameter.data.add_(
                0.02 * torch.sin(torch.arange(parameter.numel()).view_as(parameter))
            )
        if name == "sharded":
            mesh = init_device_mesh("cpu", (accelerator.num_processes,))
            dtype = torch.bfloat16 if precision == "bf16" else None
            shard_by_block(stage.module, mesh, param_dtype=dtype)
        run = RunFolder(path=folder / name)
        stage.module.eval()
        with torch.no_grad(), gathered(stage.module):
            with accelerator.autocast():  # training's forward has it in itself
                figures = stage.validate(accelerator)
            probe = stage.watch.observer(PROBE)
            assert probe is not None
            figures |= probe.observe(accelerator, run, 1).figures
            if accelerator.is_main_process:  # the other one has nothing to compute
                assert stage.visualize(accelerator, run, 1) is not None
        found.append(figures)
    if accelerator.is_main_process:
        sys.stdout.write(json.dumps(found) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_as_rank(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
