"""Process group of ranks that torchrun has started again."""

import os
from datetime import timedelta

import torch
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous


def join_restarted_group(timeout: timedelta) -> None:
    """Initialise the process group if torchrun has started the ranks again; else do nothing.

    Their keys in torchrun's store are those of this start. In torch 2.13 the store outlives the
    ranks, and a rank that comes first would read the addresses of those before.

    Args:
        timeout: the longest wait for another rank.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts == "0" or not shared or torch.distributed.is_initialized():
        return
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    torch.distributed.init_process_group(
        store=PrefixStore(f"restart-{restarts}", store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )
