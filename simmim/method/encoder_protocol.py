"""The encoder interface that SimMIM needs: no class is required by name."""

from typing import Any, Protocol

from torch import Tensor
from typing_extensions import TypeVar


class EncoderConfig(Protocol):
    """The sizes of an encoder."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of training images in pixels."""

    @property
    def patch_size(self) -> int:
        """Side of the patch behind each token of `embed`, in pixels."""

    @property
    def in_channels(self) -> int:
        """Number of image channels."""

    @property
    def embed_dim(self) -> int:
        """Number of channels of the tokens of `embed`."""


class MaskableEncoder(Protocol):
    """A module with two halves, between which SimMIM replaces masked tokens."""

    @property
    def config(self) -> EncoderConfig:
        """The sizes of the encoder."""

    @property
    def num_features(self) -> int:
        """Number of channels of the output of `encode`."""

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels between neighbouring tokens of each stage; the last is that of the output."""

    def embed(self, images: Tensor) -> Tensor:
        """Turn images (batch, channels, height, width) into tokens (batch, rows, columns, dim)."""

    def encode(self, tokens: Tensor, drop_path_noise: Tensor | None = None) -> Tensor:
        """Turn tokens into features (batch, rows, columns, num_features)."""


EncoderT = TypeVar("EncoderT", bound=MaskableEncoder, default=Any)
