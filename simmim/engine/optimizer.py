"""AdamW and its parameter groups: weight decay and layer-wise learning rates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simmim.compat import accepts_found_inf
from simmim.engine.checkpoint.sharded_state import is_sharded
from simmim.engine.settings import OptimizerSettings

EXCLUDED_FROM_DECAY = ("position_bias", "logit_scale", "mask_token")
"""Components of the names of parameters that never decay, whatever their shape."""


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that share weight decay and learning-rate factor."""

    names: tuple[str, ...]
    weight_decay: float
    lr_factor: float


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies to a parameter."""
    parts = name.split(".")
    return parameter.ndim > 1 and not any(part in EXCLUDED_FROM_DECAY for part in parts)


def layer_of(name: str, depths: tuple[int, ...]) -> int:
    """Return the layer of a parameter, for layer-wise learning-rate decay.

    Patch embedding and mask token are layer 0, blocks are counted from 1 over all stages, a patch
    merging belongs to the last block before it, and everything after the stages (the final norm and
    the heads) is the top layer, sum(depths) + 1. The numbering follows the SimMIM code.

    Args:
        name: dotted name, with or without a prefix before the encoder's own name.
        depths: number of blocks of each stage.
    """
    parts = name.split(".")
    if "patch_embed" in parts or "mask_token" in parts:
        return 0
    for kind in ("stages", "merges"):
        if kind in parts:
            at = parts.index(kind)
            stage = int(parts[at + 1])
            if kind == "merges":
                return sum(depths[: stage + 1])
            below = sum(depths[:stage])
            match parts[at + 2]:
                case "blocks":
                    return below + int(parts[at + 3]) + 1
                case "extra_norms":
                    # The norm of index k follows the block of index 6k + 5.
                    return min(below + 6 * (int(parts[at + 3]) + 1), sum(depths[: stage + 1]))
                case other:
                    raise ValueError(f"parameter {name}: no layer is known for {other!r}.")
    return sum(depths) + 1


def parameter_groups(
    model: nn.Module, optimizer: OptimizerSettings, depths: tuple[int, ...]
) -> list[ParameterGroup]:
    """Return the groups of the trainable parameters of `model`; each parameter is in exactly one.

    Raises:
        ValueError: an exclusion from decay matches no parameter: a name must have changed.
    """
    top = sum(depths) + 1
    parameters = dict(model.named_parameters())
    for excluded in ("position_bias", "logit_scale"):
        if not any(excluded in name.split(".") for name in parameters):
            raise ValueError(f"no parameter is named {excluded}, which weight decay must exclude.")
    members: dict[tuple[float, float], list[str]] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        decay = optimizer.weight_decay if decays(name, parameter) else 0.0
        factor = optimizer.layer_decay ** (top - layer_of(name, depths))
        members.setdefault((factor, decay), []).append(name)
    return [
        ParameterGroup(names=tuple(names), weight_decay=decay, lr_factor=factor)
        for (factor, decay), names in sorted(members.items())
    ]


def build_optimizer(
    model: nn.Module, optimizer: OptimizerSettings, groups: list[ParameterGroup]
) -> torch.optim.Optimizer:
    """Build the optimiser over `groups`; AdamW is fused if the parameters are on a CUDA device.

    Its groups hold the names of the parameters, by which checkpoints store its state.

    Raises:
        ValueError: its library is not installed, or it does not support sharded parameters.
    """
    parameters = dict(model.named_parameters())
    named = [
        {
            "params": [(name, parameters[name]) for name in group.names],
            "weight_decay": group.weight_decay,
            "lr_factor": group.lr_factor,
        }
        for group in groups
    ]
    shared: dict[str, Any] = {"lr": optimizer.lr, "betas": optimizer.betas, "eps": optimizer.eps}
    if optimizer.name == "adamw_8bit":
        if is_sharded(model):
            raise ValueError(
                "training.optimizer.name adamw_8bit does not support sharded weights: use adamw, "
                "whose state FSDP shards too, or train without FSDP."
            )
        in_8_bits: torch.optim.Optimizer = _adamw_8bit()(named, **shared)
        return in_8_bits
    on_cuda = any(parameter.is_cuda for parameter in parameters.values())
    return torch.optim.AdamW(named, **shared, fused=on_cuda or None)


def _adamw_8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit  # noqa: PLC0415 (an extra)
    except ImportError:
        raise ValueError(
            "training.optimizer.name adamw_8bit needs bitsandbytes: pip install 'simmim[8bit]'."
        ) from None
    return AdamW8bit


def set_learning_rate(
    optimizer: torch.optim.Optimizer, learning_rate: Callable[[float], float]
) -> None:
    """Set the learning rate of every group to `learning_rate(lr_factor of the group)`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(group["lr_factor"])


def step_if_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Take an optimiser step unless the norm of the gradient is NaN or Inf.

    A skipped step changes neither weights nor moments. Fused optimisers decide on the device;
    others wait until the norm is known here.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate's is a wrapper
    if not accepts_found_inf(inner):
        if bool(norm.isfinite()):
            optimizer.step()
        return
    inner.found_inf = (~norm.isfinite()).to(torch.float32)  # as `torch.amp.GradScaler` tells it
    try:
        optimizer.step()
    finally:
        del inner.found_inf


def layer_table(model: nn.Module, groups: list[ParameterGroup], depths: tuple[int, ...]) -> str:
    """Return a table of layers: learning-rate factor and number of trained parameters.

    Position bias and logit scale, which are identified by name, have columns of their own; the last
    column names the modules outside the blocks.
    """
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    rows: dict[int, list[tuple[str, float]]] = {}
    for group in groups:
        for name in group.names:
            rows.setdefault(layer_of(name, depths), []).append((name, group.lr_factor))
    lines = [f"layer  lr factor    parameters  {'position bias':>13}  {'logit scale':>11}"]
    for layer, members in sorted(rows.items()):
        (factor,) = {factor for _, factor in members}
        total, position, scale = (
            sum(counts[name] for name, _ in members if not kind or kind in name.split("."))
            for kind in ("", "position_bias", "logit_scale")
        )
        outside = sorted({_outermost(name) for name, _ in members} - {""})
        line = f"{layer:5d}  {factor:9.4f}  {total:12,d}  {position:13,d}  {scale:11,d}"
        lines.append(f"{line}  {', '.join(outside)}".rstrip())
    return "\n".join(lines)


def _outermost(name: str) -> str:
    """Return the outermost module of a parameter outside the blocks; empty for one in a block."""
    parts = name.removeprefix("model.").removeprefix("encoder.").split(".")
    return "" if parts[0] in ("stages", "merges") else parts[0]
