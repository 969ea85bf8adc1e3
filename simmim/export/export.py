"""Export a trained encoder as an encoder directory or in the format of another library."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.channels import GRAY, RGB, describe
from simmim.data.transforms.settings import DecodeSettings
from simmim.engine.checkpoint.directory import read_best
from simmim.export.formats import GRAPHS, Format
from simmim.export.load_trained import Source, find_source, read_model_at
from simmim.export.picture_check import compare_pictures
from simmim.export.trial_image import TrialImage, trial_clip, trial_image
from simmim.recipe import read_values
from simmim.tasks.all_tasks import task_of_run
from simmim.tasks.other_encoder import OTHER_FILE, OtherEncoder, read_other_encoder
from simmim.tasks.trained import TrainedModel, method_tensors
from swinv2 import SwinV2, VideoSwinV2, load_video_encoder, save_video_encoder
from swinv2.bridges.onnx import MODEL_FILE, export_onnx
from swinv2.bridges.preprocessing import Preparation, sentences
from swinv2.bridges.reference import export_reference
from swinv2.bridges.timm import export_timm
from swinv2.bridges.torch_export import PROGRAM_FILE, export_program
from swinv2.bridges.transformers import export_transformers
from swinv2.bridges.transformers_layout import FOLDERS
from swinv2.bridges.verification import Report, compare, plain_copy
from swinv2.config import record_windows
from swinv2.config_file import METHOD_FILE, README_FILE, WEIGHTS_FILE
from swinv2.field_values import Pair
from swinv2.weights import load_encoder, load_strictly, save_encoder


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes to transfer an encoder to; None is its own."""

    image_size: int | Pair | None = None
    """Height and width of the images in pixels, or the side of a square."""
    window_size: int | Pair | None = None
    """Height and width of the attention windows in tokens, or the side of a square."""

    @property
    def given(self) -> dict[str, Any]:
        """The sizes that are not its own."""
        return {name: size for name, size in vars(self).items() if size is not None}

    def refuse(self, kind: str) -> None:
        """Raise ValueError if sizes are given, for an encoder that is not a SwinV2."""
        for name in self.given:
            raise ValueError(f"{name} is for a SwinV2, and the encoder is a {kind}: leave it out.")

    def transferred(self, found: TrainedModel) -> TrainedModel:
        """Return a model with its encoder at these sizes; no weight changes.

        Raises:
            ValueError: a size cannot work, or the encoder is one of clips.
        """
        encoder = found.encoder
        if not self.given:
            return found
        if isinstance(encoder, VideoSwinV2):
            self.refuse("VideoSwinV2")
        windows = record_windows(encoder.config)
        config = replace(encoder.config, pretrained_window_sizes=windows, **self.given)
        other = SwinV2(config)
        load_strictly(other, encoder.state_dict(), found.origin)
        return replace(found, encoder=other.eval())


def export(
    source: Path,
    destination: Path,
    form: Format,
    *,
    any_size: bool = False,
    best: bool | None = None,
    sizes: Sizes = Sizes(),
) -> list[str]:
    """Write the encoder of `source` as the folder `destination`.

    Args:
        source: a run folder (a complete checkpoint or, without one, its exported encoder), a
            checkpoint, or an encoder directory.
        destination: a new or empty folder, or an earlier export of the same format.
        form: `native` is the encoder directory, with a fine-tuned head in a folder in it, or
            weights and description of an encoder that is not a SwinV2 (no other format has these);
            `transformers` is folders for its model classes, `reference` a checkpoint of the
            published code, `timm` weights for its create_model, `onnx` and `torch-export` a graph
            that runs without this code.
        any_size: dynamic image height and width; for graphs.
        best: take the best checkpoint of a run, or the last; None is the best if it has one.
        sizes: other sizes to transfer the encoder to, as `swinv2.load_encoder` does.

    Returns:
        Lines to print: what was written, and its difference from the source after loading.

    Raises:
        ValueError: there is no such source, the destination is occupied, the other library has no
            such model, `any_size` is given for another format, or the export computes something
            else. The destination is then unchanged.
    """
    if any_size and form not in GRAPHS:
        raise ValueError(
            f"any_size is for the formats {' and '.join(GRAPHS)}, not for {form}: leave it out."
        )
    place = find_source(source, best=best)
    other = read_other_encoder(place.checkpoint, place.directory)
    if other is not None:
        sizes.refuse(other.name)
        written = _write_other(other, place, destination, form)
        note = describe_best(source, other.provenance.step)
        title = f"Exported the encoder of {place.weights}{note} as {destination}"
        return [title, *(f"  {line}" for line in written)]
    found = sizes.transferred(read_model_at(place))
    trial = _trial_input(found)
    preparation = found.preparation or Preparation()
    if trial.largest is not None:  # the data tell
        preparation = replace(preparation, largest=trial.largest)
    found = replace(found, preparation=replace(preparation, channels=found.channels))
    compared = [f"compared on {trial.origin}:"]
    written = _write(found, destination, form, trial.images, compared.append, any_size=any_size)
    note = describe_best(source, found.provenance.step)
    title = f"Exported the encoder of {found.origin}{note} as {destination}"
    return [title, *(f"  {line}" for line in [*written, *compared])]


