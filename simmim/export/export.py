"""Export: a run's or a directory's encoder, as an encoder directory or for other libraries."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simmim.export.load_trained import Exportable, read_source
from simmim.export.trial_image import TrialImage, trial_clip, trial_image
from simmim.tasks.classification.classifier import load_classifier, save_head
from simmim.tasks.features import pool
from simmim.tasks.pretrained import HEAD_FOLDER
from simmim.tasks.segmentation.save_heads import answer_of, load_dense, save_dense
from swinv2 import SwinV2, VideoSwinV2, load_video_encoder, save_video_encoder
from swinv2.bridges.onnx import MODEL_FILE, export_onnx
from swinv2.bridges.reference import export_reference
from swinv2.bridges.timm import export_timm
from swinv2.bridges.torch_export import PROGRAM_FILE, export_program
from swinv2.bridges.transformers import export_transformers
from swinv2.bridges.transformers_layout import FOLDERS
from swinv2.bridges.verification import Report, compare, plain_copy
from swinv2.config_file import README_FILE
from swinv2.weights import load_encoder, save_encoder

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


def export(
    source: Path, destination: Path, form: Format, *, any_size: bool = False, best: bool = False
) -> list[str]:
    """Write the encoder of `source` as the folder `destination`.

    Args:
        source: a run folder, of which the last complete checkpoint is taken (or, without one, what
            it has handed on); a checkpoint in one; or an encoder directory.
        destination: a new or empty folder, or an earlier export of the same format.
        form: `native` is the encoder directory, with the head of a fine-tuning in a folder of its
            own; `transformers` is folders for its model classes,
            `reference` a checkpoint of the published code, `timm` weights for its create_model,
            `onnx` and `torch-export` a graph that runs without this code.
        any_size: leave height and width of a graph's images open.
        best: take the best checkpoint of the run instead of the last.

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
    found = read_source(source, best=best)
    trial = _trial(found)
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
    if form == "native":
        return _write_native(found, destination, images, report)
    encoder, head, classifier = found.encoder, found.head, found.classifier
    if isinstance(encoder, VideoSwinV2):
        raise ValueError(f"{found.origin} is an encoder of clips, which has no format but native.")
    prepared: dict[str, Any] = {"mean": found.mean, "std": found.std}
    verified = {**prepared, "images": images, "report": report}
    loads = "README.md has the lines that load"
    # Heads take normalised maps; the backbones of other libraries give them as they come.
    left_out = "left out: the head of the {}, which --format native writes for transformers"
    dense = [] if found.dense is None else [left_out.format(found.dense.task)]
    match form:
        case "transformers":
            heads: dict[str, Any] = {"head": head, "classifier": classifier}
            export_transformers(encoder, destination, **verified, **heads, classes=found.classes)
            places = {name: destination / folder for name, folder in FOLDERS.items()}
            lines = [f"{place}: {name}" for name, place in places.items() if place.is_dir()]
            return [*lines, f"{loads} them", *dense]
        case "reference":
            export_reference(encoder, destination, **verified, head=head, classifier=classifier)
            beside = "" if classifier is None else " and classifier"
            beside = beside if head is None else ", mask token and decoder"
            return [f"checkpoint.pth: encoder{beside}; {loads} it", *dense]
        case "timm":
            export_timm(encoder, destination, **verified, classifier=classifier)
            lines = [f"model.safetensors and config.json; {loads} them", *dense]
            decoder = "left out: mask token and decoder, which timm has not"
            return lines if head is None else [*lines, decoder]
        case "onnx" | "torch-export":
            export_graph = export_onnx if form == "onnx" else export_program
            export_graph(encoder, destination, **verified, any_size=any_size)
            height, width = encoder.config.image_size
            size = "any size" if any_size else f"{height}x{width} pixels"
            file = MODEL_FILE if form == "onnx" else PROGRAM_FILE
            lines = [f"{file}: maps of all stages for images of {size}; {loads} it"]
            alone = "left out: the head, since a graph is of the encoder alone"
            return [*lines, alone] if head or classifier or dense else lines


