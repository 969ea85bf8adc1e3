"""Convert a checkpoint of another library to an encoder directory."""

from pathlib import Path

from data_prep.channels import ChannelNames, describe
from data_prep.format.text import count_noun
from simmim.export.export import compare_native
from simmim.export.formats import ImportFormat
from simmim.export.trial_image import trial_image
from simmim.tasks.trained import method_tensors
from swinv2.bridges.checkpoints import ImportedEncoder, MaskedImageHead
from swinv2.bridges.importing.detection import require_library
from swinv2.bridges.importing.mmpretrain import import_mmpretrain
from swinv2.bridges.importing.options import ImportOptions
from swinv2.bridges.importing.torchvision import import_torchvision
from swinv2.bridges.reference import import_reference
from swinv2.bridges.timm import import_timm
from swinv2.bridges.transformers import import_transformers
from swinv2.config_file import IMPLIED_CHANNELS, METHOD_FILE
from swinv2.weights import save_encoder


def import_encoder(
    source: Path,
    destination: Path,
    form: ImportFormat | None,
    known: ImportOptions,
    *,
    channels: ChannelNames | None = None,
) -> list[str]:
    """Convert a third-party checkpoint to the encoder directory `destination`.

    Args:
        source: a file, or a folder from an export or a model hub.
        destination: a new or empty folder, or an earlier encoder directory.
        form: the format of the checkpoint; None detects it by its files and names.
        known: values that the file may lack.
        channels: names of the channels; None: the file's, or else red, green and blue of three,
            gray of one.

    Returns:
        Lines to print: what was imported and what was not, and the difference after loading.

    Raises:
        ValueError: the checkpoint is of another model, does not fit, lacks a size, or would run
            code; or the destination is occupied.
    """
    if form is None:
        form = require_library(source, weights=known.weights, key=known.key)
    imported = _read(source, form, known)
    encoder, config = imported.encoder, imported.encoder.config
    trial = trial_image(config, imported.mean, imported.std)
    channels = channels or imported.channels
    if channels is None:
        channels = IMPLIED_CHANNELS.get(config.in_channels)
    compared = [f"compared on {trial.origin}:"]
    save_encoder(
        encoder,
        destination,
        mean=imported.mean,
        std=imported.std,
        channels=channels,
        method=None if imported.head is None else method_tensors(imported.head),
        check=lambda folder: compared.append(compare_native(encoder, folder, trial.images)),
    )
    height, width = config.image_size
    rows, columns = config.window_size
    name = config.variant or "custom architecture"
    sizes = (
        f"  {name}: {width}x{height} pixels, window {columns}x{rows}, "
        f"depths {config.depths}, {config.embed_dim} channels"
    )
    lines = [
        f"Imported {source} ({form}) as {destination}",
        sizes,
        f"  mean {imported.mean}, std {imported.std}, channels {describe(channels)}",
        *(f"  {note}" for note in imported.notes),
    ]
    if imported.head is not None:
        lines.append(f"  {METHOD_FILE}: mask token and decoder{_predicts(imported.head)}")
    if imported.classifier is not None:
        classes = len(imported.classifier.bias)
        lines.append(f"  not imported: the classifier of {count_noun(classes, 'class', 'classes')}")
    if imported.dropped:
        lines.append(
            f"  not imported: {len(imported.dropped)} position buffers (computed on loading)"
        )
    if imported.fresh:
        lines.append(
            f"  not in the file: {', '.join(imported.fresh)}; initialised with ones and zeros"
        )
    return [*lines, *(f"  {line}" for line in compared)]


def _predicts(head: MaskedImageHead) -> str:
    if head.norm_target is None:
        return " (the file does not say whether of normalised pixels: loss.norm_target)"
    return " of normalised pixels" if head.norm_target else " of pixels"


def _read(source: Path, form: ImportFormat, known: ImportOptions) -> ImportedEncoder:
    if known.architecture is not None and form != "timm":
        raise ValueError(f"architecture is for the timm format, not for {form}: give the sizes.")
    match form:
        case "reference":
            return import_reference(source, known)
        case "timm":
            return import_timm(source, known)
        case "transformers":
            return import_transformers(source, known)
        case "torchvision":
            return import_torchvision(source, known)
        case "mmpretrain":
            return import_mmpretrain(source, known)
