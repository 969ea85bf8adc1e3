"""What bridges take and give beside an encoder: heads, and all that a checkpoint held."""

from dataclasses import dataclass

from torch import Tensor

from swinv2.encoder import SwinV2


class BridgeError(ValueError):
    """An encoder or a checkpoint that the other side cannot express as it is."""


@dataclass(frozen=True, kw_only=True)
class MaskedImageHead:
    """The tensors that SimMIM adds to an encoder."""

    mask_token: Tensor
    """What stands for a hidden token, ``embed_dim`` values in any shape."""
    weight: Tensor
    """The decoder's 1x1 convolution (stride² · in_channels, num_features, 1, 1)."""
    bias: Tensor
    """Its bias (stride² · in_channels,)."""


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A linear head on average-pooled features."""

    weight: Tensor
    """(classes, num_features)."""
    bias: Tensor
    """(classes,)."""

    def logits(self, features: Tensor) -> Tensor:
        """Turn features (batch, rows, columns, num_features) into (batch, classes)."""
        return features.mean((1, 2)) @ self.weight.T.to(features) + self.bias.to(features)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What a checkpoint of another library holds, as ours."""

    encoder: SwinV2
    """In float32, on the CPU, in evaluation mode."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: MaskedImageHead | None
    """Mask token and decoder, from a SimMIM pretraining."""
    classifier: Classifier | None
    """From a classification."""
    dropped: tuple[str, ...]
    """Buffers of the file, which are computed from the sizes."""
    classes: tuple[str, ...] = ()
    """Names of the classifier's classes, where the checkpoint has them."""
    fresh: tuple[str, ...] = ()
    """Our tensors that a model of that kind has not: they start as ones and zeros."""
