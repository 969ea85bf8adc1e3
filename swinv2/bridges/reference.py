"""The checkpoints of the published code (microsoft/Swin-Transformer, microsoft/SimMIM).

A checkpoint is a pickle with the tensors under ``model``: those of the encoder alone, with ``head``
after a classification, or with ``encoder.`` before each name, a mask token and a decoder after
SimMIM. It is read without running code. Its loaders compute position buffers anew and take a file
without them, so an export has none.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swinv2.atomic import atomic_folder
from swinv2.attention import window_grid
from swinv2.bridges.checkpoints import (
    BridgeError,
    Classifier,
    Imported,
    MaskedImageHead,
    read_checkpoint,
)
from swinv2.bridges.conversion import (
    RECORD,
    Found,
    Layout,
    assemble,
    checked_head,
    classifier_shapes,
    convert,
    count_classes,
    decoder_shapes,
)
from swinv2.bridges.layer_names import (
    layer_parts,
    obstacles,
    read_architecture,
    refuse_other_models,
    their_windows,
    without_buffers,
)
from swinv2.bridges.sizes import (
    PretrainedWindows,
    Sizes,
    as_pair,
    as_windows,
    given_sizes,
    read_buffers,
)
from swinv2.bridges.verification import Report, check_read_back, compare_read_back, ignore
from swinv2.config import Pair, SwinV2Config, clamp_window
from swinv2.config_file import check_normalisation
from swinv2.encoder import SwinV2

CHECKPOINT_FILE = "checkpoint.pth"
CONFIG_FILE = "config.yaml"
README_FILE = "README.md"
_CHANNELS = 3  # that the published decoder predicts, whatever goes in
_ENCODER = Layout(split=partial(layer_parts, merge_shift=0), classifier="head.")
_SIMMIM = replace(
    _ENCODER, prefix="encoder.", mask="encoder.mask_token", decoder_channels=_CHANNELS
)


def reference_config(encoder: SwinV2) -> dict[str, Any]:
    """Return the arguments of the published ``SwinTransformerV2`` that computes the same.

    Raises:
        BridgeError: there is no such model; all reasons are listed.
    """
    config = encoder.config
    problems = _obstacles(config)
    if problems:
        raise BridgeError(
            "the reference code cannot compute what this encoder computes:\n  "
            + "\n  ".join(problems)
        )
    height, width = config.image_size
    return {
        "img_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "num_classes": 0,
        "embed_dim": config.embed_dim,
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "window_size": config.window_size[0],
        "mlp_ratio": config.mlp_ratio,
        "drop_path_rate": config.drop_path,
        "pretrained_window_sizes": their_windows(config),
    }


def to_reference(
    encoder: SwinV2,
    *,
    head: MaskedImageHead | None = None,
    classifier: Classifier | None = None,
) -> dict[str, Tensor]:
    """Return the encoder's tensors under the names of the published models, on the CPU.

    Those of ``SimMIM`` with a mask token and decoder, else those of ``SwinTransformerV2``.

    Raises:
        BridgeError: there is no such model, or a head does not fit the encoder.
    """
    reference_config(encoder)
    if head is not None and classifier is not None:
        raise BridgeError("a checkpoint has a decoder or a classifier: leave one of them out.")
    tensors = convert(encoder, _ENCODER.split)
    if classifier is not None:
        added = {"head.weight": classifier.weight, "head.bias": classifier.bias}
        shapes = classifier_shapes(encoder.config, "head.", len(classifier.bias))
        return tensors | checked_head(added, shapes)
    if head is None:
        return tensors
    if encoder.config.in_channels != _CHANNELS:
        raise BridgeError(
            f"the published decoder predicts images of {_CHANNELS} channels, not "
            f"{encoder.config.in_channels}: leave the head out."
        )
    added = {
        "encoder.mask_token": head.mask_token.reshape(1, 1, -1),
        "decoder.0.weight": head.weight,
        "decoder.0.bias": head.bias,
    }
    masked = {_SIMMIM.prefix + name: part for name, part in tensors.items()}
    return masked | checked_head(added, decoder_shapes(encoder.config, _SIMMIM))


def export_reference(
    encoder: SwinV2,
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    head: MaskedImageHead | None = None,
    classifier: Classifier | None = None,
    images: Tensor | None = None,
    report: Report = ignore,
) -> Path:
    """Write ``encoder`` as a folder for the published code, and read it back before it is kept.

    ``checkpoint.pth`` has the tensors, ``config.yaml`` the settings for its ``--cfg``, and
    ``README.md`` the lines that load it.

    Args:
        encoder: left as it is; use `SwinV2.set_input` first to export it at another size.
        path: a new or empty folder, or an earlier export.
        mean: one value a channel, for images in [0, 1].
        std: one positive value a channel.
        head: mask token and decoder, for a checkpoint of SimMIM.
        classifier: for a checkpoint of a classification.
        images: normalised (batch, channels, height, width), to compare features on before the
            folder takes its place; by default a chart.
        report: is told how far they are apart.

    Raises:
        BridgeError: the published code has no such model, a head does not fit, or what was read
            back computes something else.
        ValueError: ``mean`` or ``std`` does not fit the channels, or ``path`` is occupied.
    """
    check_normalisation(mean, std, encoder.config.in_channels)
    arguments = reference_config(encoder)
    tensors = to_reference(encoder, head=head, classifier=classifier)
    if classifier is not None:
        arguments["num_classes"] = len(classifier.bias)
    settings = _settings(arguments)
    content = {
        "model": tensors,
        "config": settings,
        RECORD: asdict(encoder.config),
        "normalisation": {
            "mean": [float(value) for value in mean],
            "std": [float(value) for value in std],
        },
    }
    with atomic_folder(path, may_replace=is_reference_export) as folder:
        torch.save(content, folder / CHECKPOINT_FILE)
        # Every JSON text is YAML too.
        text = json.dumps(settings, indent=2) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        (folder / README_FILE).write_text(
            _readme(arguments, masked=head is not None), encoding="utf-8"
        )
        back = import_reference(folder).encoder
        check_read_back(encoder, back)
        report(compare_read_back(encoder, back, images))
    return Path(path)


def import_reference(
    path: str | os.PathLike[str],
    *,
    image_size: int | Pair | None = None,
    window_size: int | Pair | None = None,
    pretrained_window_sizes: PretrainedWindows = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Imported:
    """Read a checkpoint of the published code, or a folder that `export_reference` wrote.

    The learned tensors tell the architecture. Image size, window size and pretraining windows are
    taken from the position buffers or the settings in the file; what neither tells has to be given.

    Args:
        path: a file (.pth or .safetensors) or a folder.
        image_size: (height, width) in pixels that it was trained at.
        window_size: (height, width) in tokens.
        pretrained_window_sizes: of each stage, in tokens; "same" where it was trained at these.
        mean: of each channel; by default what the file says, or ImageNet's, as the code has it.
        std: of each channel, in the same way.

    Raises:
        BridgeError: it is of another model, a tensor is missing, unexpected or misshapen, a size is
            unknown or contradicts the file, or reading the file would run code.
    """
    place = Path(path)
    found = _find(place / CHECKPOINT_FILE if place.is_dir() else place)
    given = given_sizes(image_size, window_size, pretrained_window_sizes)
    return assemble(found, given, mean=mean, std=std)


def _find(file: Path) -> Found:
    checkpoint = read_checkpoint(file, entries=("model", "state_dict"))
    source, extras = checkpoint.source, checkpoint.extras
    named = {
        name.replace(".rpe_mlp.", ".cpb_mlp."): part for name, part in checkpoint.tensors.items()
    }
    learned, dropped = without_buffers(named)
    layout = _SIMMIM if any(name.startswith(_SIMMIM.prefix) for name in learned) else _ENCODER
    tensors = {name.removeprefix(layout.prefix): part for name, part in learned.items()}
    refuse_other_models(tensors, source, "layers")
    _refuse_settings_of_another(extras, source)
    architecture = read_architecture(tensors, source)
    _refuse_layout_of_timm(tensors, len(architecture["depths"]), source)
    told, drop_path = _read_settings(extras)
    buffers = {name.removeprefix(layout.prefix): named[name] for name in dropped}
    norms = _node(extras, "normalisation")
    return Found(
        source=source,
        tensors=learned,
        dropped=dropped,
        layout=layout,
        architecture=architecture,
        known=[told, read_buffers(buffers, architecture)],
        drop_path=drop_path,
        recorded=extras.get(RECORD),
        num_classes=count_classes(learned, layout.classifier),
        mean=norms.get("mean"),
        std=norms.get("std"),
    )


def is_reference_export(path: Path) -> bool:
    """Tell whether ``path`` is what `export_reference` wrote, and holds nothing else."""
    names = {CHECKPOINT_FILE, CONFIG_FILE, README_FILE}
    return path.is_dir() and {place.name for place in path.iterdir()} == names


def _obstacles(config: SwinV2Config) -> list[str]:
    """Say what of ``config`` the published code cannot compute."""
    if config.window_size[0] != config.window_size[1]:
        return [f"window {config.window_size} is not square: load it with a square window"]
    problems = obstacles(config)
    if any(side % config.strides[-1] for side in config.image_size):
        problems.append(
            f"image_size {config.image_size} is not divided by {config.strides[-1]}, and theirs "
            "merges no odd maps: load it with one that is"
        )
        return problems
    for stage, resolution in enumerate(config.stage_resolutions):
        window, moves = clamp_window(min(resolution), config.window_size[0])
        shift = config.window_size[0] // 2 if moves else 0
        ours = window_grid(resolution, config.window_size, shifted=True)
        if (ours.window, ours.shift) != ((window, window), (shift, shift)):
            problems.append(
                f"stage {stage + 1} of {resolution[0]}x{resolution[1]} tokens: theirs takes window "
                "and shift of both axes from the shorter one: load it with a square image_size"
            )
    return problems


def _settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments as the published code's settings, with its names and nesting."""
    swin = {
        name.upper(): value
        for name, value in arguments.items()
        if name not in ("img_size", "num_classes", "drop_path_rate")
    }
    return {
        "DATA": {"IMG_SIZE": arguments["img_size"]},
        "MODEL": {
            "TYPE": "swinv2",
            "NUM_CLASSES": arguments["num_classes"],
            "DROP_PATH_RATE": arguments["drop_path_rate"],
            "SWINV2": swin,
        },
    }


