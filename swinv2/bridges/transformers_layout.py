"""How transformers names a Swin Transformer V2: its tensors, and the fields of its config.json."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from swinv2.attention import window_grid
from swinv2.bridges.checkpoints import BridgeError
from swinv2.bridges.conversion import Layout
from swinv2.bridges.sizes import Sizes, as_pair, variant_of
from swinv2.config import Pair, SwinV2Config, clamp_window
from swinv2.encoder import SwinV2

ModelClass = Literal[
    "Swinv2Model",
    "Swinv2Backbone",
    "Swinv2ForMaskedImageModeling",
    "Swinv2ForImageClassification",
]
"""The classes that encoders are exchanged with."""

FOLDERS: dict[ModelClass, str] = {
    "Swinv2Model": ".",
    "Swinv2Backbone": "backbone",
    "Swinv2ForMaskedImageModeling": "masked-image-modeling",
    "Swinv2ForImageClassification": "image-classification",
}
"""Where an export has the folder of each class."""

WEIGHTS_FILE = "model.safetensors"


def transformers_config(encoder: SwinV2) -> dict[str, Any]:
    """Return the fields of the ``Swinv2Config`` that computes what ``encoder`` computes.

    It does so at the encoder's nominal image size: transformers fixes its windows by that size.

    Raises:
        BridgeError: transformers has no such model; all reasons are listed.
    """
    config = encoder.config
    problems = obstacles(config)
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


@dataclass(frozen=True, kw_only=True)
class TheirConfig:
    """What the ``config.json`` of a model of transformers tells."""

    model: ModelClass
    architecture: dict[str, Any]
    """Fields of `SwinV2Config`."""
    sizes: Sizes
    drop_path: float
    num_classes: int | None
    """Of the classifier; None where there is none."""
    classes: tuple[str, ...]
    """Their names, where they have names of their own."""


def read_their_config(
    content: Mapping[str, Any], names: Collection[str], source: str
) -> TheirConfig:
    """Read the fields of a ``config.json``; one that is missing has transformers' default.

    Args:
        content: of the file.
        names: of the tensors beside it, which tell the class where ``architectures`` does not.
        source: the file, for messages.

    Raises:
        BridgeError: it is of another class, or says something that this encoder cannot do; each
            such field is listed with its value and a remedy.
    """
    model = _model_class(content, names, source)
    told = _DEFAULTS | {name: value for name, value in content.items() if value is not None}
    try:
        problems = _inexpressible(told, model)
        if problems:
            listed = "\n  ".join(problems)
            raise BridgeError(f"it describes a model that this encoder cannot be:\n  {listed}")
        architecture = _architecture(told)
        num_classes, classes = _read_classes(content)
        return TheirConfig(
            model=model,
            architecture=architecture,
            sizes=_read_sizes(told, architecture),
            drop_path=float(told["drop_path_rate"]),
            num_classes=(num_classes or None) if model == "Swinv2ForImageClassification" else None,
            classes=classes,
        )
    except (TypeError, ValueError) as error:
        raise BridgeError(f"{source} cannot be used: {error}") from error


# Those of Swinv2Config, which need not be in the file.
_DEFAULTS: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 4,
    "num_channels": 3,
    "embed_dim": 96,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "window_size": 7,
    "pretrained_window_sizes": (0, 0, 0, 0),
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.1,
    "hidden_act": "gelu",
    "use_absolute_embeddings": False,
    "layer_norm_eps": 1e-5,
    "encoder_stride": 32,
}


def refuse_other_configs(content: Mapping[str, Any], source: str) -> None:
    """Raise where a ``config.json`` is not of a Swin Transformer V2 of transformers.

    Raises:
        BridgeError: it is not; the message says what it is of, and what reads that.
    """
    kind = content.get("model_type")
    if kind == "swinv2":
        return
    if content.get("format") == "swinv2-encoder":
        raise BridgeError(f"{source} describes an encoder of this package: load_encoder reads it.")
    if str(content.get("architecture", "")).startswith("swinv2_"):
        raise BridgeError(f"{source} describes a model of timm: import it with --format timm.")
    names = {"swin": " (a Swin Transformer V1)", None: ": it is no config.json of transformers"}
    raise BridgeError(
        f"{source} has model_type {kind!r}{names.get(kind, '')}, and a Swin Transformer V2 "
        "('swinv2') is expected: give a folder that save_pretrained of such a model wrote."
    )


def _model_class(content: Mapping[str, Any], names: Collection[str], source: str) -> ModelClass:
    named = content.get("architectures")
    for model in get_args(ModelClass):
        if named == [model]:
            found: ModelClass = model
            return found
    if named:
        raise BridgeError(
            f"{source} has architectures {named!r}: give a folder of one of "
            f"{', '.join(get_args(ModelClass))}."
        )
    if any(name.startswith("decoder.") for name in names):
        return "Swinv2ForMaskedImageModeling"
    headed = any(name.startswith("swinv2.") for name in names)
    return "Swinv2ForImageClassification" if headed else "Swinv2Model"


def _inexpressible(told: Mapping[str, Any], model: ModelClass) -> list[str]:
    """Say which fields ask for what this encoder has not."""
    problems = [
        f"{name} is {told[name]!r}, and this encoder has {ours!r}: {remedy}"
        for name, ours, remedy in _FIXED
        if told[name] != ours
    ]
    patch = as_pair(told["patch_size"])
    if patch[0] != patch[1]:
        problems.append(f"patch_size is {told['patch_size']!r}, and patches here are square: {_NO}")
    windows = told["pretrained_window_sizes"]
    if any(1 in as_pair(window) for window in windows):
        problems.append(
            f"pretrained_window_sizes is {windows!r}, and transformers divides by one less: "
            "write 2 for 1, which has the same meaning here"
        )
    stride = patch[0] * 2 ** (len(told["depths"]) - 1)
    if model == "Swinv2ForMaskedImageModeling" and told["encoder_stride"] != stride:
        problems.append(
            f"encoder_stride is {told['encoder_stride']!r}, and this encoder has {stride} "
            "(patch_size doubled at each merging): keep its encoder alone, as a Swinv2Model"
        )
    return problems


_NO = "its features cannot be had from another, so choose another checkpoint"
_DROPOUT = "write 0.0, which changes no feature in evaluation; drop_path_rate is kept"
_FIXED: tuple[tuple[str, Any, str], ...] = (
    ("hidden_act", "gelu", _NO),
    ("use_absolute_embeddings", False, _NO),
    ("qkv_bias", True, "add query and value biases of zeros to its tensors and write true"),
    ("layer_norm_eps", 1e-5, _NO),
    ("hidden_dropout_prob", 0.0, _DROPOUT),
    ("attention_probs_dropout_prob", 0.0, _DROPOUT),
)


def _architecture(told: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {
        "embed_dim": told["embed_dim"],
        "depths": tuple(told["depths"]),
        "num_heads": tuple(told["num_heads"]),
        "extra_norm_every": 0,
    }
    return {
        **sizes,
        "variant": variant_of(sizes),
        "in_channels": told["num_channels"],
        "patch_size": as_pair(told["patch_size"])[0],
        "mlp_ratio": float(told["mlp_ratio"]),
    }


def _read_sizes(told: Mapping[str, Any], architecture: Mapping[str, Any]) -> Sizes:
    image_size, window_size = as_pair(told["image_size"]), as_pair(told["window_size"])
    windows = tuple(as_pair(window) for window in told["pretrained_window_sizes"])
    stages = len(architecture["depths"])
    if len(windows) < stages:
        raise ValueError(f"pretrained_window_sizes names {len(windows)} of {stages} stages")
    # Theirs reads no further, and takes zeros for the present window of that stage.
    windows = windows[:stages]
    present = SwinV2Config(**architecture, image_size=image_size, window_size=window_size)
    resolved = tuple(
        now if pair == (0, 0) else pair
        for pair, now in zip(windows, present.stage_windows, strict=True)
    )
    return Sizes(
        origin="its config.json",
        image_size=image_size,
        window_size=window_size,
        pretrained_window_sizes=resolved if any(map(any, windows)) else "same",
    )


def _read_classes(content: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Return the number of classes and their names, none where they are LABEL_0, LABEL_1, ..."""
    labels = content.get("id2label")
    if not isinstance(labels, Mapping):
        return int(content.get("num_labels", 2)), ()
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    unnamed = names == tuple(f"LABEL_{number}" for number in range(len(names)))
    return len(names), () if unnamed else names


def obstacles(config: SwinV2Config) -> list[str]:
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


def layout_of(model: ModelClass) -> Layout:
    """Return where the tensors of a model class stand."""
    headed = model in ("Swinv2ForMaskedImageModeling", "Swinv2ForImageClassification")
    return Layout(
        split=split,
        classifier="classifier.",
        prefix="swinv2." if headed else "",
        mask="swinv2.embeddings.mask_token" if model == "Swinv2ForMaskedImageModeling" else None,
    )


def split(name: str, tensor: Tensor) -> dict[str, Tensor]:
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