def _write_other(other: OtherEncoder, place: Source, destination: Path, form: Format) -> list[str]:
    """Write the weights of an encoder that is not a SwinV2, as the end of its training does."""
    if form != "native":
        raise ValueError(
            f"the encoder of {place.weights} is a {other.name}, and the format {form} needs a "
            f"SwinV2: --format native writes its weights, for {other.name}.load_state_dict."
        )
    other.save(destination)
    lines = [f"{WEIGHTS_FILE} and {OTHER_FILE} of a {other.name}; README.md shows how to load them"]
    task = None if place.run is None else task_of_run(read_values(place.run.recipe))
    if place.run is not None and task is not None and task.head is not None:
        head = place.run.path / task.head
        lines.append(f"not exported: the head, which a training writes to {head} when it ends")
    return lines


def describe_best(source: Path, step: int | None) -> str:
    """Return a note on whether the weights of `step` are the best of a run; empty if unknown."""
    best = read_best(source)
    if best is None or step is None:
        return ""
    figure = f"{best.metric} {best.value:.4f}"
    if step == best.step:
        return f" (step {step}, the best: {figure})"
    return f" (step {step}; the best is step {best.step}: {figure})"


def _write(
    found: TrainedModel,
    destination: Path,
    form: Format,
    images: Tensor,
    report: Report,
    *,
    any_size: bool,
) -> list[str]:
    """Write an export and return a line per part; `report` receives the comparison."""
    if form == "native":
        return _write_native(found, destination, images, report)
    encoder, masked_image, classifier = found.encoder, found.masked_image, found.classifier
    if isinstance(encoder, VideoSwinV2):
        raise ValueError(
            f"{found.origin} is an encoder of clips, which can only be exported as native."
        )
    _refuse_other_order(found, form)
    prepared: dict[str, Any] = {"mean": found.mean, "std": found.std}
    assert found.preparation is not None
    preparation = found.preparation
    verified = {**prepared, "images": images, "report": report, "preparation": preparation}
    loads = "README.md shows how to load"
    other: list[str] = []
    if found.head is not None and classifier is None:
        # Our heads take normalised maps, and backbones of other libraries return others.
        other = [f"not exported: the head ({found.head.task}), which --format native writes"]
    if found.left_out is not None:
        other.append(f"not exported: {found.left_out}")
    if masked_image is not None and (reason := _without_place(encoder, form)) is not None:
        masked_image = None
        other.append(f"not exported: mask token and decoder ({reason})")
    heads: dict[str, Any] = {"head": masked_image, "classifier": classifier}
    match form:
        case "transformers":
            from_files: list[str] = []
            export_transformers(
                encoder,
                destination,
                **verified,
                **heads,
                classes=found.classes,
                check=lambda folder: from_files.append(compare_pictures(found, folder)),
            )
            places = {name: destination / folder for name, folder in FOLDERS.items()}
            lines = [f"{place}: {name}" for name, place in places.items() if place.is_dir()]
            if found.channels not in (None, RGB, GRAY):
                other.append("not exported: names of the channels, which README.md alone lists")
            return [*lines, f"{loads} them", *other, *from_files]
        case "reference":
            export_reference(encoder, destination, **verified, **heads)
            heads_text = "" if classifier is None else " and classifier"
            heads_text = heads_text if masked_image is None else ", mask token and decoder"
            return [f"checkpoint.pth: encoder{heads_text}; {loads} it", *other]
        case "timm":
            export_timm(encoder, destination, **verified, classifier=classifier)
            return [f"model.safetensors and config.json; {loads} them", *other]
        case "onnx" | "torch-export":
            export_graph = export_onnx if form == "onnx" else export_program
            options: dict[str, Any] = {"classifier": classifier, "classes": found.classes}
            export_graph(encoder, destination, **verified, **options, any_size=any_size)
            height, width = encoder.config.image_size
            size = "any size" if any_size else f"{height}x{width} pixels"
            file = MODEL_FILE if form == "onnx" else PROGRAM_FILE
            logits = "" if classifier is None else ", and logits,"
            what = f"feature maps of all stages{logits} for images of {size}"
            return [f"{file}: {what}; {loads} it", *other]


