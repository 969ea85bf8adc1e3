"""An encoder as the folders that Hugging Face transformers loads.

One file cannot be loaded by three classes without a missing or an unexpected key, so an export has
three folders: the encoder (``Swinv2Model``), ``backbone`` (``Swinv2Backbone``, which has no final
norm) and, with the decoder, ``masked-image-modeling`` (``Swinv2ForMaskedImageModeling``).
Writing them needs no transformers; where it is installed, it has to agree before they are kept.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from swinv2.atomic import atomic_folder
from swinv2.attention import window_grid
from swinv2.config import Pair, SwinV2Config, clamp_window
from swinv2.encoder import SwinV2
from swinv2.encoder_file import check_normalisation
from swinv2.weights import write_tensors

BACKBONE_FOLDER = "backbone"
MASKED_IMAGE_FOLDER = "masked-image-modeling"
_CONFIG_FILE = "config.json"
_WEIGHTS_FILE = "model.safetensors"
_PROCESSOR_FILE = "preprocessor_config.json"
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as the file stores it


class BridgeError(ValueError):
    """An encoder that the other format cannot express as it is."""


@dataclass(frozen=True, kw_only=True)
class MaskedImageHead:
    """The tensors that SimMIM adds to an encoder."""

    mask_token: Tensor
    """What stands for a hidden token, ``embed_dim`` values in any shape."""
    weight: Tensor
    """The decoder's 1x1 convolution (stride² · in_channels, num_features, 1, 1)."""
    bias: Tensor
    """Its bias (stride² · in_channels,)."""


def transformers_config(encoder: SwinV2) -> dict[str, Any]:
    """Return the fields of the ``Swinv2Config`` that computes what ``encoder`` computes.

    It does so at the encoder's nominal image size: transformers fixes its windows by that size.

    Raises:
        BridgeError: transformers has no such model; all reasons are listed.
    """
    config = encoder.config
    problems = _obstacles(config)
    if problems:
        raise BridgeError(
            "transformers' Swinv2 cannot compute what this encoder computes:\n  "
            + "\n  ".join(problems)
        )
    height, width = config.image_size
    return {
        "model_type": "swinv2",
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "embed_dim": config.embed_dim,
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "window_size": config.window_size[0],
        "pretrained_window_sizes": _their_pretraining_windows(config),
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": config.drop_path,
        "hidden_act": "gelu",
        "use_absolute_embeddings": False,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "encoder_stride": encoder.strides[-1],
    }


def to_transformers(encoder: SwinV2) -> dict[str, Tensor]:
    """Return the encoder's tensors under the names of ``Swinv2Model``, on the CPU.

    Raises:
        BridgeError: transformers has no such model.
    """
    transformers_config(encoder)
    converted: dict[str, Tensor] = {}
    for name, tensor in encoder.state_dict().items():
        for theirs, part in _rename(name, tensor.detach()).items():
            converted[theirs] = part.to("cpu", copy=True).contiguous()
    return converted


def to_transformers_masked(encoder: SwinV2, head: MaskedImageHead) -> dict[str, Tensor]:
    """Return all tensors under the names of ``Swinv2ForMaskedImageModeling``, on the CPU.

    Raises:
        BridgeError: transformers has no such model, or the head is not one of this encoder.
    """
    height, width = encoder.config.image_size
    stride = encoder.strides[-1]
    if height != width or height % stride:
        raise BridgeError(
            "transformers' Swinv2ForMaskedImageModeling decodes square images of a multiple of "
            f"{stride} pixels, not {height}x{width}: set another image_size, or leave the head out."
        )
    channels = stride * stride * encoder.config.in_channels
    shapes = {
        "mask_token": (head.mask_token.numel(), encoder.config.embed_dim),
        "weight": (tuple(head.weight.shape), (channels, encoder.num_features, 1, 1)),
        "bias": (tuple(head.bias.shape), (channels,)),
    }
    wrong = [f"{name} is {is_}, not {due}" for name, (is_, due) in shapes.items() if is_ != due]
    if wrong:
        raise BridgeError(f"the head does not fit the encoder: {'; '.join(wrong)}.")
    return {
        **{f"swinv2.{name}": tensor for name, tensor in to_transformers(encoder).items()},
        "swinv2.embeddings.mask_token": head.mask_token.detach().cpu().reshape(1, 1, -1),
        "decoder.0.weight": head.weight.detach().cpu().contiguous(),
        "decoder.0.bias": head.bias.detach().cpu().contiguous(),
    }


