"""One of two ranks: train a partly frozen model unsharded and sharded, on the same images.

Prints the largest difference of trained weights, and of frozen ones from their start.
"""

import json
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from simmim.engine.distributed.launcher import run_as_rank
from simmim.engine.distributed.sharding import shard_by_block
from simmim.engine.optimizer import build_optimizer, freeze, parameter_groups
from simmim.engine.settings import OptimizerSettings
from simmim.tasks.classification.classifier import Classifier
from swinv2 import build_encoder

STEPS = 3


def build(stages: int | str) -> Classifier:
    torch.manual_seed(0)
    encoder = build_encoder(
        "tiny", image_size=32, window_size=4, embed_dim=16, depths=(1, 2, 1), num_heads=(1, 2, 4)
    )
    model = Classifier(encoder, 3)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    freeze(model, stages)  # type: ignore[arg-type]
    return model.train()


def main(stages: int | str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    start, whole, sharded = build(stages), build(stages), build(stages)
    shard_by_block(sharded, init_device_mesh("cpu", (world,)), param_dtype=None)
    settings = OptimizerSettings(lr=1e-3, eps=1e-4, layer_decay=0.5)
    models: list[nn.Module] = [whole, sharded]
    optimizers = [build_optimizer(one, settings, parameter_groups(one, settings)) for one in models]
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, 32, 32, generator=generator)
        labels = torch.tensor([0, 1, 2, 1])
        for model, optimizer in zip(models, optimizers, strict=True):
            ours = slice(rank, None, world) if model is sharded else slice(None)
            F.cross_entropy(model(images[ours]), labels[ours]).backward()
            optimizer.step()
            optimizer.zero_grad()
    trained = frozen = moved = 0.0
    for name, part in sharded.named_parameters():
        found, expected = part.full_tensor().detach(), whole.get_parameter(name)  # type: ignore[attr-defined]
        first = start.get_parameter(name)
        if expected.requires_grad:
            trained = max(trained, float((found - expected).abs().max()))
            moved = max(moved, float((found - first).abs().max()))
        else:
            frozen = max(frozen, float((found - first).abs().max()))
    if rank == 0:
        print(json.dumps({"trained": trained, "moved": moved, "frozen": frozen}))


def run() -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    main(json.loads(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    run_as_rank(run)
