"""Contents of the checkpoints of other libraries."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from swinv2.encoder import SwinV2
from swinv2.json_file import load_json


class BridgeError(ValueError):
    """An encoder or a checkpoint that the other library, or ours, cannot express."""


@dataclass(frozen=True, kw_only=True)
class MaskedImageHead:
    """Mask token and decoder, which SimMIM adds to an encoder."""

    mask_token: Tensor
    """Mask token, which replaces masked tokens: `embed_dim` values in any shape."""
    weight: Tensor
    """Weight of the decoder, a 1x1 convolution: (stride² · in_channels, num_features, 1, 1)."""
    bias: Tensor
    """Bias of the decoder: (stride² · in_channels,)."""
    norm_target: bool | None = None
    """Whether it predicts normalised pixels; None if that is not recorded."""


@dataclass(frozen=True, kw_only=True)
class ClassifierHead:
    """A linear head on average-pooled features."""

    weight: Tensor
    """(classes, num_features)."""
    bias: Tensor
    """(classes,)."""

    def logits(self, features: Tensor) -> Tensor:
        """Turn features (batch, rows, columns, num_features) into (batch, classes)."""
        return features.mean((1, 2)) @ self.weight.T.to(features) + self.bias.to(features)


@dataclass(frozen=True, kw_only=True)
class ImportedEncoder:
    """An encoder from a checkpoint of another library, with its heads and normalisation."""

    encoder: SwinV2
    """The encoder, in float32, on the CPU, in evaluation mode."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: MaskedImageHead | None
    """Mask token and decoder, from a SimMIM pretraining."""
    classifier: ClassifierHead | None
    """Linear head of a classification model."""
    dropped: tuple[str, ...]
    """Buffers of the file that are not read: they are computed from the sizes."""
    channels: tuple[str, ...] | None = None
    """Names of the channels of its images, if the checkpoint has them."""
    classes: tuple[str, ...] = ()
    """Names of the classifier's classes, if the checkpoint has them."""
    fresh: tuple[str, ...] = ()
    """Tensors of the encoder that such a model lacks: they start as ones and zeros."""
    notes: tuple[str, ...] = ()
    """What was imported from the file and what was not, one line per item."""


def describe_missing(file: Path) -> str:
    """Say why a path is not a file, with the files next to it."""
    if file.is_dir():
        return "is a folder"
    others = sorted(path.name for path in file.parent.iterdir()) if file.parent.is_dir() else []
    found = f" (the folder has {', '.join(others[:5])})" if others else ""
    return f"does not exist{found}"


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        BridgeError: it is missing or holds something else; the message ends with the remedy.
    """
    if not file.is_file():
        raise BridgeError(f"{file} {describe_missing(file)}: {remedy}.")
    try:
        content = load_json(file)
    except ValueError as error:
        raise BridgeError(f"{file} is not valid JSON ({error}): {remedy}.") from error
    if not isinstance(content, dict):
        raise BridgeError(f"{file} does not hold a JSON object: {remedy}.")
    return content
