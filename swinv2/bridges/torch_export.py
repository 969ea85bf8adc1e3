"""The encoder as a `.pt2` program of torch.export, which runs without this code; the graph of ONNX.

A graph takes `images`, float32 (batch, channels, height, width), normalised, and returns the maps
of `SwinV2.features` as `stage1`, `stage2` and so on, then the `logits` of a classifier, if there is
one. The batch size is dynamic; height and width are those of the encoder, or dynamic too with
`any_size`: then windows, shifts, padding and masks are computed in the graph, and one pixel is
enough. A program with fixed sizes refuses others.

It is traced from a copy of the encoder that shares its weights: on the CPU, in float32, in
evaluation mode, without compiled blocks and with the default execution. The encoder is not changed.

Measured with torch 2.13, in seconds on one CPU core, comparison included:

    tiny, 256 pixels, window 8     114 MB, 10 s     any size  115 MB, 25 s
    base, 192 pixels, window 12    352 MB, 15 s     any size  356 MB, 35 s

Load a `.pt2` only from someone you trust: torch.export.load falls back to a pickle that can run
code. Here they are only written, and only what was just written is read back.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from swinv2.atomic import atomic_folder
from swinv2.bridges.any_size import AnySizeFeatures
from swinv2.bridges.checkpoints import BridgeError, ClassifierHead
from swinv2.bridges.conversion import checked_head, class_names, classifier_shapes
from swinv2.bridges.preprocessing import WHOLE_PICTURES, Preparation, describe, sentences
from swinv2.bridges.verification import TOLERANCE, Report, ignore, plain_copy, zone_plate
from swinv2.compat import export_is_refused, lengths_of_one_allowed
from swinv2.config import SwinV2Config
from swinv2.config_file import README_FILE, check_normalisation
from swinv2.encoder import SwinV2
from swinv2.field_values import Pair

GraphKind = Literal["onnx", "torch-export"]

PROGRAM_FILE = "model.pt2"
DESCRIPTION_FILE = "preprocessing.json"
INPUT = "images"
LOGITS = "logits"
_FORMAT = "swinv2-graph"
_FORMAT_VERSION = 1
_BATCHES = (1, 3)


def export_program(
    encoder: SwinV2,
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    classifier: ClassifierHead | None = None,
    classes: Sequence[str] = (),
    any_size: bool = False,
    preparation: Preparation = WHOLE_PICTURES,
    images: Tensor | None = None,
    report: Report = ignore,
) -> Path:
    """Write `encoder` as `model.pt2`, loaded and compared with PyTorch before it is kept.

    Args:
        encoder: not changed; use `SwinV2.set_input` first to export it at another size.
        path: a new or empty folder, or an earlier export.
        mean: one value per channel, for images in [0, 1].
        std: one positive value per channel.
        classifier: a linear head on average-pooled features.
        classes: names of its classes, if known.
        any_size: make height and width dynamic.
        preparation: how pictures are prepared.
        images: normalised (batch, channels, height, width), to compare the outputs on; by default
            a zone plate.
        report: called with the largest difference of the outputs.

    Raises:
        BridgeError: the program computes something different from PyTorch, or the classifier or
            the names of its classes do not fit.
        ValueError: `mean` or `std` does not fit the channels, or `path` holds other files.
    """

    def write(model: PlainModel, folder: Path) -> str:
        torch.export.save(trace(model, any_size=any_size), folder / PROGRAM_FILE)
        program = torch.export.load(folder / PROGRAM_FILE).module()
        return compare_outputs(model, program, images, any_size=any_size)

    return write_graph(
        encoder,
        path,
        kind="torch-export",
        files={PROGRAM_FILE},
        write=write,
        example=_EXAMPLE,
        note=_COMPILE,
        mean=mean,
        std=std,
        classifier=classifier,
        classes=classes,
        any_size=any_size,
        preparation=preparation,
        report=report,
    )


_EXAMPLE = f"""import torch

