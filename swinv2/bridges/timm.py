"""timm's `swinv2_*` models: written as `timm.create_model` loads them, and read.

In timm a stage starts with patch merging, and the classifier is `head.fc`. Exporting and importing
do not need timm; if it can be imported, its features are compared before an export is kept.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from swinv2.atomic import atomic_folder
from swinv2.bridges.checkpoints import (
    BridgeError,
    ClassifierHead,
    ImportedEncoder,
    read_json,
)
from swinv2.bridges.conversion import (
    CONFIG_KEY,
    ParsedCheckpoint,
    TensorLayout,
    assemble,
    convert,
    count_classes,
    describe_beside,
    fresh_norm,
)
from swinv2.bridges.importing.options import NO_OPTIONS, ImportOptions
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
    missing_sizes,
    read_buffers,
)
from swinv2.bridges.verification import (
    Report,
    check_read_back,
    check_timm_shapes,
    compare_read_back,
    compare_timm,
    find_timm,
    ignore,
)
from swinv2.config import SwinV2Config
from swinv2.config_file import check_normalisation
from swinv2.encoder import SwinV2

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
README_FILE = "README.md"
_PICKLE_FILE = "pytorch_model.bin"
_NAME = re.compile(r"swinv2_(\w+?)_window(\d+)(?:to(\d+))?_(\d+)(?:to(\d+))?(?=\.|$)")
_LAYOUT = TensorLayout(rename=partial(rename_tensor, merge_shift=1), classifier="head.fc.")
_FLAT = re.compile(r"^layers_(?=\d+\.)")
"""Stages in a model of `features_only`, which flattens sequences."""


def _model_name(config: SwinV2Config, arguments: Mapping[str, Any]) -> str:
    """Return timm's model name for these sizes, or for the same variant at other sizes."""
    sizes = (arguments["img_size"], arguments["window_size"])
    windows = config.pretrained_window_sizes or config.stage_windows
    if config.variant in ("tiny", "small") or config.variant is None:
        size = "window16_256" if sizes == (256, 16) else "window8_256"
        return f"swinv2_{config.variant or 'tiny'}_{size}"
    transferred = windows == ((12, 12), (12, 12), (12, 12), (6, 6))
    if transferred and sizes == (256, 16):
        size = "window12to16_192to256"
    elif transferred and sizes == (384, 24):
        size = "window12to24_192to384"
    elif config.variant == "base" and sizes in ((256, 8), (256, 16)):
        size = f"window{sizes[1]}_256"
    else:
        size = "window12_192"
    return f"swinv2_{config.variant}_{size}"


