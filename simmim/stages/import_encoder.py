"""Import: a checkpoint of the published code or of timm, as an encoder directory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from simmim.stages.export import largest_difference, trial_images
from swinv2.bridges.layers import Imported
from swinv2.bridges.reference import import_reference
from swinv2.bridges.sizes import PretrainedWindows
from swinv2.bridges.timm import import_timm
from swinv2.weights import load_encoder, save_encoder

ImportFormat = Literal["reference", "timm"]

IMPORT_FORMATS: tuple[ImportFormat, ...] = ("reference", "timm")


@dataclass(frozen=True, kw_only=True)
class Known:
    """What somebody knows of a checkpoint; what is ``None`` is looked for in the file."""

    architecture: str | None = None
    """Name of the model in timm, which tells all sizes."""
    image_size: int | tuple[int, int] | None = None
    """Pixels."""
    window_size: int | tuple[int, int] | None = None
    """Tokens."""
    pretrained_window_sizes: PretrainedWindows = None
    """Tokens, one window a stage; "same" where it was trained at the present windows."""
    mean: Sequence[float] | None = None
    """Of each channel, for images in [0, 1]."""
    std: Sequence[float] | None = None
    """Of each channel."""


def import_encoder(source: Path, destination: Path, form: ImportFormat, known: Known) -> list[str]:
    """Write the encoder of a checkpoint as the encoder directory `destination`.

    Args:
        source: a file, or a folder as an export or a model hub has it.
        destination: a new or empty folder, or an earlier encoder directory.
        form: the layout of the checkpoint.
        known: what the file may not tell.

    Returns:
        Lines to print: what was read, what was left out, and how far the directory is from it.

    Raises:
        ValueError: the checkpoint is of another model, does not fit, does not tell a size, or would
            run code; or the destination is occupied.
    """
    imported = _read(source, form, known)
    encoder, config = imported.encoder, imported.encoder.config
    save_encoder(encoder, destination, mean=imported.mean, std=imported.std)
    images = trial_images(encoder)
    with torch.no_grad():
        difference = largest_difference(encoder(images), load_encoder(destination)(images))
    height, width = config.image_size
    rows, columns = config.window_size
    sizes = (
        f"  {config.variant or 'own sizes'}: {width}x{height} pixels, window {columns}x{rows}, "
        f"depths {config.depths}, {config.embed_dim} channels"
    )
    lines = [
        f"Imported {source} as {destination}",
        sizes,
        f"  mean {imported.mean}, std {imported.std}",
    ]
    if imported.head is not None:
        lines.append("  left out: mask token and decoder, since this is an encoder alone")
    if imported.classifier is not None:
        classes = len(imported.classifier.bias)
        lines.append(f"  left out: the classifier of {classes} classes, since this is an encoder")
    if imported.dropped:
        lines.append(f"  left out: {len(imported.dropped)} position buffers, which are computed")
    return [*lines, f"  largest difference of its features after loading: {difference:.1e}"]


def _read(source: Path, form: ImportFormat, known: Known) -> Imported:
    match form:
        case "reference":
            if known.architecture is not None:
                raise ValueError("the reference format has no names of models: give the sizes.")
            return import_reference(
                source,
                image_size=known.image_size,
                window_size=known.window_size,
                pretrained_window_sizes=known.pretrained_window_sizes,
                mean=known.mean,
                std=known.std,
            )
        case "timm":
            return import_timm(
                source,
                architecture=known.architecture,
                image_size=known.image_size,
                window_size=known.window_size,
                pretrained_window_sizes=known.pretrained_window_sizes,
                mean=known.mean,
                std=known.std,
            )
