"""The encoder interface: what SimMIM, optimiser groups, sharding and probes need of an encoder.

Any `nn.Module` with these members will do; no class is required by name.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import TypeVar

IMAGE_AXES = ("rows", "columns")
"""Axes of the token maps of images."""


class ImageEncoder(Protocol):
    """A module with two halves, between which SimMIM replaces masked tokens."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of training images in pixels."""

    @property
    def in_channels(self) -> int:
        """Number of image channels."""

    @property
    def patch_size(self) -> int:
        """Side of the patch behind each token of `embed`, in pixels."""

    @property
    def embed_dim(self) -> int:
        """Number of channels of the tokens of `embed`."""

    @property
    def num_features(self) -> int:
        """Number of channels of the output of `encode`."""

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels between neighbouring tokens of each stage; the last is that of the output."""

    @property
    def map_axes(self) -> tuple[str, ...]:
        """Axes of a token map: IMAGE_AXES, or others, such as those of clips."""

    @property
    def drop_path(self) -> float:
        """Largest rate of stochastic depth; with 0 `encode` is given no noise."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in order: what FSDP gathers at a time, and stochastic depth drops."""

    @property
    def no_weight_decay(self) -> tuple[str, ...]:
        """Components of the names of parameters that never decay, whatever their shape."""

    @property
    def num_layers(self) -> int:
        """Number of layers for layer-wise learning rates; heads belong to the last."""

    def layer_of(self, name: str) -> int:
        """Return the layer of a parameter, by its name in the encoder: 0 to num_layers - 1.

        The embedding is layer 0, and what follows the last block the last.
        """

    def embed(self, images: Tensor) -> Tensor:
        """Turn images (batch, channels, height, width) into tokens (batch, rows, columns, dim)."""

    def encode(self, tokens: Tensor, drop_path_noise: Tensor | None = None) -> Tensor:
        """Turn tokens into features (batch, rows, columns, num_features).

        `drop_path_noise` is int32 (batch, blocks, 2), uniform in [0, 2³¹); see `SwinV2.encode`.
        """


EncoderT = TypeVar("EncoderT", bound=ImageEncoder, default=Any)

MEMBERS = (
    "image_size",
    "in_channels",
    "patch_size",
    "embed_dim",
    "num_features",
    "strides",
    "map_axes",
    "drop_path",
    "blocks",
    "no_weight_decay",
    "num_layers",
    "layer_of",
    "embed",
    "encode",
)
"""Names of the members of an encoder."""


@runtime_checkable
class CountsFlops(Protocol):
    """An encoder that has a formula for its floating-point operations."""

    @property
    def forward_flops(self) -> int:
        """FLOPs of the matrix products in encoding one image of the nominal size."""


def check_encoder(encoder: object) -> None:
    """Check that an object is an encoder.

    Raises:
        TypeError: it is not a module, or lacks members of `ImageEncoder`; names them.
    """
    name = type(encoder).__name__
    if not isinstance(encoder, nn.Module):
        raise TypeError(
            f"encoder is a {name}; give an encoder, for example swinv2.build_encoder('tiny')."
        )
    missing = [member for member in MEMBERS if not hasattr(encoder, member)]
    if missing:
        raise TypeError(
            f"encoder is a {name}, which lacks {', '.join(missing)}; add them as in "
            "simmim.method.encoder_protocol.ImageEncoder, or give an encoder, for example "
            "swinv2.build_encoder('tiny')."
        )


@dataclass(frozen=True, kw_only=True)
class FoundEncoder:
    """The encoder in a model."""

    name: str
    """Dotted name of its module; empty if it is the model itself."""
    encoder: Any
    """The module, an `ImageEncoder` or one of clips."""

    def inner_name(self, name: str) -> str | None:
        """Return the name in the encoder of a parameter of the model; None if it is outside."""
        prefix = f"{self.name}." if self.name else ""
        return name.removeprefix(prefix) if name.startswith(prefix) else None


def find_encoder(model: nn.Module) -> FoundEncoder:
    """Return the encoder in a model: the first module with all members of one.

    Raises:
        ValueError: there is none.
    """
    for name, module in model.named_modules():
        if is_encoder(module):
            return FoundEncoder(name=name, encoder=module)
    raise ValueError(
        f"{type(model).__name__} has no encoder with the members of "
        "simmim.method.encoder_protocol.ImageEncoder, such as blocks and layer_of."
    )


def is_encoder(module: nn.Module) -> bool:
    """Return whether a module has all members of an encoder."""
    return all(hasattr(module, member) for member in MEMBERS)


def encoder_flops(encoder: Any) -> int:
    """Return the FLOPs of the matrix products in encoding one image of the nominal size.

    Counted on a copy on the meta device, which computes nothing, unless the encoder has a formula.
    """
    if isinstance(encoder, CountsFlops):
        return encoder.forward_flops
    copy = deepcopy(encoder).to("meta").eval()
    images = torch.empty(1, encoder.in_channels, *encoder.image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.encode(copy.embed(images))
    return int(counter.get_total_flops())
