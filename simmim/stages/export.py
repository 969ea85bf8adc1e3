"""Export: a run's or a directory's encoder, as an encoder directory or for other libraries."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from simmim.data.settings import first_folder
from simmim.engine.checkpoint import complete_checkpoints, load_state, read_model
from simmim.engine.ema import read_average
from simmim.engine.run import RunFolder
from simmim.recipe import RecipeError, load, read_values, recipe_hash
from simmim.stages.classification import ClassificationRecipe
from simmim.stages.classifier import load_classifier
from simmim.stages.pretrain import load_pretrained
from simmim.stages.starting import HEAD_FOLDER, start_from
from simmim.stages.trial_image import trial_image
from swinv2 import SwinV2
from swinv2.bridges.contents import Classifier, MaskedImageHead
from swinv2.bridges.onnx import MODEL_FILE, export_onnx
from swinv2.bridges.reference import export_reference
from swinv2.bridges.timm import export_timm
from swinv2.bridges.torch_export import PROGRAM_FILE, export_program
from swinv2.bridges.transformers import export_transformers
from swinv2.bridges.transformers_layout import FOLDERS
from swinv2.bridges.verification import Report, compare, plain_copy
from swinv2.weights import (
    Provenance,
    load_encoder,
    load_strictly,
    read_encoder_config,
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

HEAD_PREFIX = "model.head."
"""What precedes the names of a linear head in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """An encoder with all that an export of it says."""

    encoder: SwinV2
    mean: tuple[float, ...]
    std: tuple[float, ...]
    provenance: Provenance
    head: MaskedImageHead | None
    """Mask token and decoder, from a pretraining run."""
    classifier: Classifier | None
    """Linear head, from a classification run."""
    classes: tuple[str, ...]
    """Names of its classes; empty where they are not known any more."""
    shards: str | None
    """What a run was trained on."""
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
        ValueError: there is no such source, the destination is occupied, the other library has no
            such model, `any_size` is for a format that is no graph, or what was written computes
            something else; the destination is left as it was then.
    """
    if any_size and form not in GRAPHS:
        raise ValueError(
            f"any_size is for the formats {' and '.join(GRAPHS)}, not for {form}: leave it out."
        )
    found = read_source(source)
    trial = trial_image(found.encoder.config, found.mean, found.std, found.shards)
    compared = [f"compared on {trial.origin}:"]
    written = _write(found, destination, form, trial.images, compared.append, any_size=any_size)
    title = f"Exported the encoder of {found.origin} as {destination}"
    return [title, *(f"  {line}" for line in [*written, *compared])]


def _write(
    found: Exportable,
    destination: Path,
    form: Format,
    images: Tensor,
    report: Report,
    *,
    any_size: bool,
) -> list[str]:
    """Write an export and return what it holds, a line each; `report` is told how it compares."""
    encoder, head, classifier = found.encoder, found.head, found.classifier
    prepared: dict[str, Any] = {"mean": found.mean, "std": found.std}
    verified = {**prepared, "images": images, "report": report}
    loads = "README.md has the lines that load"
    match form:
        case "native":
            save_encoder(
                encoder,
                destination,
                **prepared,
                provenance=found.provenance,
                check=lambda folder: report(compare_native(encoder, folder, images)),
            )
            return [f"model.safetensors and config.json; {loads} them"]
        case "transformers":
            heads: dict[str, Any] = {"head": head, "classifier": classifier}
            export_transformers(encoder, destination, **verified, **heads, classes=found.classes)
            places = {name: destination / folder for name, folder in FOLDERS.items()}
            lines = [f"{place}: {name}" for name, place in places.items() if place.is_dir()]
            return [*lines, f"{loads} them"]
        case "reference":
            export_reference(encoder, destination, **verified, head=head, classifier=classifier)
            beside = "" if classifier is None else " and classifier"
            beside = beside if head is None else ", mask token and decoder"
            return [f"checkpoint.pth: encoder{beside}; {loads} it"]
        case "timm":
            export_timm(encoder, destination, **verified, classifier=classifier)
            lines = [f"model.safetensors and config.json; {loads} them"]
            left_out = "left out: mask token and decoder, which timm has not"
            return lines if head is None else [*lines, left_out]
        case "onnx" | "torch-export":
            export_graph = export_onnx if form == "onnx" else export_program
            export_graph(encoder, destination, **verified, any_size=any_size)
            height, width = encoder.config.image_size
            size = "any size" if any_size else f"{height}x{width} pixels"
            file = MODEL_FILE if form == "onnx" else PROGRAM_FILE
            lines = [f"{file}: maps of all stages for images of {size}; {loads} it"]
            left_out = "left out: the head, since a graph is of the encoder alone"
            return lines if head is None and classifier is None else [*lines, left_out]


def compare_native(encoder: SwinV2, folder: Path, images: Tensor) -> str:
    """Return a line on the features of an encoder directory, which have to be the encoder's own.

    Raises:
        ValueError: they are not, bit for bit.
    """
    with torch.no_grad():
        ours, loaded = plain_copy(encoder)(images), load_encoder(folder)(images)
    return compare("its features after loading", ours, loaded, tolerance=0)


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
        classifier=None,
        classes=(),
        shards=None,
        origin=origin,
    )


def _read_run(run: RunFolder) -> Exportable:
    task = read_values(run.recipe).get("task")
    checkpoints = complete_checkpoints(run.checkpoints)
    if not checkpoints:
        if run.encoder.is_dir():
            ended = _read_directory(run.encoder, str(run.encoder))
            return _with_head(ended, run) if task == "classification" else ended
        raise ValueError(
            f"{run.path} holds no complete checkpoint and no encoder yet: train it further first."
        )
    match task:
        case "pretrain":
            return _read_pretraining(run, checkpoints[-1])
        case "classification":
            return _read_classification(run, checkpoints[-1])
        case "segmentation" | "detection" if run.encoder.is_dir():
            return _read_directory(run.encoder, str(run.encoder))
        case "segmentation" | "detection":
            raise ValueError(
                f"{run.path} has not handed on its encoder yet: let the training end first."
            )
        case other:
            raise RecipeError(f"{run.recipe} is of task {other!r}, which has no encoder to export.")


def _read_pretraining(run: RunFolder, checkpoint: Path) -> Exportable:
    pretrained = load_pretrained(run, str(checkpoint))
    model, recipe = pretrained.model, pretrained.recipe
    projection = model.decoder.projection
    assert projection.bias is not None
    mean, std = recipe.data.normalisation
    return Exportable(
        encoder=model.encoder,
        mean=mean,
        std=std,
        provenance=_provenance(checkpoint, recipe_hash(recipe)),
        head=MaskedImageHead(
            mask_token=model.mask_token.detach(),
            weight=projection.weight.detach(),
            bias=projection.bias.detach(),
        ),
        classifier=None,
        classes=(),
        shards=first_folder(recipe.data.shards),
        origin=str(checkpoint),
    )


def _read_classification(run: RunFolder, checkpoint: Path) -> Exportable:
    recipe = load(ClassificationRecipe, run.recipe)
    provenance = _provenance(checkpoint, recipe_hash(recipe))
    if run.encoder.is_dir():
        # A finished run needs the directory that it started from no more.
        ended = _read_directory(run.encoder, str(run.encoder))
        if ended.provenance.step == provenance.step:
            return replace(_with_head(ended, run), shards=first_folder(recipe.data.shards))
    start = start_from(recipe.init, recipe.encoder, recipe.data, recipe.training.seed)
    tensors = read_model(checkpoint) | read_average(checkpoint)
    load_strictly(start.encoder, _below(tensors, ENCODER_PREFIX), str(checkpoint))
    head = _below(tensors, HEAD_PREFIX)
    return Exportable(
        encoder=start.encoder.eval(),
        mean=start.mean,
        std=start.std,
        provenance=provenance,
        head=None,
        classifier=Classifier(weight=head["weight"], bias=head["bias"]),
        classes=_class_names(recipe, len(head["bias"])),
        shards=first_folder(recipe.data.shards),
        origin=str(checkpoint),
    )


def _with_head(ended: Exportable, run: RunFolder) -> Exportable:
    """Add the classifier that a finished run has beside its encoder directory."""
    trained = load_classifier(run.encoder, run.path / HEAD_FOLDER)
    head = trained.model.head
    classifier = Classifier(weight=head.weight.detach(), bias=head.bias.detach())
    return replace(ended, classifier=classifier, classes=trained.classes)


def _class_names(recipe: ClassificationRecipe, count: int) -> tuple[str, ...]:
    """Return the classes of the shards; none where these are gone, or are others by now."""
    try:
        classes = recipe.data.open_shards().classes
    except ValueError:
        return ()
    return classes if len(classes) == count else ()


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _provenance(checkpoint: Path, recipe: str) -> Provenance:
    state = load_state(checkpoint)
    return Provenance(step=state.step, samples_seen=state.cursor, recipe_hash=recipe)