def export_transformers(
    encoder: SwinV2,
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    head: MaskedImageHead | None = None,
) -> Path:
    """Write ``encoder`` as folders that transformers loads with no missing and no unexpected key.

    ``path`` is for ``Swinv2Model`` (and ``AutoModel``), ``path/backbone`` for ``Swinv2Backbone``
    and, with ``head``, ``path/masked-image-modeling`` for ``Swinv2ForMaskedImageModeling``. For
    images of 1 or 3 channels ``path`` also describes their preparation (``ViTImageProcessor``).

    Args:
        encoder: left as it is; use `SwinV2.set_input` first to export it at another size.
        path: a new or empty folder, or an earlier export.
        mean: one value a channel, for images in [0, 1].
        std: one positive value a channel.
        head: mask token and decoder.

    Raises:
        BridgeError: transformers has no such model.
        ValueError: ``mean`` or ``std`` does not fit the channels, or ``path`` is occupied.
    """
    check_normalisation(mean, std, encoder.config.in_channels)
    config = transformers_config(encoder)
    tensors = to_transformers(encoder)
    backbone = {name: part for name, part in tensors.items() if not name.startswith("layernorm.")}
    stages = [f"stage{index + 1}" for index in range(len(encoder.config.depths))]
    masked = None if head is None else to_transformers_masked(encoder, head)
    with atomic_folder(path, may_replace=is_transformers_export) as folder:
        _write_model(folder, "Swinv2Model", config, tensors)
        _write_processor(folder, encoder.config, mean, std)
        _write_model(
            folder / BACKBONE_FOLDER,
            "Swinv2Backbone",
            {**config, "out_features": stages},
            backbone,
        )
        if masked is not None:
            _write_model(
                folder / MASKED_IMAGE_FOLDER, "Swinv2ForMaskedImageModeling", config, masked
            )
        if find_spec("transformers") is not None:
            check_transformers_export(folder)
    return Path(path)


