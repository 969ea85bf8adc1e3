"""SimMIM as the published code computes it: written anew from its definition, on its tensors.

A function of the tensors of a checkpoint by their published names; no module of ours is used.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Published:
    """Sizes of a published model, of square images."""

    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    pretrained_windows: tuple[int, ...]
    """One per stage; 0 for the present window."""
    norm_target: bool
    patch: int = 4

    def loss(self, tensors: Mapping[str, Tensor], images: Tensor, mask: Tensor) -> Tensor:
        """Return SimMIM's loss; the mask is (batch, rows, columns) of patches, 1 = hidden."""
        features = self.features(tensors, images, mask)
        decoded = F.conv2d(features, tensors["decoder.0.weight"], tensors["decoder.0.bias"])
        stride = self.patch * 2 ** (len(self.depths) - 1)
        predicted = F.pixel_shuffle(decoded, stride)
        target = normalised(images) if self.norm_target else images
        hidden = mask.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)[:, None]
        error = (target - predicted).abs() * hidden
        return error.sum() / (hidden.sum() + 1e-5) / images.shape[1]

    def features(self, tensors: Mapping[str, Tensor], images: Tensor, mask: Tensor) -> Tensor:
        """Return the normalised last map (batch, channels, rows, columns)."""
        part = {name.removeprefix("encoder."): one for name, one in tensors.items()}
        weight, bias = part["patch_embed.proj.weight"], part["patch_embed.proj.bias"]
        x = F.conv2d(images, weight, bias, stride=self.patch).permute(0, 2, 3, 1)
        x = norm(x, part, "patch_embed.norm")
        hidden = mask[..., None].to(x.dtype)
        x = x * (1 - hidden) + part["mask_token"].reshape(1, 1, 1, -1) * hidden
        for stage, depth in enumerate(self.depths):
            side = x.shape[1]
            window = min(self.window, side)
            for block in range(depth):
                shift = self.window // 2 if block % 2 and side > self.window else 0
                place = f"layers.{stage}.blocks.{block}"
                mixed = self._attend(x, part, f"{place}.attn", stage, window, shift)
                x = x + norm(mixed, part, f"{place}.norm1")
                inner = F.gelu(linear(x, part, f"{place}.mlp.fc1"))
                x = x + norm(linear(inner, part, f"{place}.mlp.fc2"), part, f"{place}.norm2")
            if stage < len(self.depths) - 1:
                parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
                merged = (
                    torch.cat(parts, -1) @ part[f"layers.{stage}.downsample.reduction.weight"].T
                )
                x = norm(merged, part, f"layers.{stage}.downsample.norm")
        return norm(x, part, "norm").permute(0, 3, 1, 2)

    def _attend(
        self,
        x: Tensor,
        part: Mapping[str, Tensor],
        place: str,
        stage: int,
        window: int,
        shift: int,
    ) -> Tensor:
        batch, side, _, dim = x.shape
        heads, tokens = self.heads[stage], window * window
        x = torch.roll(x, (-shift, -shift), (1, 2))
        windows = cut(x, window)
        bias = torch.cat([part[f"{place}.q_bias"], torch.zeros(dim), part[f"{place}.v_bias"]])
        qkv = F.linear(windows, part[f"{place}.qkv.weight"], bias)
        q, k, v = qkv.view(-1, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * part[f"{place}.logit_scale"].clamp(max=math.log(100)).exp()
        scores = scores + self._position_bias(part, place, window, stage)
        if shift:
            region = torch.zeros(side)
            region[-window:], region[-shift:] = 1, 2
            regions = cut((region[:, None] * 3 + region)[None, ..., None], window)[..., 0]
            apart = regions[:, None, :] != regions[:, :, None]
            blocked = torch.zeros_like(apart, dtype=x.dtype).masked_fill(apart, -100.0)
            scores = scores.view(batch, -1, heads, tokens, tokens) + blocked[:, None]
            scores = scores.view(-1, heads, tokens, tokens)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, tokens, dim)
        mixed = linear(mixed, part, f"{place}.proj")
        count = side // window
        mixed = mixed.view(batch, count, count, window, window, dim).transpose(2, 3)
        return torch.roll(mixed.reshape(batch, side, side, dim), (shift, shift), (1, 2))

    def _position_bias(
        self, part: Mapping[str, Tensor], place: str, window: int, stage: int
    ) -> Tensor:
        reference = self.pretrained_windows[stage] or window
        offsets = torch.arange(window)[:, None] - torch.arange(window)
        scaled = offsets * 8 / max(reference - 1, 1)
        spaced = scaled.sign() * (scaled.abs() + 1).log2() / 3
        rows = spaced[:, None, :, None].expand(window, window, window, window)
        columns = spaced[None, :, None, :].expand(window, window, window, window)
        pairs = torch.stack([rows, columns], -1).reshape(window**2, window**2, 2)
        name = "cpb_mlp" if f"{place}.cpb_mlp.0.weight" in part else "rpe_mlp"
        inner = linear(pairs, part, f"{place}.{name}.0").relu()
        return 16 * (inner @ part[f"{place}.{name}.2.weight"].T).sigmoid().permute(2, 0, 1)


def linear(x: Tensor, part: Mapping[str, Tensor], place: str) -> Tensor:
    return F.linear(x, part[f"{place}.weight"], part[f"{place}.bias"])


def norm(x: Tensor, part: Mapping[str, Tensor], place: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], part[f"{place}.weight"], part[f"{place}.bias"])


def cut(x: Tensor, window: int) -> Tensor:
    """Cut (batch, side, side, dim) into (windows, tokens, dim)."""
    batch, side, _, dim = x.shape
    count = side // window
    parts = x.reshape(batch, count, window, count, window, dim).transpose(2, 3)
    return parts.reshape(-1, window * window, dim)


def normalised(images: Tensor, window: int = 47) -> Tensor:
    """Normalise by mean and unbiased variance of the real pixels in the window around each."""
    pad = window // 2
    ones = torch.ones_like(images)

    def total(values: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(values, (pad,) * 4), window, stride=1) * window**2

    count = total(ones)
    mean = total(images) / count
    variance = (total(images.square()) / count - mean.square()) * count / (count - 1)
    return (images - mean) / (variance.clamp(min=0) + 1e-6).sqrt()
