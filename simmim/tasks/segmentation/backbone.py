"""The encoder as a backbone of transformers' dense-prediction heads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from simmim.data.loader.batch import Batch
from simmim.data.order.randomness import stream_seed
from swinv2 import SwinV2
from swinv2.bridges.transformers_backbone import (
    backbone_config,
    register_backbone,
)


def check_installed(*, packages: Sequence[str] = ("transformers",)) -> None:
    """Raise ValueError unless these optional packages are installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"segmentation and detection need {' and '.join(missing)}: pip install "
            "'simmim[finetune]'."
        )


def last_maps(encoder: SwinV2, count: int) -> list[str]:
    """Return the names of the last feature maps of an encoder, for transformers.

    Raises:
        ValueError: the encoder has fewer stages.
    """
    stages = len(encoder.config.depths)
    if stages < count:
        raise ValueError(
            f"the head needs {count} feature maps, and the encoder has {stages} stages: choose an "
            "encoder with more, or another head."
        )
    return [f"stage{number + 1}" for number in range(stages - count, stages)]


def backbone_config_of(encoder: SwinV2, maps: Sequence[str]) -> Any:
    """Return the backbone config of an encoder with these feature maps, for a head's config.

    Raises:
        ValueError: transformers is not installed.
    """
    check_installed()
    register_backbone()
    return backbone_config(encoder.config, out_features=maps)


@contextmanager
def passing_noise(backbone: nn.Module, drop_path_noise: Tensor | None) -> Iterator[None]:
    """Pass `drop_path_noise` to a backbone through heads that do not take it."""

    def with_noise(
        module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        del module
        return arguments, named | {"drop_path_noise": drop_path_noise}

    handle = backbone.register_forward_pre_hook(with_noise, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def seeded_by(batch: Batch, seed: int) -> Iterator[None]:
    """Seed torch's generators by seed and batch, for the random numbers that heads draw."""
    device = batch.images.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        key = batch.addresses.flatten().tolist()
        torch.manual_seed(stream_seed("dense head", seed, *key) % 2**63)
        yield
