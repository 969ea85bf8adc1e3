"""How an export is held to its encoder before it is kept: the same numbers on the same image."""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from swinv2.bridges.contents import BridgeError
from swinv2.config import SwinV2Config
from swinv2.encoder import HierarchicalEncoder, SwinV2

Encoder = TypeVar("Encoder", bound=HierarchicalEncoder)

TOLERANCE = 1e-4
"""What rounding in float32 may change, as a share of the greatest number compared."""

Report = Callable[[str], None]
"""Is told, a line each, what was compared and how far it is apart."""


def ignore(line: str) -> None:
    """Report to nobody."""


def compare(what: str, ours: Tensor, theirs: Tensor, *, tolerance: float = TOLERANCE) -> str:
    """Return a line with the largest difference of two tensors.

    Args:
        what: is compared to what.
        ours: as the encoder computes it.
        theirs: as the export does.
        tolerance: the largest difference allowed, as a share of the greatest of `ours`.

    Raises:
        BridgeError: they are further apart, of another shape, or not finite.
    """
    if ours.shape != theirs.shape:
        raise BridgeError(
            f"not exported: {what}: theirs have shape {tuple(theirs.shape)}, ours "
            f"{tuple(ours.shape)}."
        )
    greatest = float(ours.abs().max())
    difference = float((ours - theirs).abs().max())
    if not math.isfinite(greatest):
        raise BridgeError(f"not exported: {what}: ours are not finite, so its weights are damaged.")
    if not difference <= tolerance * greatest:  # which NaN is not either
        raise BridgeError(
            f"not exported: the largest difference of {what} is {difference:.1e}, and numbers up "
            f"to {greatest:.1e} allow for {tolerance * greatest:.1e}. What was written does not "
            "compute what the encoder does: use another version of that library or another format."
        )
    return f"largest difference of {what}: {difference:.1e}"


def compare_read_back(encoder: SwinV2, back: SwinV2, images: Tensor | None) -> str:
    """Return a line with the largest difference of features after reading an export back.

    Raises:
        BridgeError: there is one.
    """
    images = zone_plate(encoder.config) if images is None else images
    with torch.no_grad():
        ours, theirs = plain_copy(encoder)(images), back(images)
    return compare("its features after reading it back", ours, theirs, tolerance=0)


def plain_copy(encoder: Encoder) -> Encoder:
    """Return an encoder that shares the weights: float32, CPU, evaluation, nothing else set."""
    with torch.device("meta"):
        plain = type(encoder)(encoder.config)
    tensors = {
        name: tensor.detach().to("cpu", torch.float32)
        for name, tensor in encoder.state_dict().items()
    }
    plain.load_state_dict(tensors, assign=True)
    return plain.eval()


def zone_plate(config: SwinV2Config) -> Tensor:
    """Draw rings that get finer from the middle to the border, out of phase in each channel.

    Returns:
        (1, channels, height, width) of the encoder's size, from -1.5 to 1.5.
    """
    height, width = config.image_size
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    squares = rows[:, None].square() + columns[None, :].square()
    phases = torch.arange(config.in_channels) * 2.0
    return 1.5 * torch.cos(squares * (height + width) / 4 + phases[:, None, None])[None]
