"""Import: a checkpoint of the published code, timm or transformers, as an encoder directory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from simmim.export.export import compare_native
from simmim.export.trial_image import trial_image
from swinv2.bridges.checkpoints import ImportedEncoder
from swinv2.bridges.reference import import_reference
from swinv2.bridges.sizes import PretrainedWindows
from swinv2.bridges.timm import import_timm
from swinv2.bridges.transformers import import_transformers
from swinv2.weights import save_encoder

ImportFormat = Literal["reference", "timm", "transformers"]

IMPORT_FORMATS: tuple[ImportFormat, ...] = ("reference", "timm", "transformers")


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
    trial = trial_image(config, imported.mean, imported.std)
    compared = [f"compared on {trial.origin}:"]
    save_encoder(
        encoder,
        destination,
        mean=imported.mean,
        std=imported.std,
        check=lambda folder: compared.append(compare_native(encoder, folder, trial.images)),
    )
    height, width = config.image_size
    rows, columns = config.window_size
    sizes = (
        f"  {config.variant or 'own sizes'}: {width}x{height} pixels, window {columns}x{rows}, "
        f"depths {config.depths}, {config.embed_dim} channels"
    )
    lines = [
        f"ImportedEncoder {source} as {destination}",
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
    if imported.fresh:
        lines.append(
            f"  not in it: {', '.join(imported.fresh)}; the final norm starts with ones and zeros"
        )
    return [*lines, *(f"  {line}" for line in compared)]


def _read(source: Path, form: ImportFormat, known: Known) -> ImportedEncoder:
    told: dict[str, Any] = {
        "image_size": known.image_size,
        "window_size": known.window_size,
        "pretrained_window_sizes": known.pretrained_window_sizes,
        "mean": known.mean,
        "std": known.std,
    }
    if known.architecture is not None and form != "timm":
        raise ValueError(f"the {form} format has no names of models: give the sizes.")
    match form:
        case "reference":
            return import_reference(source, **told)
        case "timm":
            return import_timm(source, architecture=known.architecture, **told)
        case "transformers":
            return import_transformers(source, **told)
