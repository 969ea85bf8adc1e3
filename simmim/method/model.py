"""SimMIM: mask tokens, encode, and predict what was masked (arXiv 2111.09886)."""

from dataclasses import dataclass
from typing import Any, Generic

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from simmim.method.encoder_protocol import IMAGE_AXES, EncoderT, check_encoder
from simmim.method.losses import (
    loss_function,
    masked_mean,
    mean_color_loss,
)
from simmim.method.masking import enlarge_mask
from simmim.method.settings import LossArea, LossName, mask_grid
from simmim.method.targets import NormalisedPixels, Pixels, Target


class Decoder(nn.Module):
    """A 1x1 convolution and PixelShuffle: each feature is decoded to a patch of the target.

    Args:
        num_features: channels of the encoder's output.
        side: side of the patch of a feature in positions of the target, such as pixels.
        channels: channels of the target.
    """

    def __init__(self, num_features: int, side: int, channels: int) -> None:
        super().__init__()
        self.side = side
        self.channels = channels
        self.projection = nn.Conv2d(num_features, channels * side * side, kernel_size=1)

    @property
    def flops_per_feature(self) -> int:
        """FLOPs of decoding one feature."""
        return 2 * self.projection.weight.numel()

    def patches(self, features: Tensor) -> Tensor:
        """Decode single features: (n, num_features) → (n, channels, side, side)."""
        weight, bias = self.projection.weight.flatten(1), self.projection.bias
        device = features.device.type
        # Of some devices, such as meta, autocast knows nothing.
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            features = features.to(weight.dtype)
        values = F.linear(features, weight, bias)
        return rearrange(
            values, "... (c i j) -> ... c i j", c=self.channels, i=self.side, j=self.side
        )

    def forward(self, features: Tensor) -> Tensor:
        """Decode a feature map.

        (batch, rows, columns, num_features) → (batch, channels, rows · side, columns · side).
        """
        patches = self.patches(features)
        return rearrange(patches, "b row col c i j -> b c (row i) (col j)")


@dataclass(frozen=True, eq=False)
class SimMIMOutput:
    """Output of a forward pass."""

    loss: Tensor
    """Scalar loss, in the precision of the images."""

    features: Tensor
    """(batch, rows, columns, num_features): the encoder's output."""

    decoder: Decoder

    target_size: tuple[int, int]
    """Rows and columns of the target: height and width, of pixels."""

    @property
    def reconstruction(self) -> Tensor:
        """Prediction of the whole target, masked or visible: (batch, channels, rows, columns).

        Computed on demand, since training only needs the loss. Of pixels it is (batch, channels,
        height, width); with ``norm_target`` these are normalised, and `Target.to_pixels` converts
        them to colours.
        """
        rows, columns = self.target_size
        decoded: Tensor = self.decoder(self.features)
        return decoded[:, :, :rows, :columns]


