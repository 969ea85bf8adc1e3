"""What drop path drops: a function of seed and sample, however a batch is cut and on what ranks."""

import torch
from torch import Tensor

from simmim.data.loader.batches import Batch
from simmim.data.order.randomness import sample_bits
from swinv2.hierarchy import Hierarchy


def drop_path_chances(encoder: Hierarchy, batch: Batch, seed: int) -> Tensor | None:
    """Return what `SwinV2.encode` decides by in training; None where nothing is dropped.

    Each sample has its own numbers in each epoch, from the address that it was asked for by.
    """
    if not encoder.training or not encoder.config.drop_path:
        return None
    blocks = sum(encoder.config.depths)
    bits = sample_bits(seed, "drop path", batch.addresses.numpy(), 2 * blocks)
    chances = torch.from_numpy((bits >> 33).astype("int32")).view(-1, blocks, 2)
    return chances.to(batch.images.device, non_blocking=True)
