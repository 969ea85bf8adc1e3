"""One of two ranks: train a narrow giant unsharded and sharded, on the same images.

Started by torchrun; prints the largest differences, of losses and of gathered weights.
"""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from simmim import SimMIM
from simmim.engine.checkpoint.ema import RunningAverage
from simmim.engine.distributed.launcher import run_as_rank
from simmim.engine.distributed.sharding import shard_by_block, shard_size, sharding_units
from swinv2 import build_encoder

STEPS = 4


def main(execution: dict[str, Any], param_dtype: torch.dtype | None) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    whole, sharded = build(), build()
    units, kept = sharding_units(whole), shard_size(whole, rank=rank, world=world)
    sharded.encoder.set_execution(**execution)
    shard_by_block(sharded, init_device_mesh("cpu", (world,)), param_dtype=param_dtype)
    here = sum(parameter.to_local().numel() for parameter in sharded.parameters())
    assert here == kept, (here, kept)
    assert len(units) == sum(sharded.encoder.config.depths) + 1

    optimizers = [
        torch.optim.AdamW(list(model.named_parameters()), lr=1e-3, eps=1e-4)
        for model in (whole, sharded)
    ]
    averages = [RunningAverage(optimizer) for optimizer in optimizers]
    losses = []
    for step in range(STEPS):
        images, mask = batch(step)
        ours = slice(rank, None, world)
        of_whole = whole(images, mask).loss
        of_sharded = sharded(images[ours], mask[ours]).loss
        of_both = zip((of_whole, of_sharded), optimizers, averages, strict=True)
        for loss, optimizer, average in of_both:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(0.5, step + 1)
        mean = of_sharded.detach().float()
        dist.all_reduce(mean)
        losses.append(abs(float(of_whole.detach()) - float(mean) / world))
    weights = largest_difference(whole, sharded)
    with averages[0].swapped(), averages[1].swapped():
        of_averages = largest_difference(whole, sharded)
    again = largest_difference(whole, sharded)
    assert again == weights, (again, weights)
    features = check_features(whole, sharded)
    if rank == 0:
        found = {"loss": max(losses), "weight": weights, "average": of_averages}
        print(json.dumps(found | {"feature": features}))


def largest_difference(whole: SimMIM, sharded: SimMIM) -> float:
    return max(
        float((part.full_tensor() - expected).detach().abs().max())
        for part, expected in zip(sharded.parameters(), whole.parameters(), strict=True)
    )


def build() -> SimMIM:
    torch.manual_seed(0)
    encoder = build_encoder(
        "giant",
        image_size=32,
        window_size=4,
        embed_dim=16,
        depths=(1, 2, 7, 1),  # seven: an extra norm, and a block after it
        num_heads=(1, 2, 4, 8),
    )
    model = SimMIM(encoder, mask_cell=8)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Draw four images, each with as many hidden cells, so that means of ranks can be averaged."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    order = torch.rand(4, 16, generator=generator).argsort(dim=1)
    return images, (order < 10).view(4, 4, 4)


def check_features(whole: SimMIM, sharded: SimMIM) -> float:
    """Compare what the encoder's other methods give, in evaluation."""
    images, mask = batch(STEPS)
    with torch.no_grad():
        expected, found = (model.eval()(images, mask).features for model in (whole, sharded))
    return float((expected - found).abs().max())


def run() -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    given = json.loads(sys.argv[1])
    dtype = torch.bfloat16 if given.pop("bf16", False) else None
    main(given, dtype)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    run_as_rank(run)
