"""The checkpoints of the published code (microsoft/Swin-Transformer, microsoft/SimMIM).

A checkpoint is a pickle with the tensors under `model`: those of the encoder, for a classification
also `head`, and for SimMIM with the prefix `encoder.`, a mask token and a decoder. It is read
without running code. The published loaders recompute position buffers, so an export has none.
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
    ClassifierHead,
    ImportedEncoder,
    MaskedImageHead,
)
from swinv2.bridges.conversion import (
    CONFIG_KEY,
    ParsedCheckpoint,
    TensorLayout,
    assemble,
    checked_head,
    classifier_shapes,
    convert,
    count_classes,
    decoder_shapes,
    describe_beside,
)
from swinv2.bridges.importing.options import NO_OPTIONS, ImportOptions
from swinv2.bridges.importing.reading import (
    CheckpointContents,
)
from swinv2.bridges.layer_names import (
    check_is_swinv2,
    pretrained_windows_argument,
    read_architecture,
    rename_tensor,
    split_off_buffers,
    unsupported,
)
from swinv2.bridges.preprocessing import WHOLE_PICTURES, Preparation, describe, sentences
from swinv2.bridges.sizes import (
    Sizes,
    as_pair,
    as_windows,
    read_buffers,
)
from swinv2.bridges.verification import Report, check_read_back, compare_read_back, ignore
from swinv2.config import SwinV2Config, clamp_window
from swinv2.config_file import check_normalisation
from swinv2.encoder import SwinV2

CHECKPOINT_FILE = "checkpoint.pth"
CONFIG_FILE = "config.yaml"
README_FILE = "README.md"
_CHANNELS = 3  # predicted by the published decoder, whatever the channels of the input
_ENCODER = TensorLayout(rename=partial(rename_tensor, merge_shift=0), classifier="head.")
_SIMMIM = replace(
    _ENCODER, prefix="encoder.", mask="encoder.mask_token", decoder_channels=_CHANNELS
)


def reference_config(encoder: SwinV2) -> dict[str, Any]:
    """Return the arguments of the published `SwinTransformerV2` that computes the same.

    Raises:
        BridgeError: the published code cannot compute it; all reasons are listed.
    """
    config = encoder.config
    problems = _unsupported(config)
    if problems:
        raise BridgeError(
            "the reference code cannot compute the same as this encoder:\n  "
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
        "pretrained_window_sizes": pretrained_windows_argument(config),
    }


def to_reference(
    encoder: SwinV2,
    *,
    head: MaskedImageHead | None = None,
    classifier: ClassifierHead | None = None,
) -> dict[str, Tensor]:
    """Return the encoder's tensors under the published names, on the CPU.

    The names are those of `SimMIM` with a head, otherwise those of `SwinTransformerV2`.

    Raises:
        BridgeError: the published code cannot compute it, or a head does not fit the encoder.
    """
    reference_config(encoder)
    if head is not None and classifier is not None:
        raise BridgeError(
            "a checkpoint has either a decoder or a classifier: leave one of them out."
        )
    tensors = convert(encoder, _ENCODER.rename)
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
    classifier: ClassifierHead | None = None,
    preparation: Preparation = WHOLE_PICTURES,
    images: Tensor | None = None,
    report: Report = ignore,
) -> Path:
    """Write `encoder` as a folder for the published code, and read it back before it is kept.

    `checkpoint.pth` has the tensors, `config.yaml` the settings for `--cfg`, and `README.md` the
    lines that load it.

    Args:
        encoder: not changed; use `SwinV2.set_input` first to export it at another size.
        path: a new or empty folder, or an earlier export.
        mean: one value per channel, for images in [0, 1].
        std: one positive value per channel.
        head: mask token and decoder, for a SimMIM checkpoint.
        classifier: for a classification checkpoint.
        preparation: how pictures are prepared.
        images: normalised (batch, channels, height, width), to compare features on; by default a
            zone plate.
        report: called with a line on each comparison.

    Raises:
        BridgeError: the published code cannot compute it, a head does not fit, or the export
            read back differs.
        ValueError: `mean` or `std` does not fit the channels, or `path` holds other files.
    """
    check_normalisation(mean, std, encoder.config.in_channels)
    arguments = reference_config(encoder)
    tensors = to_reference(encoder, head=head, classifier=classifier)
    if classifier is not None:
        arguments["num_classes"] = len(classifier.bias)
    settings = _settings(arguments)
    if head is not None and head.norm_target is not None:
        settings["MODEL"]["SIMMIM"] = {"NORM_TARGET": {"ENABLE": head.norm_target}}
    content = {
        "model": tensors,
        "config": settings,
        CONFIG_KEY: asdict(encoder.config),
        "normalisation": {
            "mean": [float(value) for value in mean],
            "std": [float(value) for value in std],
        },
        "preparation": describe(encoder.config, preparation, mean, std),
    }
    with atomic_folder(path, may_replace=is_reference_export) as folder:
        torch.save(content, folder / CHECKPOINT_FILE)
        # Every JSON text is YAML too.
        text = json.dumps(settings, indent=2) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        readme = _readme(arguments, masked=head is not None)
        readme += f"\n{sentences(encoder.config, preparation)}\n"
        (folder / README_FILE).write_text(readme, encoding="utf-8")
        back = import_reference(folder).encoder
        check_read_back(encoder, back)
        report(compare_read_back(encoder, back, images))
    return Path(path)


def import_reference(
    path: str | os.PathLike[str],
    options: ImportOptions = NO_OPTIONS,
) -> ImportedEncoder:
    """Read a checkpoint of the published code, or a folder written by `export_reference`.

    The architecture follows from the learned tensors. Image size, window size and pretraining
    windows come from position buffers or settings in the file, and must be given if it has neither.

    Args:
        path: a file (.pth or .safetensors) or a folder.
        options: sizes that the file lacks, and which of several models is read.

    Raises:
        BridgeError: it is another model, a tensor is missing, unexpected or of a wrong shape, a
            size is unknown or contradictory, or reading the file would run code.
    """
    place = Path(path)
    file = place / CHECKPOINT_FILE if place.is_dir() else place
    found = parse_published(options.read(file))
    return assemble(found, options)


def parse_published(checkpoint: CheckpointContents, library: str = "") -> ParsedCheckpoint:
    """Parse a checkpoint whose tensors have the published names.

    Args:
        checkpoint: the checkpoint.
        library: the library whose names were translated, for messages; empty for none.

    Raises:
        BridgeError: see `import_reference`.
    """
    source, extras = checkpoint.source, checkpoint.extras
    if library:
        source += f" ({library}; tensors named as in the published code)"
    named = {
        name.replace(".rpe_mlp.", ".cpb_mlp."): part for name, part in checkpoint.tensors.items()
    }
    learned, dropped = split_off_buffers(named)
    layout = _SIMMIM if any(name.startswith(_SIMMIM.prefix) for name in learned) else _ENCODER
    tensors = {name.removeprefix(layout.prefix): part for name, part in learned.items()}
    check_is_swinv2(tensors, source, "layers")
    _check_settings(extras, source)
    architecture = read_architecture(tensors, source)
    _check_is_not_timm(tensors, len(architecture["depths"]), source)
    settings, drop_path = _read_settings(extras)
    buffers = {name.removeprefix(layout.prefix): named[name] for name in dropped}
    norms = _node(extras, "normalisation")
    return ParsedCheckpoint(
        source=source,
        tensors=learned,
        dropped=dropped,
        layout=layout,
        architecture=architecture,
        sizes=[settings, read_buffers(buffers, architecture)],
        drop_path=drop_path,
        own_config=extras.get(CONFIG_KEY),
        norm_target=_read_norm_target(extras),
        num_classes=count_classes(learned, layout.classifier),
        mean=norms.get("mean"),
        std=norms.get("std"),
        preparation=extras.get("preparation"),
        notes=(*checkpoint.notes, *describe_beside(checkpoint.beside)),
    )


def is_reference_export(path: Path) -> bool:
    """Return whether `path` was written by `export_reference` and holds nothing else."""
    names = {CHECKPOINT_FILE, CONFIG_FILE, README_FILE}
    return path.is_dir() and {place.name for place in path.iterdir()} == names


def _unsupported(config: SwinV2Config) -> list[str]:
    """List features that the published code cannot compute, with remedies."""
    if config.window_size[0] != config.window_size[1]:
        return [f"window {config.window_size} is not square: load it with a square window"]
    problems = unsupported(config)
    if any(side % config.strides[-1] for side in config.image_size):
        problems.append(
            f"image_size {config.image_size} is not a multiple of {config.strides[-1]}, and that "
            "model cannot merge odd maps: load it with a multiple"
        )
        return problems
    for stage, resolution in enumerate(config.stage_resolutions):
        window, moves = clamp_window(min(resolution), config.window_size[0])
        shift = config.window_size[0] // 2 if moves else 0
        ours = window_grid(resolution, config.window_size, shifted=True)
        if (ours.window, ours.shift) != ((window, window), (shift, shift)):
            problems.append(
                f"stage {stage + 1} of {resolution[0]}x{resolution[1]} tokens: that model takes "
                "window and shift of both axes from the shorter one: load it with a square "
                "image_size"
            )
    return problems


def _settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments under the names and nesting of the published settings."""
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


