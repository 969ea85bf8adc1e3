"""Export: a run's or a directory's encoder, as an encoder directory or for other libraries."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from simmim.engine.checkpoint import complete_checkpoints, load_state
from simmim.engine.run import RunFolder
from simmim.recipe import RecipeError, load, read_values, recipe_hash
from simmim.stages.classification import ClassificationRecipe, starting_point
from simmim.stages.pretrain import load_pretrained
from swinv2 import SwinV2
from swinv2.bridges.onnx import MODEL_FILE, export_onnx
from swinv2.bridges.reference import export_reference, import_reference
from swinv2.bridges.timm import export_timm, find_timm, import_timm, load_in_timm
from swinv2.bridges.torch_export import PROGRAM_FILE, export_program
from swinv2.bridges.transformers import MASKED_IMAGE_FOLDER, MaskedImageHead, export_transformers
from swinv2.weights import (
    Provenance,
    load_encoder,
    load_strictly,
    read_encoder_config,
    read_tensors,
    save_encoder,
)

Format = Literal["native", "transformers", "reference", "timm", "onnx", "torch-export"]

FORMATS: tuple[Format, ...] = (
    "native",
    "transformers",
    "reference",
    "timm",
    "onnx",
    "torch-export",
)

GRAPHS: tuple[Format, ...] = ("onnx", "torch-export")
"""Those that can leave the size of images open."""

ENCODER_PREFIX = "model.encoder."
"""What precedes the encoder's names in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """An encoder with all that an export of it says."""

    encoder: SwinV2
    mean: tuple[float, ...]
    std: tuple[float, ...]
    provenance: Provenance
    head: MaskedImageHead | None
    """Mask token and decoder, from a pretraining run."""
    origin: str
    """Where the weights come from, for a person."""


def export(source: Path, destination: Path, form: Format, *, any_size: bool = False) -> list[str]:
    """Write the encoder of `source` as the folder `destination`.

    Args:
        source: a run folder, of which the last complete checkpoint is taken (or, without one, the
            encoder directory in it); or an encoder directory.
        destination: a new or empty folder, or an earlier export of the same format.
        form: `native` is the encoder directory; `transformers` is folders for its model classes,
            `reference` a checkpoint of the published code, `timm` weights for its create_model,
            `onnx` and `torch-export` a graph that runs without this code.
        any_size: leave height and width of a graph's images open.

    Returns:
        Lines to print: what was written, and how far it is from the source after loading it.

    Raises:
        ValueError: there is no such source, the destination is occupied, or the other library
            has no such model; or `any_size` is for a format that is no graph.
    """
    if any_size and form not in GRAPHS:
        raise ValueError(
            f"any_size is for the formats {' and '.join(GRAPHS)}, not for {form}: leave it out."
        )
    found = read_source(source)
    lines = [f"Exported the encoder of {found.origin} as {destination}"]
    match form:
        case "native":
            save_encoder(
                found.encoder,
                destination,
                mean=found.mean,
                std=found.std,
                provenance=found.provenance,
            )
            lines += _native_report(found.encoder, destination)
        case "transformers":
            export_transformers(
                found.encoder, destination, mean=found.mean, std=found.std, head=found.head
            )
            lines += _transformers_report(found, destination)
        case "reference":
            export_reference(
                found.encoder, destination, mean=found.mean, std=found.std, head=found.head
            )
            lines += _reference_report(found, destination)
        case "timm":
            export_timm(found.encoder, destination, mean=found.mean, std=found.std)
            lines += _timm_report(found, destination)
        case "onnx" | "torch-export":
            lines += _export_graph(found, destination, form, any_size=any_size)
    return lines


def read_source(source: Path) -> Exportable:
    """Load the encoder of a run folder or an encoder directory, on the CPU.

    Raises:
        ValueError: `source` is neither, or cannot be read.
    """
    run = RunFolder(path=source)
    if run.recipe.is_file():
        return _read_run(run)
    if (source / "config.json").is_file():
        return _read_directory(source, str(source))
    state = "does not exist" if not source.exists() else "is neither"
    raise ValueError(
        f"{source} {state}: give a run folder (with recipe.yaml and checkpoints/) or an encoder "
        "directory (with config.json and model.safetensors)."
    )


def _read_directory(path: Path, origin: str) -> Exportable:
    description = read_encoder_config(path)
    return Exportable(
        encoder=load_encoder(path),
        mean=description.mean,
        std=description.std,
        provenance=description.provenance,
        head=None,
        origin=origin,
    )


def _read_run(run: RunFolder) -> Exportable:
    checkpoints = complete_checkpoints(run.checkpoints)
    if not checkpoints:
        if run.encoder.is_dir():
            return _read_directory(run.encoder, str(run.encoder))
        raise ValueError(
            f"{run.path} holds no complete checkpoint and no encoder yet: train it further first."
        )
    match read_values(run.recipe).get("task"):
        case "pretrain":
            return _read_pretraining(run, checkpoints[-1])
        case "classification":
            return _read_classification(run, checkpoints[-1])
        case other:
            raise RecipeError(f"{run.recipe} is of task {other!r}, which has no encoder to export.")