def _refuse_layout_of_timm(tensors: Mapping[str, Tensor], num_stages: int, source: str) -> None:
    merges = {
        stage
        for stage in range(num_stages)
        for name in tensors
        if name.startswith(f"layers.{stage}.downsample.")
    }
    if 0 not in merges and num_stages - 1 in merges:
        raise BridgeError(
            f"{source} is laid out as timm does it (it has no layers.0.downsample): "
            "import it with --format timm."
        )


def _refuse_settings_of_another(extras: Mapping[str, Any], source: str) -> None:
    model = _node(extras.get("config"), "MODEL")
    kind = model.get("TYPE", "swinv2")
    if kind != "swinv2":
        raise BridgeError(
            f"{source} says that its model is {kind!r}, and a Swin Transformer V2 is expected."
        )


def _read_settings(extras: Mapping[str, Any]) -> tuple[Sizes, float]:
    """Return the sizes and the stochastic depth that the settings in a checkpoint tell."""
    origin = "its settings"
    config = extras.get("config")
    model = _node(config, "MODEL")
    swin, image = _node(model, "SWINV2"), _node(config, "DATA").get("IMG_SIZE")
    drop_path = model.get("DROP_PATH_RATE", 0.0)
    if "WINDOW_SIZE" not in swin or image is None:
        return Sizes(origin=origin), 0.0
    return Sizes(
        origin=origin,
        image_size=as_pair(image),
        window_size=as_pair(swin["WINDOW_SIZE"]),
        pretrained_window_sizes=as_windows(swin.get("PRETRAINED_WINDOW_SIZES", "same")),
    ), float(drop_path)