def _check_is_not_timm(tensors: Mapping[str, Tensor], num_stages: int, source: str) -> None:
    merges = {
        stage
        for stage in range(num_stages)
        for name in tensors
        if name.startswith(f"layers.{stage}.downsample.")
    }
    if 0 not in merges and num_stages - 1 in merges:
        raise BridgeError(
            f"{source} has the layout of timm (no layers.0.downsample): "
            "import it with --format timm."
        )


def _check_settings(extras: Mapping[str, Any], source: str) -> None:
    model = _node(extras.get("config"), "MODEL")
    kind = model.get("TYPE", "swinv2")
    if kind != "swinv2":
        raise BridgeError(
            f"{source} has MODEL.TYPE {kind!r}: give a checkpoint of a Swin Transformer V2 "
            "('swinv2')."
        )


def _read_settings(extras: Mapping[str, Any]) -> tuple[Sizes, float]:
    """Return the sizes and the drop path rate in the settings of a checkpoint."""
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


def _read_norm_target(extras: Mapping[str, Any]) -> bool | None:
    """Return whether the settings say that SimMIM predicts normalised pixels; None if neither."""
    simmim = _node(_node(extras.get("config"), "MODEL"), "SIMMIM")
    enabled = _node(simmim, "NORM_TARGET").get("ENABLE")
    return enabled if isinstance(enabled, bool) else None


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
microsoft/Swin-Transformer, with the files of this folder copied there:

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
--pretrained` needs a classifier, `head`, in the file.)
"""