program = torch.export.load("{PROGRAM_FILE}").module()
images = torch.zeros(SHAPE)  # yours, prepared as below
RESULT = program(images)"""

_COMPILE = f"""
With a C++ compiler, AOTInductor compiles it ahead of time for programs without Python:
`torch._inductor.aoti_compile_and_package(torch.export.load("{PROGRAM_FILE}"),
package_path="compiled.pt2")`, and `torch._inductor.aoti_load_package("compiled.pt2")` runs it.
"""


def write_graph(
    encoder: SwinV2,
    path: str | os.PathLike[str],
    *,
    kind: GraphKind,
    files: set[str],
    write: Callable[["PlainModel", Path], str],
    example: str,
    note: str = "",
    mean: Sequence[float],
    std: Sequence[float],
    classifier: ClassifierHead | None,
    classes: Sequence[str],
    any_size: bool,
    preparation: Preparation,
    report: Report,
) -> Path:
    """Write a graph, its `preprocessing.json` and its `README.md` as the folder `path`.

    Args:
        encoder: not changed.
        path: a new or empty folder, or an earlier export of this kind.
        kind: kind of graph.
        files: names that `write` may write.
        write: writes a plain copy of the model to a folder, compares it, and returns a line about
            the comparison.
        example: lines of the README that run the graph, with SHAPE for the shape of the images and
            RESULT for what it returns.
        note: further lines of the README.
        mean: one value per channel.
        std: one positive value per channel.
        classifier: a linear head on average-pooled features.
        classes: names of its classes, if known.
        any_size: whether height and width are dynamic.
        preparation: how pictures are prepared.
        report: called with the line of `write`.

    Raises:
        BridgeError: the classifier or the names of its classes do not fit.
        ValueError: `mean` or `std` does not fit the channels, or `path` holds other files.
    """
    config = encoder.config
    head = None if classifier is None else _linear(encoder, classifier)
    model = PlainModel(plain_copy(encoder).requires_grad_(False), head)
    names = [] if classifier is None else class_names(classifier, classes)
    check_normalisation(mean, std, config.in_channels)
    shape = ", ".join(str(side) for side in (1, config.in_channels, *config.image_size))
    with atomic_folder(path, may_replace=lambda old: is_graph_export(old, kind, files)) as folder:
        report(write(model, folder))
        content = _description(kind, config, mean, std, any_size=any_size)
        if names:
            content["outputs"].append({"name": LOGITS, "classes": names})
        content["preparation"] = describe(config, preparation, mean, std)
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / DESCRIPTION_FILE).write_text(text, encoding="utf-8")
        filled = example.replace("SHAPE", shape)
        filled = filled.replace("RESULT", f"*maps, {LOGITS}" if names else "maps")
        readme = _readme(config, filled, num_classes=len(names), any_size=any_size)
        readme += f"\n{sentences(config, preparation)}\n{note}"
        (folder / README_FILE).write_text(readme, encoding="utf-8")
    return Path(path)


@dataclass(frozen=True)
class PlainModel:
    """What a graph computes, in float32 on the CPU, without gradients."""

    encoder: SwinV2
    classifier: nn.Linear | None = None
    """A linear head on average-pooled features."""

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs: stage1, stage2 and so on, then logits if there is a classifier."""
        stages = [f"stage{index + 1}" for index in range(len(self.encoder.config.depths))]
        return stages if self.classifier is None else [*stages, LOGITS]

    def outputs(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the outputs, given the maps of `SwinV2.features`."""
        if self.classifier is None:
            return tuple(maps)
        return (*maps, self.classifier(maps[-1].mean((2, 3))))


class Outputs(nn.Module):
    """The outputs of a model as a module, for images of the nominal size or of any size."""

    def __init__(self, model: PlainModel, *, any_size: bool) -> None:
        super().__init__()
        self.model = model
        self.encoder = AnySizeFeatures(model.encoder) if any_size else model.encoder
        self.classifier = model.classifier

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in the order of `PlainModel.output_names`."""
        encoder = self.encoder
        maps = encoder.features(images) if isinstance(encoder, SwinV2) else encoder(images)
        return self.model.outputs(maps)


def _linear(encoder: SwinV2, classifier: ClassifierHead) -> nn.Linear:
    tensors = {"weight": classifier.weight, "bias": classifier.bias}
    shapes = classifier_shapes(encoder.config, "", len(classifier.bias))
    checked = {name: one.float() for name, one in checked_head(tensors, shapes).items()}
    with torch.device("meta"):
        linear = nn.Linear(encoder.num_features, len(classifier.bias))
    linear.load_state_dict(checked, assign=True)
    return linear.requires_grad_(False)


def trace(model: PlainModel, *, any_size: bool) -> ExportedProgram:
    """Trace a model for any batch size, at the encoder's image size or at any size.

    Raises:
        BridgeError: this version of torch cannot trace it for any size, as 2.8 cannot.
    """
    config = model.encoder.config
    height, width = config.image_size
    sizes: dict[int, Any] = {0: Dim("batch")}
    if any_size:
        # A compiler takes the lengths of this example for hints, and a hint of 1 for a constant:
        # every stage has more than one window.
        height, width = ((side + 1) * config.strides[-1] for side in config.window_size)
        sizes |= {2: Dim("height", min=1), 3: Dim("width", min=1)}
    images = torch.zeros(2, config.in_channels, height, width)
    outputs = Outputs(model, any_size=any_size).eval()
    try:
        with lengths_of_one_allowed(), torch.no_grad():
            return torch.export.export(outputs, (images,), dynamic_shapes=(sizes,), strict=False)
    except Exception as error:
        if not any_size or not export_is_refused(error):
            raise
        nominal = "x".join(str(side) for side in config.image_size)
        raise BridgeError(
            f"torch {torch.__version__} cannot trace the encoder for images of any size: install "
            f"torch 2.13 or newer, or export it for {nominal} pixels only."
        ) from error


def trial_sizes(config: SwinV2Config, *, any_size: bool) -> list[Pair]:
    """Return the image sizes that a graph is compared at.

    Dynamic sizes are the nominal one, one that neither patches nor windows divide, one with fewer
    tokens than a window in the last stages, and a single token.
    """
    height, width = config.image_size
    if not any_size:
        return [(height, width)]
    stride = config.strides[-1]
    odd = (height + stride + 1, max(width * 3 // 4, 1) + 3)
    return [(height, width), odd, (2 * stride + 1, stride - 1), (1, 1)]


@torch.no_grad()
def compare_outputs(
    model: PlainModel,
    run: Callable[[Tensor], Sequence[Tensor]],
    images: Tensor | None,
    *,
    any_size: bool,
) -> str:
    """Return a line with the largest difference between the outputs of a graph and PyTorch's.

    Differences are relative to the largest value of their output. Compared are `images`, or a zone
    plate, and random batches of 1 and 3 images at the sizes of `trial_sizes`.

    Raises:
        BridgeError: a difference exceeds TOLERANCE, or an output has another shape.
    """
    largest = 0.0
    config = model.encoder.config
    pictures = zone_plate(config) if images is None else images
    for batch in (pictures, *_trial_images(config, any_size=any_size)):
        ours, theirs = model.outputs(model.encoder.features(batch)), run(batch)
        shapes = [[tuple(one.shape) for one in outputs] for outputs in (ours, theirs)]
        size = "x".join(str(side) for side in batch.shape)
        if shapes[0] != shapes[1]:
            raise BridgeError(
                f"not exported: for images of {size} the graph returns {shapes[1]}, "
                f"not {shapes[0]}."
            )
        for name, one, other in zip(model.output_names, ours, theirs, strict=True):
            scale = max(float(one.abs().max()), torch.finfo(one.dtype).tiny)
            difference = float((one - other).abs().max()) / scale
            if not difference <= TOLERANCE:
                raise BridgeError(
                    f"not exported: for images of {size}, {name} of the graph differs from "
                    f"PyTorch's by {difference:.1e} of its largest value, more than "
                    f"{TOLERANCE:.0e}: try another version of torch, onnxscript or onnxruntime."
                )
            largest = max(largest, difference)
    what = "maps" if model.classifier is None else "maps and logits"
    return f"largest difference of its {what}, relative to their largest value: {largest:.1e}"


def _trial_images(config: SwinV2Config, *, any_size: bool) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for size in trial_sizes(config, any_size=any_size):
        for batch in _BATCHES:
            yield torch.randn(batch, config.in_channels, *size, generator=generator)


def _description(
    kind: GraphKind,
    config: SwinV2Config,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    any_size: bool,
) -> dict[str, Any]:
    """Return the content of `preprocessing.json`: the input and the outputs of a graph."""
    stages = zip(config.stage_dims, config.strides, strict=True)
    return {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "kind": kind,
        "input": {
            "name": INPUT,
            "dtype": "float32",
            "layout": ["batch", "channels", "height", "width"],
            "channels": config.in_channels,
            "image_size": list(config.image_size),
            "any_size": any_size,
            "scale": [0.0, 1.0],
            "mean": [float(value) for value in mean],
            "std": [float(value) for value in std],
        },
        "outputs": [
            {"name": f"stage{number}", "channels": channels, "stride": stride}
            for number, (channels, stride) in enumerate(stages, start=1)
        ],
    }


def _readme(config: SwinV2Config, example: str, *, num_classes: int, any_size: bool) -> str:
    height, width = config.image_size
    stages = zip(config.stage_dims, config.strides, strict=True)
    maps = "\n".join(
        f"- `stage{number}`: {channels} channels, at stride {stride}"
        for number, (channels, stride) in enumerate(stages, start=1)
    )
    logits = (
        f"\n`{LOGITS}` is (batch, {num_classes}): a score for each class, before the softmax (or "
        f"sigmoid, of a model of several labels),\nin the order of the names in "
        f"`{DESCRIPTION_FILE}`.\n"
    )
    sizes = (
        "of any height and width; this encoder was trained at "
        if any_size
        else "of exactly this height and width: "
    )
    return f"""# Swin Transformer V2 as a graph

In this folder:

```python
{example}
```

`images` is float32, (batch, {config.in_channels}, height, width), any number of images
{sizes}{height}x{width} pixels. Pixels are scaled to [0, 1], then `(x - mean) / std` of each
channel; `{DESCRIPTION_FILE}` has the numbers.

The maps are (batch, channels, height / stride, width / stride), rounded up:

{maps}

The last is normalised and is the encoder's output, channels first; the others are outputs of the
stages, without a norm.
{logits if num_classes else ""}"""


def is_graph_export(path: Path, kind: GraphKind, files: set[str]) -> bool:
    """Return whether `path` is an export of this kind and holds nothing else."""
    known = files | {DESCRIPTION_FILE, README_FILE}
    if not path.is_dir() or not {place.name for place in path.iterdir()} <= known:
        return False
    try:
        content = json.loads((path / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(content, dict):
        return False
    return (content.get("format"), content.get("kind")) == (_FORMAT, kind)