def check_transformers_export(path: str | os.PathLike[str]) -> None:
    """Hold every folder of an export to the model transformers builds from its ``config.json``.

    transformers must be installed. No weights are read, so this is cheap for the largest variants.

    Raises:
        BridgeError: a folder lacks a tensor, has one too many or one of another shape.
    """
    from transformers import (  # noqa: PLC0415 - an optional part
        Swinv2Backbone,
        Swinv2Config,
        Swinv2ForMaskedImageModeling,
        Swinv2Model,
    )

    root = Path(path)
    classes = {
        root: Swinv2Model,
        root / BACKBONE_FOLDER: Swinv2Backbone,
        root / MASKED_IMAGE_FOLDER: Swinv2ForMaskedImageModeling,
    }
    for folder, model in classes.items():
        if not folder.is_dir():
            continue
        with torch.device("meta"):
            expected = model(Swinv2Config.from_pretrained(folder)).state_dict()
        expected_shapes = {name: list(tensor.shape) for name, tensor in expected.items()}
        with safe_open(folder / _WEIGHTS_FILE, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        different = sorted(
            name
            for name in shapes.keys() | expected_shapes.keys()
            if shapes.get(name) != expected_shapes.get(name)
        )
        if different:
            raise BridgeError(
                f"{model.__name__} of the installed transformers has other tensors than those "
                f"written for it ({', '.join(different)}): install transformers 5."
            )


def is_transformers_export(path: Path) -> bool:
    """Tell whether ``path`` is what `export_transformers` wrote, and holds nothing else."""
    known = {_CONFIG_FILE, _WEIGHTS_FILE, _PROCESSOR_FILE, BACKBONE_FOLDER, MASKED_IMAGE_FOLDER}
    required = {_CONFIG_FILE, _WEIGHTS_FILE, BACKBONE_FOLDER}
    names = {place.name for place in path.iterdir()} if path.is_dir() else set()
    if not required <= names <= known:
        return False
    try:
        content = json.loads((path / _CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("model_type") == "swinv2"


def _obstacles(config: SwinV2Config) -> list[str]:
    """Say what of ``config`` transformers cannot express, each with its remedy if there is one."""
    problems = []
    if 0 < config.extra_norm_every <= max(config.depths):
        problems.append(
            f"it has a norm after every {config.extra_norm_every} blocks, and theirs has none: "
            "use the native format"
        )
    if config.window_size[0] != config.window_size[1]:
        problems.append(f"window {config.window_size} is not square: load it with a square window")
        return problems
    for stage, resolution in enumerate(config.stage_resolutions):
        ours = window_grid(resolution, config.window_size, shifted=True)
        rows, columns = ours.window
        place = (
            f"stage {stage + 1} of {resolution[0]}x{resolution[1]} tokens, window {rows}x{columns}"
        )
        if (ours.window, ours.shift) != _their_window(config, stage):
            problems.append(
                f"{place}: theirs takes window and shift from the rows, counted before padding: "
                "load it with a square image_size that its strides divide"
            )
        elif any(ours.padding):
            problems.append(
                f"{place}: theirs attends to the padding that fills the last windows: "
                "load it with an image_size or window_size whose windows divide the stage"
            )
    for stage, reference in enumerate(config.pretrained_window_sizes or ()):
        if reference[0] != reference[1]:
            problems.append(f"stage {stage + 1}: pretraining window {reference} is not square")
    return problems


def _their_window(config: SwinV2Config, stage: int) -> tuple[Pair, Pair]:
    """Return (window, shift) as ``Swinv2Layer`` fits them, from the height for both axes."""
    rows = config.image_size[0] // config.patch_size // 2**stage
    window, moves = clamp_window(rows, config.window_size[0])
    shift = config.window_size[0] // 2 if moves else 0
    return (window, window), (shift, shift)


def _their_pretraining_windows(config: SwinV2Config) -> list[int]:
    """Return a window for each stage, 0 where offsets are relative to the present window.

    A pretraining window of one token has no offsets, and theirs would divide by zero; a window of
    two divides by the same 1 as ours.
    """
    if config.pretrained_window_sizes is None:
        return [0] * len(config.depths)
    return [max(rows, 2) for rows, _ in config.pretrained_window_sizes]


def _rename(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the tensor, or the parts of it, under the names of ``Swinv2Model``."""
    module, _, leaf = name.rpartition(".")
    match module.split("."):
        case ["patch_embed", "projection"]:
            return {f"embeddings.patch_embeddings.projection.{leaf}": tensor}
        case ["patch_embed", "norm"]:
            return {f"embeddings.norm.{leaf}": tensor}
        case ["merges", stage, part]:
            return {f"encoder.layers.{stage}.downsample.{part}.{leaf}": tensor}
        case ["norm"]:
            return {f"layernorm.{leaf}": tensor}
        case ["stages", stage, "blocks", block, *part]:
            prefix = f"encoder.layers.{stage}.blocks.{block}"
            parts = _rename_in_block(".".join([*part, leaf]), tensor)
            return {f"{prefix}.{theirs}": tensor for theirs, tensor in parts.items()}
    raise AssertionError(f"no name in transformers for {name}")


def _rename_in_block(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name == "attention.qkv.weight":
        roles = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        return {f"attention.self.{role}.weight": part for role, part in roles}
    if name == "attention.logit_scale":
        return {"attention.self.logit_scale": tensor[:, None, None]}
    return {_BLOCK_NAMES[name]: tensor}


_BLOCK_NAMES = {
    "attention.query_bias": "attention.self.query.bias",
    "attention.value_bias": "attention.self.value.bias",
    "attention.position_bias.expand.weight": "attention.self.continuous_position_bias_mlp.0.weight",
    "attention.position_bias.expand.bias": "attention.self.continuous_position_bias_mlp.0.bias",
    "attention.position_bias.reduce.weight": "attention.self.continuous_position_bias_mlp.2.weight",
    "attention.projection.weight": "attention.output.dense.weight",
    "attention.projection.bias": "attention.output.dense.bias",
    "norm1.weight": "layernorm_before.weight",
    "norm1.bias": "layernorm_before.bias",
    "norm2.weight": "layernorm_after.weight",
    "norm2.bias": "layernorm_after.bias",
    "mlp.expand.weight": "intermediate.dense.weight",
    "mlp.expand.bias": "intermediate.dense.bias",
    "mlp.reduce.weight": "output.dense.weight",
    "mlp.reduce.bias": "output.dense.bias",
}


def _write_model(
    folder: Path, architecture: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    folder.mkdir(exist_ok=True)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    content = {"architectures": [architecture], **config}
    if len(dtypes) == 1:
        content["dtype"] = dtypes.pop()
    write_tensors(folder / _WEIGHTS_FILE, tensors)
    _write_json(folder / _CONFIG_FILE, content)


def _write_processor(
    folder: Path, config: SwinV2Config, mean: Sequence[float], std: Sequence[float]
) -> None:
    if config.in_channels not in (1, 3):
        return
    height, width = config.image_size
    content = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [float(value) for value in mean],
        "image_std": [float(value) for value in std],
    }
    _write_json(folder / _PROCESSOR_FILE, content)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
