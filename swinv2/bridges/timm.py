"""timm's ``swinv2_*`` models: written as ``timm.create_model`` loads them, and read.

timm ends nothing with merging: a stage starts with it. Its classifier is ``head.fc``. Writing and
reading need no timm; where it can be imported, it has to agree before an export is kept.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from swinv2.atomic import atomic_folder
from swinv2.bridges.checkpoints import read_checkpoint, read_json
from swinv2.bridges.contents import BridgeError, Classifier, Imported
from swinv2.bridges.layers import (
    layer_parts,
    obstacles,
    read_architecture,
    refuse_other_models,
    their_windows,
    without_buffers,
)
from swinv2.bridges.placement import (
    RECORD,
    Found,
    Layout,
    assemble,
    check_read_back,
    convert,
    count_classes,
)
from swinv2.bridges.sizes import (
    PretrainedWindows,
    given_sizes,
    read_buffers,
)
from swinv2.bridges.timm_names import model_name, named_sizes, only_missing, read_arguments
from swinv2.bridges.verification import (
    Report,
    compare,
    compare_read_back,
    ignore,
    plain_copy,
    zone_plate,
)
from swinv2.config import Pair, SwinV2Config
from swinv2.config_file import check_normalisation
from swinv2.encoder import SwinV2

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
README_FILE = "README.md"
_PICKLE_FILE = "pytorch_model.bin"
_LAYOUT = Layout(split=partial(layer_parts, merge_shift=1), classifier="head.fc.")


def timm_arguments(encoder: SwinV2) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments for ``timm.create_model`` of the model that is the same.

    Raises:
        BridgeError: timm has no such model; all reasons are listed.
    """
    config = encoder.config
    problems = obstacles(config)
    if config.window_size[0] != config.window_size[1] and len(config.depths) == 2:
        problems.append(
            f"window {config.window_size} is not square, and theirs takes two numbers for the "
            "windows of two stages: load it with a square window"
        )
    if problems:
        raise BridgeError(
            "timm's swinv2 cannot compute what this encoder computes:\n  " + "\n  ".join(problems)
        )
    height, width = config.image_size
    rows, columns = config.window_size
    arguments: dict[str, Any] = {
        "img_size": height if height == width else [height, width],
        "window_size": rows if rows == columns else [rows, columns],
        "pretrained_window_sizes": their_windows(config),
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
    return model_name(config, arguments), arguments


def to_timm(encoder: SwinV2, *, classifier: Classifier | None = None) -> dict[str, Tensor]:
    """Return the encoder's tensors under the names of timm's ``swinv2_*``, on the CPU.

    Raises:
        BridgeError: timm has no such model, or the classifier does not fit the encoder.
    """
    timm_arguments(encoder)
    tensors = convert(encoder, _LAYOUT.split)
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
            f"{tuple(classifier.bias.shape)}, not (classes, {features}) and (classes,)."
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
    classifier: Classifier | None = None,
    images: Tensor | None = None,
    report: Report = ignore,
) -> Path:
    """Write ``encoder`` as a folder for ``timm.create_model``, and read it back before it is kept.

    ``model.safetensors`` loads strictly by ``checkpoint_path``, the folder by ``local-dir:``;
    ``README.md`` has the lines.

    Args:
        encoder: left as it is; use `SwinV2.set_input` first to export it at another size.
        path: a new or empty folder, or an earlier export.
        mean: one value a channel, for images in [0, 1].
        std: one positive value a channel.
        classifier: a linear head on average-pooled features.
        images: normalised (batch, channels, height, width), to compare features on before the
            folder takes its place; by default a chart.
        report: is told how far they are apart.

    Raises:
        BridgeError: timm has no such model, the installed timm computes something else, or the
            classifier does not fit.
        ValueError: ``mean`` or ``std`` does not fit the channels, or ``path`` is occupied.
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
        "pretrained_cfg": _pretrained_cfg(encoder.config, classes, mean, std),
        RECORD: asdict(encoder.config),
    }
    with atomic_folder(path, may_replace=is_timm_export) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(content, indent=2) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        (folder / README_FILE).write_text(_readme(name, arguments, classes), encoding="utf-8")
        back = import_timm(folder).encoder
        check_read_back(encoder, back)
        timm, reason = find_timm()
        if timm is None:
            report(f"not compared in timm: {reason}")
            report(compare_read_back(encoder, back, images))
        else:
            _check_shapes(timm, name, arguments, classes, tensors)
            _compare(timm, folder, encoder, classifier=classifier, images=images, report=report)
    return Path(path)


def _pretrained_cfg(
    config: SwinV2Config, classes: int, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    return {
        "num_classes": classes,
        "input_size": [config.in_channels, *config.image_size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
    }


def _compare(
    timm: ModuleType,
    folder: Path,
    encoder: SwinV2,
    *,
    classifier: Classifier | None,
    images: Tensor | None,
    report: Report,
) -> None:
    """Compare what timm computes with the export, and report it."""
    images = zone_plate(encoder.config) if images is None else images
    peer: Any = load_in_timm(timm, folder)
    with torch.no_grad():
        features = plain_copy(encoder)(images)
        theirs = peer.forward_features(images)
        report(compare("timm's features to ours", features, theirs))
        if classifier is not None:
            logits = classifier.logits(features)
            report(compare("timm's logits to ours", logits, peer.forward_head(theirs)))


def import_timm(
    path: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    image_size: int | Pair | None = None,
    window_size: int | Pair | None = None,
    pretrained_window_sizes: PretrainedWindows = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Imported:
    """Read the weights of a ``swinv2_*`` model of timm.

    The learned tensors tell the architecture. Image size, window size and pretraining windows are
    taken from ``config.json`` beside the weights, from the name of the model, or from the position
    buffers that old files hold; what none of them tells has to be given.

    Args:
        path: a folder as on the model hub (config.json and model.safetensors or pytorch_model.bin),
            or a file (.safetensors, .pth, .bin).
        architecture: timm's name of the model, such as ``swinv2_base_window12to16_192to256``.
        image_size: (height, width) in pixels.
        window_size: (height, width) in tokens.
        pretrained_window_sizes: of each stage, in tokens; "same" where it was trained at these.
        mean: of each channel; by default what the folder says, or ImageNet's, as timm has it.
        std: of each channel, in the same way.

    Raises:
        BridgeError: it is of another model, a tensor is missing, unexpected or misshapen, a size is
            unknown or contradicts the file, or reading the file would run code.
    """
    found = _find(Path(path), architecture)
    given = given_sizes(image_size, window_size, pretrained_window_sizes)
    return assemble(found, given, mean=mean, std=std)


def _find(path: Path, name: str | None) -> Found:
    """Read a file or folder; `name` is what the caller calls the model."""
    folder = path if path.is_dir() else None
    content = {} if folder is None else _read_config(folder / CONFIG_FILE)
    file = path if folder is None else folder / WEIGHTS_FILE
    if folder is not None and not file.is_file() and (folder / _PICKLE_FILE).is_file():
        file = folder / _PICKLE_FILE
    # The order in which timm itself takes them.
    checkpoint = read_checkpoint(file, ("state_dict_ema", "model_ema", "state_dict", "model"))
    source = checkpoint.source
    tensors, dropped = without_buffers(checkpoint.tensors)
    refuse_other_models(tensors, source, "layers")
    _refuse_layout_of_reference(tensors, source)
    fields = read_architecture(tensors, source)
    stages = len(fields["depths"])
    told, drop_path = read_arguments(content)
    named = named_sizes("its model's name", content.get("architecture"), stages)
    described = content.get("pretrained_cfg", content)
    return Found(
        source=source,
        tensors=tensors,
        dropped=dropped,
        layout=_LAYOUT,
        architecture=fields,
        known=[
            told,
            named_sizes("the name you gave", name, stages),
            only_missing(told, named),
            read_buffers({key: checkpoint.tensors[key] for key in dropped}, fields),
        ],
        drop_path=drop_path,
        recorded=content.get(RECORD),
        num_classes=count_classes(tensors, _LAYOUT.classifier),
        mean=described.get("mean"),
        std=described.get("std"),
    )


def _refuse_layout_of_reference(tensors: Mapping[str, Tensor], source: str) -> None:
    if "layers.0.downsample.reduction.weight" in tensors or "head.weight" in tensors:
        raise BridgeError(
            f"{source} is laid out as the published code does it (it has "
            f"{'head' if 'head.weight' in tensors else 'layers.0.downsample'}): "
            "import it with --format reference."
        )


def find_timm() -> tuple[ModuleType | None, str]:
    """Return timm, or ``None`` and why it cannot be used."""
    if find_spec("timm") is None:
        return None, "timm is not installed (pip install timm)"
    try:
        import timm  # noqa: PLC0415 - an optional part
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision of another torch
        return None, f"timm cannot be imported ({error})"
    return timm, ""


def load_in_timm(timm: ModuleType, path: str | os.PathLike[str]) -> torch.nn.Module:
    """Build the model of an export in timm and load its weights strictly."""
    folder = Path(path)
    content = _read_config(folder / CONFIG_FILE)
    model: torch.nn.Module = timm.create_model(
        content["architecture"],
        num_classes=content["num_classes"],
        checkpoint_path=str(folder / WEIGHTS_FILE),
        **content["model_args"],
    )
    return model.eval()


def is_timm_export(path: Path) -> bool:
    """Tell whether ``path`` is what `export_timm` wrote, and holds nothing else."""
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


def _check_shapes(
    timm: ModuleType,
    name: str,
    arguments: Mapping[str, Any],
    classes: int,
    tensors: Mapping[str, Tensor],
) -> None:
    """Hold the tensors to the model that the installed timm builds; no weights are made for it."""
    with torch.device("meta"):
        expected = timm.create_model(name, num_classes=classes, **arguments).state_dict()
    different = sorted(
        key
        for key in expected.keys() | tensors.keys()
        if key not in expected or key not in tensors or expected[key].shape != tensors[key].shape
    )
    if different:
        raise BridgeError(
            f"{name} of the installed timm has other tensors than those written for it "
            f"({', '.join(different)}): install timm 1.0.20 or newer."
        )


def _readme(name: str, arguments: Mapping[str, Any], classes: int) -> str:
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

`model.forward_features(images)` gives (batch, rows, columns, channels). Elsewhere the folder is
`timm.create_model("local-dir:FOLDER", pretrained=True)`; `config.json` has the mean and std of its
images.
"""