def _trial(found: Exportable) -> TrialImage:
    """Return what the encoder is tried on: a picture, or a clip."""
    if isinstance(found.encoder, VideoSwinV2):
        return trial_clip(found.encoder.config, found.mean, found.std)
    return trial_image(found.encoder.config, found.mean, found.std, found.shards)


def _write_native(
    found: Exportable, destination: Path, images: Tensor, report: Report
) -> list[str]:
    """Write an encoder directory, and the head of a fine-tuning in a folder within it."""
    encoder, lines = found.encoder, ["README.md has the lines that load it"]

    def complete(folder: Path) -> None:
        report(compare_native(encoder, folder, images))
        if found.classifier is not None:
            report(_write_classifier(found, folder, images))
            lines.append(f"{HEAD_FOLDER}: the head of {len(found.classifier.bias)} classes")
        if found.dense is not None:
            report(_write_dense(found, folder, images))
            lines.append(f"{found.dense.task}: encoder and head, for transformers")

    prepared: dict[str, Any] = {
        "mean": found.mean,
        "std": found.std,
        "provenance": found.provenance,
        "check": complete,
    }
    if isinstance(encoder, VideoSwinV2):
        inflated_from = found.inflated_from
        save_video_encoder(encoder, destination, **prepared, inflated_from=inflated_from)
    else:
        save_encoder(encoder, destination, **prepared)
    return [f"model.safetensors and config.json; {lines[0]}", *lines[1:]]


def _write_classifier(found: Exportable, folder: Path, images: Tensor) -> str:
    """Write a classifier into an encoder directory, and return a line on what it says."""
    assert found.classifier is not None
    weight, bias = found.classifier.weight, found.classifier.bias
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight, "bias": bias})
    names = found.classes or tuple(f"class {number}" for number in range(len(bias)))
    save_head(head, folder / HEAD_FOLDER, names)
    _add_to_readme(folder, CLASSIFIER_LINES)
    with torch.no_grad():
        ours = head(pool(plain_copy(found.encoder)(images)))
        loaded = load_classifier(folder, folder / HEAD_FOLDER).model(images)
    return compare("its classes after loading", ours, loaded, tolerance=0)


def _write_dense(found: Exportable, folder: Path, images: Tensor) -> str:
    """Write the model of a dense stage into an encoder directory; return a line on its answers."""
    assert found.dense is not None
    net, place = found.dense.net(), folder / found.dense.task
    save_dense(net, place, mean=found.mean, std=found.std)
    architecture = type(net).__name__
    _add_to_readme(folder, DENSE_LINES.format(name=architecture, folder=found.dense.task))
    with torch.no_grad():
        ours, loaded = net(pixel_values=images), load_dense(place)(pixel_values=images)
    # Convolutions may round otherwise from one call to the next, so the tolerance is not 0.
    return compare(f"{architecture} after loading", answer_of(ours), answer_of(loaded))


def _add_to_readme(folder: Path, text: str) -> None:
    with (folder / README_FILE).open("a", encoding="utf-8") as file:
        file.write(text)


CLASSIFIER_LINES = f"""
With its head, and `simmim` installed:

```python
from pathlib import Path

from simmim.tasks.classification.classifier import load_classifier

trained = load_classifier(Path("."), Path("{HEAD_FOLDER}"))
```

`trained.model` gives a score for each of `trained.classes`.
"""

DENSE_LINES = """
With its head, and transformers installed:

```python
from swinv2.bridges.transformers_backbone import register_backbone
from transformers import {name}

register_backbone()
model = {name}.from_pretrained("{folder}")
```
"""


def compare_native(encoder: SwinV2 | VideoSwinV2, folder: Path, images: Tensor) -> str:
    """Return a line on the features of an encoder directory, which have to be the encoder's own.

    Raises:
        ValueError: they are not, bit for bit.
    """
    load = load_video_encoder if isinstance(encoder, VideoSwinV2) else load_encoder
    with torch.no_grad():
        ours, loaded = plain_copy(encoder)(images), load(folder)(images)
    return compare("its features after loading", ours, loaded, tolerance=0)
