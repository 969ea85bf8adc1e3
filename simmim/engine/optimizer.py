"""AdamW and its parameter groups: weight decay and layer-wise learning rates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simmim.compat import accepts_found_inf
from simmim.engine.checkpoint.sharded_state import is_sharded
from simmim.engine.settings import OptimizerSettings
from simmim.method.encoder_protocol import FoundEncoder, find_encoder

REPLACES_PATCHES = "mask_token"
"""Component of the name of SimMIM's mask token, which never decays, and is embedded: layer 0."""


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that share weight decay and learning-rate factor."""

    names: tuple[str, ...]
    weight_decay: float
    lr_factor: float


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers of a model: those of its encoder, in the last of which are heads and decoders."""

    found: FoundEncoder

    @classmethod
    def of(cls, model: nn.Module) -> "Layers":
        """Return the layers of a model with an encoder.

        Raises:
            ValueError: it has none.
        """
        return cls(found=find_encoder(model))

    @property
    def number(self) -> int:
        """How many there are."""
        number: int = self.found.encoder.num_layers
        return number

    def layer_of(self, name: str) -> int:
        """Return the layer of a parameter of the model, 0 to `number` - 1."""
        inner = self.found.inner_name(name)
        if inner is not None:
            layer: int = self.found.encoder.layer_of(inner)
            return layer
        return 0 if REPLACES_PATCHES in name.split(".") else self.number - 1

    def excluded_by(self, name: str) -> str | None:
        """Return the component of a name by which weight decay excludes a parameter, if any."""
        inner = self.found.inner_name(name)
        excluded = (REPLACES_PATCHES,) if inner is None else self.found.encoder.no_weight_decay
        parts = (name if inner is None else inner).split(".")
        return next((part for part in excluded if part in parts), None)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies to a parameter."""
        return parameter.ndim > 1 and self.excluded_by(name) is None


def freeze(model: nn.Module, stages: int | Literal["all"] | None) -> None:
    """Freeze the first stages of the encoder in a model; see `swinv2.SwinV2.freeze`.

    Raises:
        ValueError: the encoder has fewer stages, or is of a class that cannot be frozen.
    """
    if stages is None:
        return
    encoder = find_encoder(model).encoder
    if not hasattr(encoder, "freeze"):
        raise ValueError(
            f"training.optimizer.freeze is {stages}, and a {type(encoder).__name__} has no method "
            "freeze: leave it null."
        )
    encoder.freeze(stages)


def parameter_groups(model: nn.Module, optimizer: OptimizerSettings) -> list[ParameterGroup]:
    """Return the groups of the trainable parameters of `model`; each parameter is in exactly one.

    Raises:
        ValueError: the model has no encoder, or one whose `no_weight_decay` matches no parameter: a
            name must have changed.
    """
    layers = Layers.of(model)
    parameters = dict(model.named_parameters())
    matched = {layers.excluded_by(name) for name in parameters}
    for excluded in layers.found.encoder.no_weight_decay:
        if excluded not in matched:
            raise ValueError(f"no parameter is named {excluded}, which weight decay must exclude.")
    members: dict[tuple[float, float], list[str]] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        decay = optimizer.weight_decay if layers.decays(name, parameter) else 0.0
        factor = optimizer.layer_decay ** (layers.number - 1 - layers.layer_of(name))
        members.setdefault((factor, decay), []).append(name)
    return [
        ParameterGroup(names=tuple(names), weight_decay=decay, lr_factor=factor)
        for (factor, decay), names in sorted(members.items())
    ]


def build_optimizer(
    model: nn.Module, optimizer: OptimizerSettings, groups: list[ParameterGroup]
) -> torch.optim.Optimizer:
    """Build the optimiser over `groups`; AdamW is fused on CUDA devices and on CPUs.

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
    fuses = all(parameter.is_cuda or parameter.is_cpu for parameter in parameters.values())
    return torch.optim.AdamW(named, **shared, fused=fuses or None)


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


def layer_table(model: nn.Module, groups: list[ParameterGroup]) -> str:
    """Return a table of layers: learning-rate factor and number of trained parameters.

    Parameters that the encoder excludes from decay by name have columns of their own; the last
    column names the modules before and after the blocks.
    """
    layers = Layers.of(model)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    kinds: tuple[str, ...] = layers.found.encoder.no_weight_decay
    rows: dict[int, list[tuple[str, float]]] = {}
    for group in groups:
        for name in group.names:
            rows.setdefault(layers.layer_of(name), []).append((name, group.lr_factor))
    titles = "".join(f"  {kind.replace('_', ' '):>11}" for kind in kinds)
    lines = [f"layer  lr factor    parameters{titles}"]
    for layer, members in sorted(rows.items()):
        (factor,) = {factor for _, factor in members}
        line = f"{layer:5d}  {factor:9.4f}  {sum(counts[name] for name, _ in members):12,d}"
        for kind in kinds:
            total = sum(counts[name] for name, _ in members if layers.excluded_by(name) == kind)
            line += f"  {total:{max(11, len(kind))},d}"
        outside = set()
        if layer in (0, layers.number - 1):
            outside = {_outermost(layers, name) for name, _ in members}
        lines.append(f"{line}  {', '.join(sorted(outside))}".rstrip())
    return "\n".join(lines)


def _outermost(layers: Layers, name: str) -> str:
    """Return the outermost module of a parameter, in the encoder or beside it."""
    inner = layers.found.inner_name(name)
    return (name.removeprefix("model.") if inner is None else inner).split(".")[0]
