"""SimMIM with our encoder or a peer's, which compute the same; peers where they are installed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.bench.gpu.cells import Skipped
from simmim.bench.gpu.training import is_installed
from simmim.compat import allow_compiled_graphs
from simmim.method.model import SimMIM
from swinv2 import SwinV2, SwinV2Config

Name = Literal["ours", "timm", "transformers"]
MOST_GRAPHS = 64
"""Graphs of a function that dynamo keeps: peers have one for each block."""
MASK_CELL = 32
"""Side of a mask cell in pixels."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model that is trained."""

    model: nn.Module
    compute_loss: Callable[[Tensor, Tensor], Tensor]
    """Takes images (batch, channels, height, width) and a mask of cells, True = hidden."""
    blocks: tuple[nn.Module, ...]
    """What is compiled one by one; empty if the encoder compiles its blocks itself."""

    def compile(self, backend: str) -> None:
        """Compile the blocks."""
        torch.compiler.reset()
        if isinstance(self.model, SimMIM):
            self.model.encoder.compile_blocks(backend=backend)
        allow_compiled_graphs(MOST_GRAPHS)
        for block in self.blocks:
            block.compile(backend=backend, dynamic=False)


def build(name: Name, config: SwinV2Config) -> Contestant:
    """Build a contestant on the CPU, in training mode.

    Raises:
        Skipped: the peer is not installed, or has no such architecture.
    """
    if name == "ours":
        ours = SimMIM(SwinV2(config), mask_cell=MASK_CELL).train()
        return Contestant(
            model=ours, compute_loss=lambda images, mask: ours(images, mask).loss, blocks=()
        )
    if not is_installed(name):
        raise Skipped(f"{name} is not installed")
    if config.extra_norm_every:
        raise Skipped(f"{name} has no extra norms")
    try:
        return _build_timm(config) if name == "timm" else _build_transformers(config)
    except ImportError as error:  # timm needs torchvision, of the same version as torch
        raise Skipped(f"{name} cannot be imported: {error}") from error


class TimmSimMIM(nn.Module):
    """SimMIM on timm's encoder, following the published SimMIM code."""

    def __init__(self, encoder: Any, config: SwinV2Config, mask_cell: int = MASK_CELL) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_cell = mask_cell
        self.patch_size, stride = config.patch_size, config.strides[-1]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, config.embed_dim))
        self.decoder = nn.Sequential(
            nn.Conv2d(config.num_features, stride**2 * config.in_channels, kernel_size=1),
            nn.PixelShuffle(stride),
        )

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return the loss of images and a mask of cells."""
        tokens = self.encoder.patch_embed(images)
        hidden = enlarged(mask, self.mask_cell // self.patch_size)[..., None].type_as(tokens)
        tokens = tokens * (1 - hidden) + self.mask_token * hidden
        features = self.encoder.norm(self.encoder.layers(tokens)).permute(0, 3, 1, 2)
        pixels = enlarged(mask, self.mask_cell)[:, None].float()
        loss = F.l1_loss(self.decoder(features), images, reduction="none")
        return (loss * pixels).sum() / (pixels.sum() + 1e-5) / images.shape[1]


def enlarged(mask: Tensor, times: int) -> Tensor:
    """Repeat each element of (batch, rows, columns) along both axes."""
    return mask.repeat_interleave(times, 1).repeat_interleave(times, 2)


def _build_timm(config: SwinV2Config) -> Contestant:
    from timm.models.swin_transformer_v2 import SwinTransformerV2  # noqa: PLC0415 (optional)

    encoder = SwinTransformerV2(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=0,
        embed_dim=config.embed_dim,
        depths=config.depths,
        num_heads=config.num_heads,
        window_size=config.window_size,
        drop_path_rate=0.0,
        pretrained_window_sizes=(0,) * len(config.depths),
    )
    model = TimmSimMIM(encoder, config).train()
    blocks = tuple(block for layer in encoder.layers for block in layer.blocks)
    return Contestant(
        model=model,
        compute_loss=lambda images, mask: model(images, mask.to(images.device)),
        blocks=blocks,
    )


def _build_transformers(config: SwinV2Config) -> Contestant:
    from transformers import Swinv2Config, Swinv2ForMaskedImageModeling  # noqa: PLC0415 (optional)

    theirs = Swinv2Config(
        image_size=config.image_size[0],
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depths=list(config.depths),
        num_heads=list(config.num_heads),
        window_size=config.window_size[0],
        encoder_stride=config.strides[-1],
        drop_path_rate=0.0,
    )
    model = Swinv2ForMaskedImageModeling(theirs).train()

    def compute_loss(images: Tensor, mask: Tensor) -> Tensor:
        hidden = enlarged(mask.to(images.device), MASK_CELL // config.patch_size).flatten(1)
        loss: Tensor = model(images, bool_masked_pos=hidden).loss
        return loss

    blocks = tuple(block for layer in model.swinv2.encoder.layers for block in layer.blocks)
    return Contestant(model=model, compute_loss=compute_loss, blocks=blocks)