def _named_sizes(origin: str, name: object, num_stages: int) -> Sizes:
    """Return the sizes in a name such as swinv2_base_window12to16_192to256."""
    if not isinstance(name, str):
        return Sizes(origin=origin)
    parts = _NAME.match(name)
    if parts is None:
        raise BridgeError(
            f"{name!r} is not a swinv2 model of timm: give a name such as "
            "swinv2_tiny_window8_256 or swinv2_base_window12to16_192to256."
        )
    _, window, to_window, size, to_size = parts.groups()
    windows: Any = "same"
    if to_window is not None:
        tokens = [int(size) // (4 * 2**stage) for stage in range(num_stages)]
        windows = tuple(as_pair(min(int(window), side)) for side in tokens)
    return Sizes(
        origin=origin,
        image_size=as_pair(int(to_size or size)),
        window_size=as_pair(int(to_window or window)),
        pretrained_window_sizes=windows,
    )


def _read_arguments(content: Mapping[str, Any]) -> tuple[Sizes, float]:
    """Return the sizes and the drop path rate in a `config.json`."""
    origin = "its config.json"
    arguments = content.get("model_args") or {}
    image, window = arguments.get("img_size"), arguments.get("window_size")
    windows = arguments.get("pretrained_window_sizes")
    if isinstance(window, list | tuple) and window and isinstance(window[0], list | tuple):
        window = max(window, key=max)
    return Sizes(
        origin=origin,
        image_size=None if image is None else as_pair(image),
        window_size=None if window is None else as_pair(window),
        pretrained_window_sizes=as_windows(windows),
    ), float(arguments.get("drop_path_rate", 0.0))


def timm_arguments(encoder: SwinV2) -> tuple[str, dict[str, Any]]:
    """Return the name and arguments for `timm.create_model` of the same model.

    Raises:
        BridgeError: timm cannot compute it; all reasons are listed.
    """
    config = encoder.config
    problems = unsupported(config)
    if config.window_size[0] != config.window_size[1] and len(config.depths) == 2:
        problems.append(
            f"window {config.window_size} is not square, and with two stages timm takes two "
            "numbers as a window per stage: load it with a square window"
        )
    if problems:
        raise BridgeError(
            "timm's swinv2 cannot compute the same as this encoder:\n  " + "\n  ".join(problems)
        )
    height, width = config.image_size
    rows, columns = config.window_size
    arguments: dict[str, Any] = {
        "img_size": height if height == width else [height, width],
        "window_size": rows if rows == columns else [rows, columns],
        "pretrained_window_sizes": pretrained_windows_argument(config),
        "drop_path_rate": config.drop_path,
    }
    if config.variant is None:
        arguments |= {
            "embed_dim": config.embed_dim,
            "depths": list(config.depths),
            "num_heads": list(config.num_heads),
        }
    usual = {"patch_size": 4, "in_chans": 3, "mlp_ratio": 4}
    own = (config.patch_size, config.in_channels, config.mlp_ratio)
    named = zip(usual.items(), own, strict=True)
    arguments |= {name: value for (name, theirs), value in named if value != theirs}
    return _model_name(config, arguments), arguments


def to_timm(encoder: SwinV2, *, classifier: ClassifierHead | None = None) -> dict[str, Tensor]:
    """Return the encoder's tensors under the names of timm's `swinv2_*`, on the CPU.

    Raises:
        BridgeError: timm cannot compute it, or the classifier does not fit the encoder.
    """
    timm_arguments(encoder)
    tensors = convert(encoder, _LAYOUT.rename)
    if classifier is None:
        return tensors
    features = encoder.num_features
    if (
        classifier.weight.shape != (len(classifier.bias), features)
        or classifier.bias.ndim != 1
        or not len(classifier.bias)
    ):
        raise BridgeError(
            f"the classifier is {tuple(classifier.weight.shape)} with a bias of "
            f"{tuple(classifier.bias.shape)}, not (classes, {features}) and (classes,): give a "
            "classifier trained on this encoder."
        )
    return tensors | {
        f"{_LAYOUT.classifier}weight": classifier.weight.detach().cpu().contiguous(),
        f"{_LAYOUT.classifier}bias": classifier.bias.detach().cpu().contiguous(),
    }


def export_timm(
    encoder: SwinV2,
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    classifier: ClassifierHead | None = None,
    preparation: Preparation = WHOLE_PICTURES,
    images: Tensor | None = None,
    report: Report = ignore,
) -> Path:
    """Write `encoder` as a folder for `timm.create_model`, and read it back before it is kept.

    `model.safetensors` loads strictly by `checkpoint_path`, the folder by `local-dir:`;
    `README.md` has the lines.

    Args:
        encoder: not changed; use `SwinV2.set_input` first to export it at another size.
        path: a new or empty folder, or an earlier export.
        mean: one value per channel, for images in [0, 1].
        std: one positive value per channel.
        classifier: a linear head on average-pooled features.
        preparation: how pictures are prepared.
        images: normalised (batch, channels, height, width), to compare features on; by default a
            zone plate.
        report: called with a line on each comparison.

    Raises:
        BridgeError: timm cannot compute it, the installed timm computes something else, or the
            classifier does not fit.
        ValueError: `mean` or `std` does not fit the channels, or `path` holds other files.
    """
    check_normalisation(mean, std, encoder.config.in_channels)
    name, arguments = timm_arguments(encoder)
    tensors = to_timm(encoder, classifier=classifier)
    classes = 0 if classifier is None else len(classifier.bias)
    content = {
        "architecture": name,
        "num_classes": classes,
        "num_features": encoder.num_features,
        "global_pool": "avg",
        "model_args": arguments,
        "pretrained_cfg": _pretrained_cfg(encoder.config, classes, mean, std, preparation.crop_pct),
        "preparation": describe(encoder.config, preparation, mean, std),
        CONFIG_KEY: asdict(encoder.config),
    }
    with atomic_folder(path, may_replace=is_timm_export) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(content, indent=2) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        prepared = sentences(encoder.config, preparation)
        text = _readme(encoder.config, name, arguments, classes, prepared)
        (folder / README_FILE).write_text(text, encoding="utf-8")
        back = import_timm(folder).encoder
        check_read_back(encoder, back)
        timm, reason = find_timm()
        if timm is None:
            report(f"not compared in timm: {reason}")
            report(compare_read_back(encoder, back, images))
        else:
            check_timm_shapes(timm, name, arguments, classes, tensors)
            compare_timm(timm, folder, encoder, classifier=classifier, images=images, report=report)
    return Path(path)


def _pretrained_cfg(
    config: SwinV2Config,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    crop_pct: float,
) -> dict[str, Any]:
    return {
        "num_classes": classes,
        "input_size": [config.in_channels, *config.image_size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": crop_pct,
        "crop_mode": "center",
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
    }


def import_timm(
    path: str | os.PathLike[str],
    options: ImportOptions = NO_OPTIONS,
) -> ImportedEncoder:
    """Read the weights of a `swinv2_*` model of timm, or of its `features_only`.

    The architecture follows from the learned tensors. Image size, window size and pretraining
    windows come from `config.json` next to the weights, from the name of the model, or from the
    position buffers of old files, and must be given if none of these has them. A model of
    `features_only` has no final norm; ours then starts with ones and zeros.

    Args:
        path: a folder as on the model hub (config.json and model.safetensors or pytorch_model.bin),
            or a file (.safetensors, .pth, .bin).
        options: sizes that the file lacks, and which of several models is read.

    Raises:
        BridgeError: it is another model, a tensor is missing, unexpected or of a wrong shape, a
            size is unknown or contradictory, or reading the file would run code.
    """
    found = _parse(Path(path), options)
    return assemble(found, options)


def _parse(path: Path, options: ImportOptions) -> ParsedCheckpoint:
    """Parse a file or folder."""
    folder = path if path.is_dir() else None
    content = {} if folder is None else _read_config(folder / CONFIG_FILE)
    file = path if folder is None else folder / WEIGHTS_FILE
    if folder is not None and not file.is_file() and (folder / _PICKLE_FILE).is_file():
        file = folder / _PICKLE_FILE
    checkpoint = options.read(file)
    source = checkpoint.source
    named_tensors = {_FLAT.sub("layers.", name): one for name, one in checkpoint.tensors.items()}
    tensors, dropped = split_off_buffers(named_tensors)
    check_is_swinv2(tensors, source, "layers")
    _check_is_not_reference(tensors, source)
    fields = read_architecture(tensors, source)
    stages = len(fields["depths"])
    arguments, drop_path = _read_arguments(content)
    named = _named_sizes("its model's name", content.get("architecture"), stages)
    described = content.get("pretrained_cfg", content)
    return ParsedCheckpoint(
        source=source,
        tensors=tensors,
        dropped=dropped,
        layout=_LAYOUT,
        architecture=fields,
        sizes=[
            arguments,
            _named_sizes("the given name", options.architecture, stages),
            missing_sizes([arguments], named),
            read_buffers({key: named_tensors[key] for key in dropped}, fields),
        ],
        drop_path=drop_path,
        own_config=content.get(CONFIG_KEY),
        num_classes=count_classes(tensors, _LAYOUT.classifier),
        mean=described.get("mean"),
        std=described.get("std"),
        preparation=content.get("preparation"),
        fresh=fresh_norm(fields) if _has_only_features(tensors) else None,
        notes=(*checkpoint.notes, *describe_beside(checkpoint.beside)),
    )


def _has_only_features(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether they are of a `features_only`, which has neither final norm nor head."""
    return not any(name.startswith(("norm.", "head.")) for name in tensors)


def _check_is_not_reference(tensors: Mapping[str, Tensor], source: str) -> None:
    if "layers.0.downsample.reduction.weight" in tensors or "head.weight" in tensors:
        raise BridgeError(
            f"{source} has the layout of the published code (it has "
            f"{'head' if 'head.weight' in tensors else 'layers.0.downsample'}): "
            "import it with --format reference."
        )


def is_timm_export(path: Path) -> bool:
    """Return whether `path` was written by `export_timm` and holds nothing else."""
    names = {CONFIG_FILE, WEIGHTS_FILE, README_FILE}
    if not path.is_dir() or {place.name for place in path.iterdir()} != names:
        return False
    try:
        content = _read_config(path / CONFIG_FILE)
    except BridgeError:
        return False
    return str(content.get("architecture", "")).startswith("swinv2_")


def _read_config(file: Path) -> dict[str, Any]:
    return read_json(file, "export it again") if file.is_file() else {}


def _readme(
    config: SwinV2Config, name: str, arguments: Mapping[str, Any], classes: int, prepared: str
) -> str:
    features = config.num_features
    strides = " and ".join(", ".join(map(str, config.strides)).rsplit(", ", 1))
    listed = "".join(f"    {key}={value!r},\n" for key, value in arguments.items())
    return f"""# Swin Transformer V2 for timm

In this folder (timm 1.0):

```python
import timm

model = timm.create_model(
    "{name}",
    checkpoint_path="model.safetensors",
    num_classes={classes},
{listed})
```

`model.forward_features(images)` returns (batch, rows, columns, channels). `config.json` has the
mean and std of its images, and in `pretrained_cfg` what `timm.data.create_transform` needs.

From elsewhere `timm.create_model("local-dir:FOLDER", pretrained=True)` loads the folder. With
further arguments it gives features:

- `num_classes=0`: `model(images)` is the average of the last map, (batch, {features});
- `features_only=True`: `model(images)` is a list of maps, (batch, rows, columns, channels), at
  strides {strides}; `out_indices=(1, 3)` chooses some. The last has no norm, unlike
  `forward_features`.

{prepared} timm resizes before it crops, so its pixels are shifted
by less than one; `preparation` in `config.json` has the exact steps.
"""
