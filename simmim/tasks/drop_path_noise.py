"""The random numbers of drop path: a function of seed and sample, not of batches or ranks."""

import torch
from torch import Tensor

from simmim.data.loader.batches import Batch
from simmim.data.order.randomness import sample_bits
from swinv2.encoder import HierarchicalEncoder


def sample_drop_path_noise(encoder: HierarchicalEncoder, batch: Batch, seed: int) -> Tensor | None:
    """Return the `drop_path_noise` of `SwinV2.encode`; None if nothing is dropped.

    Each sample has its own numbers in each epoch, derived from its address.
    """
    if not encoder.training or not encoder.config.drop_path:
        return None
    blocks = sum(encoder.config.depths)
    bits = sample_bits(seed, "drop path", batch.addresses.numpy(), 2 * blocks)
    noise = torch.from_numpy((bits >> 33).astype("int32")).view(-1, blocks, 2)
    return noise.to(batch.images.device, non_blocking=True)