def _without_place(encoder: SwinV2, form: Format) -> str | None:
    """Say why a format has no place for mask token and decoder; None if it has."""
    height, width = encoder.config.image_size
    match form:
        case "timm":
            return "timm has no place for them"
        case "onnx" | "torch-export":
            return "graphs have the encoder only"
        case "reference" if encoder.config.in_channels != 3:
            return "the published decoder predicts images of 3 channels"
        case "transformers" if height != width or height % encoder.strides[-1]:
            return f"transformers decodes square images of a multiple of {encoder.strides[-1]}"
    return None


def _refuse_other_order(found: TrainedModel, form: Format) -> None:
    """Raise ValueError if a library that hands pictures to the model has their colours in another
    order than the encoder."""
    names = found.channels
    if form in GRAPHS or names is None or names == RGB or set(names) != set(RGB):
        return
    raise ValueError(
        f"the encoder of {found.origin} takes channels {describe(names)}, and models of {form} get "
        f"pictures in {describe(RGB)}: export it as native, onnx or torch-export, which record the "
        f"order, or fine-tune it with data.channels {describe(RGB)}, which reorders its weights."
    )


def _trial_input(found: TrainedModel) -> TrialImage:
    """Return the input that source and export are compared on: an image or a clip."""
    if isinstance(found.encoder, VideoSwinV2):
        return trial_clip(found.encoder.config, found.mean, found.std)
    config = found.encoder.config
    settings = DecodeSettings(channels=found.channels, image_channels=found.image_channels)
    return trial_image(config, found.mean, found.std, found.shards, settings)


def _write_native(
    found: TrainedModel, destination: Path, images: Tensor, report: Report
) -> list[str]:
    """Write an encoder directory, with a fine-tuned head in a folder in it."""
    encoder, lines = found.encoder, ["README.md shows how to load it"]
    assert found.preparation is not None
    prepared_text = sentences(encoder.config, found.preparation)

    def complete(folder: Path) -> None:
        if isinstance(encoder, SwinV2):
            _add_to_readme(folder, f"\n{prepared_text}\n")
        report(compare_native(encoder, folder, images))
        if found.head is not None:
            written = found.head.write(folder, found, images)
            lines.append(f"{found.head.folder}: {written.line}")
            _add_to_readme(folder, written.readme)
            if written.comparison:
                report(written.comparison)

    prepared: dict[str, Any] = {
        "mean": found.mean,
        "std": found.std,
        "channels": found.channels,
        "provenance": found.provenance,
        "check": complete,
    }
    masked_image = found.masked_image
    if isinstance(encoder, VideoSwinV2):
        inflated_from = found.inflated_from
        save_video_encoder(encoder, destination, **prepared, inflated_from=inflated_from)
    else:
        method = None if masked_image is None else method_tensors(masked_image)
        save_encoder(encoder, destination, **prepared, method=method)
        if method is not None:
            lines.append(f"{METHOD_FILE}: mask token and decoder")
    return [f"model.safetensors and config.json; {lines[0]}", *lines[1:]]


def _add_to_readme(folder: Path, text: str) -> None:
    with (folder / README_FILE).open("a", encoding="utf-8") as file:
        file.write(text)


def compare_native(encoder: SwinV2 | VideoSwinV2, folder: Path, images: Tensor) -> str:
    """Return a line that compares an encoder's features with those of its encoder directory.

    Raises:
        ValueError: they are not equal, bit for bit.
    """
    load = load_video_encoder if isinstance(encoder, VideoSwinV2) else load_encoder
    with torch.no_grad():
        ours, loaded = plain_copy(encoder)(images), load(folder)(images)
    return compare("its features after loading", ours, loaded, tolerance=0)
