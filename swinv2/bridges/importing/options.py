"""Options of the readers of third-party checkpoints: sizes a file may lack, and which model."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from swinv2.bridges.importing.reading import CheckpointContents, WeightsChoice, read_checkpoint
from swinv2.bridges.sizes import PretrainedWindows, Sizes, as_pair, as_windows
from swinv2.field_values import Pair

Side: TypeAlias = int | Pair
"""(height, width), or the side of a square."""


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Sizes, normalisation and choice of a model; None is read from the file."""

    architecture: str | None = None
    """Name of the model in timm, such as `swinv2_base_window12to16_192to256`, which determines all
    sizes. Other libraries take no notice of it."""
    image_size: Side | None = None
    """Size of training images in pixels."""
    window_size: Side | None = None
    """Size of the attention windows in tokens."""
    pretrained_window_sizes: PretrainedWindows = None
    """Pretraining windows in tokens, one per stage; "same" for the present windows."""
    mean: Sequence[float] | None = None
    """Mean per channel, for images in [0, 1]; ImageNet's if the file has none either."""
    std: Sequence[float] | None = None
    """Standard deviation per channel, likewise."""
    weights: WeightsChoice | None = None
    """Averaged or raw weights of a file that has both; None takes averaged ones, if any."""
    key: str | None = None
    """Entry of the file, or prefix of names, of one of several models."""

    @property
    def sizes(self) -> Sizes:
        """The given sizes."""
        return Sizes(
            origin="your arguments",
            image_size=None if self.image_size is None else as_pair(self.image_size),
            window_size=None if self.window_size is None else as_pair(self.window_size),
            pretrained_window_sizes=as_windows(self.pretrained_window_sizes),
        )

    def read(self, path: str | os.PathLike[str]) -> CheckpointContents:
        """Read the chosen model of a file; see `read_checkpoint`."""
        return read_checkpoint(path, weights=self.weights, key=self.key)


NO_OPTIONS = ImportOptions()
"""Everything is read from the file."""
