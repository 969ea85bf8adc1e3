"""What the exports of a graph share: the trace, its comparison with PyTorch, the files beside it.

A graph takes ``images``, float32 (batch, channels, height, width), normalised, and gives the maps
of `SwinV2.features` as ``stage1``, ``stage2`` and so on. It is traced from a copy of the encoder
that shares its weights: on the CPU, in float32, in evaluation mode, without compiled blocks and
with the default execution, whatever the encoder's own state, which is left as it is.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from swinv2.bridges.any_size import AnySizeFeatures
from swinv2.bridges.contents import BridgeError
from swinv2.bridges.verification import TOLERANCE, zone_plate
from swinv2.config import Pair, SwinV2Config
from swinv2.encoder import SwinV2

GraphKind = Literal["onnx", "torch-export"]

DESCRIPTION_FILE = "preprocessing.json"
README_FILE = "README.md"
INPUT = "images"
_FORMAT = "swinv2-graph"
_FORMAT_VERSION = 1
_BATCHES = (1, 3)


class Features(nn.Module):
    """The maps of an encoder, as a module."""

    def __init__(self, encoder: SwinV2) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Give what `SwinV2.features` gives."""
        return tuple(self.encoder.features(images))


def trace(plain: SwinV2, *, any_size: bool) -> ExportedProgram:
    """Trace an encoder for batches of any length, at its image size or at any size."""
    height, width = plain.config.image_size
    images = torch.zeros(2, plain.config.in_channels, height, width)
    sizes: dict[int, Any] = {0: Dim("batch")}
    if any_size:
        sizes |= {2: Dim("height", min=1), 3: Dim("width", min=1)}
    model = AnySizeFeatures(plain) if any_size else Features(plain)
    # Without it a trace takes it for granted that no length which is open is ever one.
    open_lengths = torch.fx.experimental._config.patch(  # type: ignore[attr-defined]
        backed_size_oblivious=True
    )
    with open_lengths, torch.no_grad():
        return torch.export.export(model.eval(), (images,), dynamic_shapes=(sizes,), strict=False)


def output_names(config: SwinV2Config) -> list[str]:
    """Name the maps: stage1, stage2 and so on."""
    return [f"stage{index + 1}" for index in range(len(config.depths))]


def trial_sizes(config: SwinV2Config, *, any_size: bool) -> list[Pair]:
    """Give the image sizes that a graph is compared at.

    Where they are open, these are the nominal one, one that no patch and window divides, one
    smaller than a window in its last stages, and a single token.
    """
    height, width = config.image_size
    if not any_size:
        return [(height, width)]
    stride = config.strides[-1]
    odd = (height + stride + 1, max(width * 3 // 4, 1) + 3)
    return [(height, width), odd, (2 * stride + 1, stride - 1), (1, 1)]


@torch.no_grad()
def compare_maps(
    plain: SwinV2,
    run: Callable[[Tensor], Sequence[Tensor]],
    images: Tensor | None,
    *,
    any_size: bool,
) -> str:
    """Return a line with the largest difference of the maps of a graph to PyTorch's.

    It is the largest in a map, of the largest value in that map, for `images`, or else for a
    picture, and for batches of 1 and 3 and some sizes.

    Raises:
        BridgeError: it exceeds TOLERANCE, or a map has another shape.
    """
    largest = 0.0
    pictures = zone_plate(plain.config) if images is None else images
    for batch in (pictures, *_trial_images(plain.config, any_size=any_size)):
        ours, theirs = plain.features(batch), run(batch)
        shapes = [[tuple(one.shape) for one in maps] for maps in (ours, theirs)]
        size = "x".join(str(side) for side in batch.shape)
        if shapes[0] != shapes[1]:
            raise BridgeError(f"for images of {size} the graph gives {shapes[1]}, not {shapes[0]}.")
        for name, one, other in zip(output_names(plain.config), ours, theirs, strict=True):
            scale = max(float(one.abs().max()), torch.finfo(one.dtype).tiny)
            difference = float((one - other).abs().max()) / scale
            if not difference <= TOLERANCE:
                raise BridgeError(
                    f"for images of {size} {name} of the graph is {difference:.1e} of its largest "
                    f"value away from PyTorch's, more than {TOLERANCE:.0e}: nothing is "
                    "written. Another version of torch, onnxscript or onnxruntime may agree."
                )
            largest = max(largest, difference)
    return f"largest difference of its maps, of their largest value: {largest:.1e}"


def _trial_images(config: SwinV2Config, *, any_size: bool) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for size in trial_sizes(config, any_size=any_size):
        for batch in _BATCHES:
            yield torch.randn(batch, config.in_channels, *size, generator=generator)


def write_description(
    folder: Path,
    kind: GraphKind,
    config: SwinV2Config,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    any_size: bool,
) -> None:
    """Write ``preprocessing.json``: what the images are to be, and what the maps are."""
    stages = zip(output_names(config), config.stage_dims, config.strides, strict=True)
    content = {
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
            {"name": name, "channels": channels, "stride": stride}
            for name, channels, stride in stages
        ],
    }
    text = json.dumps(content, indent=2) + "\n"
    (folder / DESCRIPTION_FILE).write_text(text, encoding="utf-8")


def write_readme(folder: Path, config: SwinV2Config, lines: str, *, any_size: bool) -> None:
    """Write ``README.md`` with the lines that load and run the graph."""
    height, width = config.image_size
    maps = "\n".join(
        f"- `{name}`: {channels} channels, at stride {stride}"
        for name, channels, stride in zip(
            output_names(config), config.stage_dims, config.strides, strict=True
        )
    )
    sizes = (
        "of any height and width; this encoder is made for "
        if any_size
        else "of exactly this height and width: "
    )
    text = f"""# Swin Transformer V2 as a graph

In this folder:

```python
{lines}
```

`images` is float32, (batch, {config.in_channels}, height, width), any number of images
{sizes}{height}x{width} pixels. Pixels are scaled to [0, 1], then `(x - mean) / std` of each
channel; `{DESCRIPTION_FILE}` has the numbers.

The maps are (batch, channels, height / stride, width / stride), rounded up:

{maps}

The last is normalised and is the encoder's output, channels first; the others are what a stage
hands on, without a norm.
"""
    (folder / README_FILE).write_text(text, encoding="utf-8")


def is_graph_export(path: Path, kind: GraphKind, files: set[str]) -> bool:
    """Tell whether ``path`` holds an export of this kind and nothing besides."""
    known = files | {DESCRIPTION_FILE, README_FILE}
    if not path.is_dir() or not {place.name for place in path.iterdir()} <= known:
        return False
    try:
        content = json.loads((path / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(content, dict):
        return False
    return (content.get("format"), content.get("kind")) == (_FORMAT, kind)