def _node(settings: object, name: str) -> Mapping[str, Any]:
    found = settings.get(name) if isinstance(settings, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _readme(arguments: Mapping[str, Any], *, masked: bool) -> str:
    listed = "".join(f"    {name}={value!r},\n" for name, value in arguments.items())
    tensors = 'torch.load("checkpoint.pth", map_location="cpu", weights_only=True)["model"]'
    if masked:
        tensors = (
            '{\n    name.removeprefix("encoder."): tensor\n    for name, tensor in torch.load(\n'
            '        "checkpoint.pth", map_location="cpu", weights_only=True\n'
            '    )["model"].items()\n'
            '    if name.startswith("encoder.") and name != "encoder.mask_token"\n}'
        )
    holds = "encoder, mask token and decoder of SimMIM" if masked else "encoder"
    return f"""# Swin Transformer V2 for the published code

`checkpoint.pth` holds the {holds}, `config.yaml` its sizes. In a checkout of
microsoft/Swin-Transformer, with the files of this folder beside:

```python
import torch
from models.swin_transformer_v2 import SwinTransformerV2

model = SwinTransformerV2(
{listed})
missing, unexpected = model.load_state_dict(
    {tensors},
    strict=False,
)
buffers = ("relative_coords_table", "relative_position_index", "attn_mask")
assert not unexpected and all(name.endswith(buffers) for name in missing)
```

The position buffers are not in the file: the model computes them from its sizes. To fine-tune:
`python main_simmim_ft.py --cfg config.yaml --pretrained checkpoint.pth ...`. (`main.py
--pretrained` asks for a classifier, `head`, in the file.)
"""
