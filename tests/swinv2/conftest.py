"""An encoder computed by hand, query by query, as the reference for tests."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2 import SwinV2
from swinv2.attention import WindowAttention


@pytest.fixture
def randomise() -> Callable[[nn.Module], None]:
    return draw_weights


@pytest.fixture
def attend_by_hand() -> Callable[..., Tensor]:
    return attend


@pytest.fixture
def encode_by_hand() -> Callable[..., list[Tensor]]:
    return encode


def draw_weights(module: nn.Module) -> None:
    """Draw weights that leave nothing trivial: norms, biases and logit scales too."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        std = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = (drawn * std + (2 if "logit_scale" in name else 0)).to(parameter.dtype)


def fit_axis(tokens: int, window: int, *, shifted: bool) -> tuple[int, int]:
    if tokens <= window:
        return tokens, 0
    return window, window // 2 if shifted else 0


def attend(
    attention: WindowAttention,
    tokens: Tensor,
    *,
    window: tuple[int, int],
    shifted: bool,
    reference: tuple[int, int],
) -> Tensor:
    """Window attention of one map (rows, columns, channels) with a softmax for every query.

    Two tokens see each other where both axes have them in one stretch; stretches start at the
    shift and at each further window, and those cut off by the border are just shorter.
    """
    rows, columns, dim = tokens.shape
    heads = len(attention.logit_scale)
    height, shift_down = fit_axis(rows, window[0], shifted=shifted)
    width, shift_right = fit_axis(columns, window[1], shifted=shifted)
    row_stretch = (np.arange(rows) - shift_down) // height
    column_stretch = (np.arange(columns) - shift_right) // width

    weights = attention.qkv.weight.detach().numpy().reshape(3, dim, dim)
    flat = tokens.detach().numpy()
    query = (flat @ weights[0].T + attention.query_bias.detach().numpy()).reshape(
        rows, columns, heads, -1
    )
    key = (flat @ weights[1].T).reshape(rows, columns, heads, -1)
    value = (flat @ weights[2].T + attention.value_bias.detach().numpy()).reshape(
        rows, columns, heads, -1
    )
    query = query / np.linalg.norm(query, axis=-1, keepdims=True)
    key = key / np.linalg.norm(key, axis=-1, keepdims=True)
    scale = np.exp(np.minimum(attention.logit_scale.detach().numpy(), math.log(100)))

    row_scale, column_scale = (8 / max(side - 1, 1) for side in reference)
    mixed = np.zeros((rows, columns, heads, dim // heads))
    for row in range(rows):
        seen_rows = np.flatnonzero(row_stretch == row_stretch[row])
        for column in range(columns):
            seen_columns = np.flatnonzero(column_stretch == column_stretch[column])
            keys = key[seen_rows][:, seen_columns]
            down = np.broadcast_to(((row - seen_rows) * row_scale)[:, None], keys.shape[:2])
            right = np.broadcast_to((column - seen_columns) * column_scale, keys.shape[:2])
            scores = scale * np.einsum("hd,rchd->rch", query[row, column], keys)
            scores = scores + position_bias(attention, down, right)
            weight = np.exp(scores - scores.max((0, 1)))
            weight /= weight.sum((0, 1))
            mixed[row, column] = np.einsum(
                "rch,rchd->hd", weight, value[seen_rows][:, seen_columns]
            )
    projected: Tensor = attention.projection(torch.from_numpy(mixed.reshape(rows, columns, dim)))
    return projected


def position_bias(attention: WindowAttention, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    offsets = np.stack((down, right), axis=-1)
    offsets = np.sign(offsets) * np.log2(np.abs(offsets) + 1) / 3
    expand, reduce = attention.position_bias.expand, attention.position_bias.reduce
    hidden = offsets @ expand.weight.detach().numpy().T + expand.bias.detach().numpy()
    logits = np.maximum(hidden, 0) @ reduce.weight.detach().numpy().T
    return 16 / (1 + np.exp(-logits))


def encode(
    encoder: SwinV2, image: Tensor, references: list[tuple[int, int]]
) -> tuple[list[Tensor], Tensor]:
    """Outputs (rows, columns, channels) of all stages, and the normalised last, for one image."""
    tokens = embed(encoder, image)
    outputs: list[Tensor] = []
    for index, stage in enumerate(encoder.stages):
        if index:
            tokens = merge(encoder.merges[index - 1], tokens)
        for position, block in enumerate(stage.blocks):
            mixed = attend(
                block.attention,
                tokens,
                window=encoder.config.window_size,
                shifted=position % 2 == 1,
                reference=references[index],
            )
            tokens = tokens + normalise(block.norm1, mixed)
            hidden = block.mlp.expand(tokens)
            hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
            tokens = tokens + normalise(block.norm2, block.mlp.reduce(hidden))
            every = encoder.config.extra_norm_every
            if every and (position + 1) % every == 0:
                tokens = normalise(stage.extra_norms[(position + 1) // every - 1], tokens)
        outputs.append(tokens)
    return outputs, normalise(encoder.norm, tokens)


def normalise(norm: nn.LayerNorm, tokens: Tensor) -> Tensor:
    centred = tokens - tokens.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-5) * norm.weight + norm.bias


def embed(encoder: SwinV2, image: Tensor) -> Tensor:
    patch = encoder.config.patch_size
    height, width = image.shape[1:]
    image = F.pad(image, (0, -width % patch, 0, -height % patch))
    projection = encoder.patch_embed.projection
    rows = [
        torch.stack(
            [
                projection.weight.flatten(1) @ image[:, y : y + patch, x : x + patch].flatten()
                + projection.bias
                for x in range(0, width, patch)
            ]
        )
        for y in range(0, height, patch)
    ]
    return normalise(encoder.patch_embed.norm, torch.stack(rows))


def merge(merging: nn.Module, tokens: Tensor) -> Tensor:
    rows, columns, _ = tokens.shape
    outside = torch.zeros_like(tokens[0, 0])

    def at(row: int, column: int) -> Tensor:
        return tokens[row, column] if row < rows and column < columns else outside

    merged = [
        [
            torch.cat([at(y, x), at(y + 1, x), at(y, x + 1), at(y + 1, x + 1)])
            for x in range(0, columns, 2)
        ]
        for y in range(0, rows, 2)
    ]
    stacked = torch.stack([torch.stack(row) for row in merged])
    return normalise(merging.norm, stacked @ merging.reduction.weight.T)
