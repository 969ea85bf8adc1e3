"""`simmim.safetensors` of an encoder directory: the mask token and the decoder of SimMIM.

With them a pretraining can be continued elsewhere, and its loss can be measured.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swinv2.config_file import METHOD_FILE, WeightsError

MASK, DECODER_WEIGHT, DECODER_BIAS = (
    "mask_token",
    "decoder.projection.weight",
    "decoder.projection.bias",
)
_TARGET = "target"


@dataclass(frozen=True, kw_only=True)
class MethodTensors:
    """Mask token and decoder of a SimMIM."""

    mask_token: Tensor
    """(1, 1, 1, embed_dim)."""
    weight: Tensor
    """Weight of the decoder, (values, num_features, 1, 1)."""
    bias: Tensor
    """(values,)."""
    target: str | None = None
    """What the decoder predicts: pixels, normalised_pixels or features; None if not recorded."""

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by their names in `simmim.SimMIM`."""
        return {
            MASK: self.mask_token,
            DECODER_WEIGHT: self.weight,
            DECODER_BIAS: self.bias,
        }

    def write(self, folder: Path) -> None:
        """Write the file into an encoder directory.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {
            name: one.detach().to("cpu", copy=True).contiguous()
            for name, one in self.named().items()
        }
        metadata = {"format": "pt"} | ({} if self.target is None else {_TARGET: self.target})
        try:
            save_file(tensors, folder / METHOD_FILE, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{folder / METHOD_FILE} cannot be written ({error}).") from error


def read_method(folder: str | os.PathLike[str]) -> MethodTensors | None:
    """Read mask token and decoder of an encoder directory; None if it has none.

    Raises:
        ValueError: the file is damaged, or lacks one of them.
    """
    file = Path(folder) / METHOD_FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            found: Mapping[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            target = (opened.metadata() or {}).get(_TARGET)
        return MethodTensors(
            mask_token=found[MASK],
            weight=found[DECODER_WEIGHT],
            bias=found[DECODER_BIAS],
            target=target,
        )
    except (SafetensorError, KeyError) as error:
        raise WeightsError(
            f"{file} does not hold mask token and decoder ({error}): export the encoder again, or "
            "remove the file to do without them."
        ) from error