class SimMIM(nn.Module, Generic[EncoderT]):
    """An encoder with a mask token and a decoder, trained to predict masked pixels or features.

    Args:
        encoder: the encoder to train; masked tokens are replaced between its two halves.
        mask_cell: side of a mask cell in pixels.
        norm_target: predict pixels normalised by their 47x47 neighbourhood (SwinV2's recipes).
        loss: l1, smooth_l1 or l2.
        loss_area: average the loss over masked or all pixels.
        target: what to predict; by default pixels, as `norm_target` says.

    Raises:
        ValueError: mask cells do not tile the patches or the encoder's image, a loss is unknown,
            the encoder is one of clips, or the target does not fit mask cells or encoder.
        TypeError: `encoder` lacks members of `simmim.method.encoder_protocol.ImageEncoder`.
    """

    encoder: EncoderT

    def __init__(
        self,
        encoder: EncoderT,
        mask_cell: int = 32,
        norm_target: bool = False,
        loss: LossName = "l1",
        loss_area: LossArea = "masked",
        *,
        target: Target | None = None,
    ) -> None:
        super().__init__()
        _check_types(encoder, mask_cell)
        patch = encoder.patch_size
        if mask_cell < 1 or mask_cell % patch:
            raise ValueError(
                f"mask cells of {mask_cell} pixels do not consist of whole patches of {patch} "
                f"pixels: choose a multiple of {patch}."
            )
        if loss_area not in ("masked", "all"):
            raise ValueError(f"loss area {loss_area!r} is unknown: choose masked or all.")
        mask_grid(encoder.image_size, mask_cell, patch)
        self.encoder = encoder
        self.mask_cell = mask_cell
        if target is None:
            target = (NormalisedPixels if norm_target else Pixels)(encoder.in_channels)
        elif norm_target:
            raise ValueError("norm_target is for pixels: leave it out, or target.")
        _check_target(target.stride, mask_cell, encoder.strides[-1])
        self.target = target
        self.loss_area = loss_area
        self.elementwise_loss = loss_function(loss)
        self.mask_token = nn.Parameter(torch.empty(1, 1, 1, encoder.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        side = encoder.strides[-1] // target.stride
        self.decoder = Decoder(encoder.num_features, side, target.channels)

    def forward(
        self, images: Tensor, mask: Tensor, drop_path_noise: Tensor | None = None
    ) -> SimMIMOutput:
        """Predict the masked pixels.

        Args:
            images: (batch, channels, height, width), normalised floating point.
            mask: bool (batch, height / mask_cell, width / mask_cell), True = hidden. On the CPU,
                selecting the features to decode needs no synchronisation with the GPU.
            drop_path_noise: see `SwinV2.encode`.

        Raises:
            ValueError: mask and images do not match.
        """
        self._check(images, mask)
        chosen = self._positions_to_decode(mask)
        mask = mask.to(images.device, non_blocking=True)
        chosen = chosen.to(images.device, non_blocking=True)

        features = self._encode(images, mask, drop_path_noise)
        prediction = self.decoder.patches(features.flatten(0, 2).index_select(0, chosen))

        side, whole = self.decoder.side, self.target(images)
        target = _cut_into_patches(whole, side).index_select(0, chosen)
        counted = _cut_into_patches(self._counted(mask)[:, None], side).index_select(0, chosen)
        target = target.to(torch.promote_types(target.dtype, torch.float32))
        values = self.elementwise_loss(prediction.to(target.dtype), target)
        loss = masked_mean(values, counted[:, 0])
        rows, columns = whole.shape[-2:]
        return SimMIMOutput(loss, features, self.decoder, (rows, columns))

    def mean_color_loss(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return the baseline loss of predicting the mean of the visible target: of the colour.

        Arguments and errors as in `forward`.
        """
        self._check(images, mask)
        mask = mask.to(images.device, non_blocking=True)
        return mean_color_loss(
            self.target(images), self._hidden(mask), self.elementwise_loss, self._counted(mask)
        )

    def _encode(self, images: Tensor, mask: Tensor, drop_path_noise: Tensor | None) -> Tensor:
        tokens = self.encoder.embed(images)
        hidden = enlarge_mask(mask, self.mask_cell // self.encoder.patch_size)
        tokens = torch.where(hidden[..., None], self.mask_token.to(tokens.dtype), tokens)
        return self.encoder.encode(tokens, drop_path_noise)

    def _hidden(self, mask: Tensor) -> Tensor:
        """Return the hidden positions of the target, bool (batch, rows, columns)."""
        return enlarge_mask(mask, self.mask_cell // self.target.stride)

    def _counted(self, mask: Tensor) -> Tensor:
        """Return the positions that the loss is averaged over, bool (batch, rows, columns)."""
        hidden = self._hidden(mask)
        return hidden if self.loss_area == "masked" else torch.ones_like(hidden)

    def _positions_to_decode(self, mask: Tensor) -> Tensor:
        """Return the indices, in batch · rows · columns, of the features that the loss needs.

        Those of visible pixels only would be multiplied by 0. Computed on the mask's device.
        """
        patch = self.encoder.patch_size
        hidden = enlarge_mask(mask, self.mask_cell // patch)
        patches = _cut_into_patches(hidden[:, None], self.encoder.strides[-1] // patch)
        if self.loss_area == "all":
            return torch.arange(len(patches), device=mask.device)
        return patches.flatten(1).any(dim=1).nonzero()[:, 0]

    def _check(self, images: Tensor, mask: Tensor) -> None:
        for name, given in (("images", images), ("the mask", mask)):
            if not isinstance(given, Tensor):
                raise ValueError(
                    f"{name} must be a tensor, not {type(given).__module__}."
                    f"{type(given).__name__}: torch.from_numpy converts an array."
                )
        if not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype}; convert them to floating point and normalise them "
                "first."
            )
        if images.ndim == 4 and not images.numel():
            raise ValueError(
                f"images have shape {tuple(images.shape)}: the loss needs one image or more."
            )
        channels = self.encoder.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; SimMIM takes (batch, {channels} "
                "channels, height, width)."
            )
        height, width = images.shape[-2:]
        grid = mask_grid((height, width), self.mask_cell, self.encoder.patch_size)
        expected = (len(images), *grid)
        if tuple(mask.shape) != expected or mask.dtype != torch.bool:
            raise ValueError(
                f"the mask is {mask.dtype} of shape {tuple(mask.shape)}; images of shape "
                f"{tuple(images.shape)} with mask cells of {self.mask_cell} pixels take a bool "
                f"mask of shape {expected}, True = hidden."
            )


def _check_types(encoder: Any, mask_cell: object) -> None:
    """Check arguments of `SimMIM` whose mistakes would show up far from it.

    Raises:
        TypeError: one is something else; names it.
        ValueError: the encoder is not of images.
    """
    check_encoder(encoder)
    axes: tuple[str, ...] = encoder.map_axes
    if axes != IMAGE_AXES:
        raise ValueError(
            f"encoder is a {type(encoder).__name__}, whose maps have {', '.join(axes)}; SimMIM "
            "masks images: pretrain an image encoder, then inflate it for clips "
            "(swinv2.inflate)."
        )
    if isinstance(mask_cell, bool) or not isinstance(mask_cell, int):
        raise TypeError(f"mask_cell is {mask_cell!r}; give its side in pixels, an integer.")


def _check_target(stride: int, mask_cell: int, encoder_stride: int) -> None:
    """Raise ValueError unless mask cells and the patches of features are whole positions."""
    for name, side in (("mask cells", mask_cell), ("features of the encoder", encoder_stride)):
        if side % stride:
            raise ValueError(
                f"the target has a position for every {stride} pixels, and {name} are of {side} "
                f"pixels: choose a multiple of {stride}, or another target."
            )


def _cut_into_patches(images: Tensor, side: int) -> Tensor:
    """Cut (batch, channels, height, width) into (batch · rows · columns, channels, side, side).

    Axes that the side does not divide are padded with zeros at the right and bottom.
    """
    height, width = images.shape[-2:]
    if height % side or width % side:
        images = F.pad(images, (0, -width % side, 0, -height % side))
    return rearrange(images, "b c (row i) (col j) -> (b row col) c i j", i=side, j=side)