def _read_pretraining(run: RunFolder, checkpoint: Path) -> Exportable:
    pretrained = load_pretrained(run, str(checkpoint))
    model, recipe = pretrained.model, pretrained.recipe
    projection = model.decoder.projection
    assert projection.bias is not None
    return Exportable(
        encoder=model.encoder,
        mean=recipe.data.mean,
        std=recipe.data.std,
        provenance=_provenance(checkpoint, recipe_hash(recipe)),
        head=MaskedImageHead(
            mask_token=model.mask_token.detach(),
            weight=projection.weight.detach(),
            bias=projection.bias.detach(),
        ),
        origin=str(checkpoint),
    )


def _read_classification(run: RunFolder, checkpoint: Path) -> Exportable:
    recipe = load(ClassificationRecipe, run.recipe)
    provenance = _provenance(checkpoint, recipe_hash(recipe))
    if run.encoder.is_dir():
        # A finished run needs the directory that it started from no more.
        ended = _read_directory(run.encoder, str(run.encoder))
        if ended.provenance.step == provenance.step:
            return ended
    start = starting_point(recipe)
    file = checkpoint / "model.safetensors"
    tensors = {
        name.removeprefix(ENCODER_PREFIX): tensor
        for name, tensor in read_tensors(file).items()
        if name.startswith(ENCODER_PREFIX)
    }
    load_strictly(start.encoder, tensors, str(file))
    return Exportable(
        encoder=start.encoder.eval(),
        mean=start.mean,
        std=start.std,
        provenance=provenance,
        head=None,
        origin=str(checkpoint),
    )


def _provenance(checkpoint: Path, recipe: str) -> Provenance:
    state = load_state(checkpoint)
    return Provenance(step=state.step, samples_seen=state.cursor, recipe_hash=recipe)


def _native_report(encoder: SwinV2, destination: Path) -> list[str]:
    images = trial_images(encoder)
    with torch.no_grad():
        difference = largest_difference(encoder(images), load_encoder(destination)(images))
    return [
        f"  load it with swinv2.load_encoder({str(destination)!r})",
        f"  largest difference of its features after loading: {difference:.1e}",
    ]


def _transformers_report(found: Exportable, destination: Path) -> list[str]:
    folders = [
        f"  {destination}: Swinv2Model",
        f"  {destination / 'backbone'}: Swinv2Backbone",
    ]
    if found.head is not None:
        folders.append(f"  {destination / MASKED_IMAGE_FOLDER}: Swinv2ForMaskedImageModeling")
    if find_spec("transformers") is None:
        return [
            *folders,
            "  not compared: transformers is not installed (pip install 'simmim[export]')",
        ]
    from transformers import Swinv2Model  # noqa: PLC0415 - an optional part

    peer = Swinv2Model.from_pretrained(destination).eval()
    images = trial_images(found.encoder)
    with torch.no_grad():
        theirs = peer(images).last_hidden_state
        ours = found.encoder(images).flatten(1, 2)
    difference = largest_difference(ours, theirs)
    return [*folders, f"  largest difference of Swinv2Model's features to ours: {difference:.1e}"]


def _reference_report(found: Exportable, destination: Path) -> list[str]:
    images = trial_images(found.encoder)
    back = import_reference(destination).encoder
    with torch.no_grad():
        difference = largest_difference(found.encoder(images), back(images))
    holds = "encoder" if found.head is None else "encoder, mask token and decoder"
    return [
        f"  checkpoint.pth: {holds}; README.md has the lines that load it",
        f"  largest difference of its features after reading it back: {difference:.1e}",
    ]


def _timm_report(found: Exportable, destination: Path) -> list[str]:
    lines = ["  model.safetensors: the encoder; README.md has the lines that load it"]
    if found.head is not None:
        lines.append("  left out: mask token and decoder, which timm has not")
    images = trial_images(found.encoder)
    timm, reason = find_timm()
    with torch.no_grad():
        ours = found.encoder(images)
        if timm is None:
            difference = largest_difference(ours, import_timm(destination).encoder(images))
            return [
                *lines,
                f"  not compared in timm: {reason}",
                f"  largest difference of its features after reading it back: {difference:.1e}",
            ]
        peer: Any = load_in_timm(timm, destination)
        difference = largest_difference(ours, peer.forward_features(images))
    return [*lines, f"  largest difference of timm's features to ours: {difference:.1e}"]


def _export_graph(
    found: Exportable, destination: Path, form: Literal["onnx", "torch-export"], *, any_size: bool
) -> list[str]:
    write, file = (export_onnx, MODEL_FILE) if form == "onnx" else (export_program, PROGRAM_FILE)
    difference = write(
        found.encoder, destination, mean=found.mean, std=found.std, any_size=any_size
    )
    height, width = found.encoder.config.image_size
    size = "any size" if any_size else f"{height}x{width} pixels"
    lines = [
        f"  {file}: maps of all stages for images of {size}; README.md has the lines to run it"
    ]
    if difference is None:
        return [
            *lines,
            "  not compared: onnxruntime is not installed (pip install 'simmim[export]')",
        ]
    return [*lines, f"  largest difference of its maps, of their largest value: {difference:.1e}"]


def trial_images(encoder: SwinV2) -> Tensor:
    """Return the image that exports are compared on, in the encoder's size."""
    shape = (1, encoder.config.in_channels, *encoder.config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference of two tensors."""
    return float((one - other).abs().max())
