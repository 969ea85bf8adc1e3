"""Tensor names and `config.json` fields of a Swin Transformer V2 in transformers."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from swinv2.attention import window_grid
from swinv2.bridges.checkpoints import BridgeError
from swinv2.bridges.conversion import TensorLayout
from swinv2.bridges.sizes import Sizes, as_pair, variant_of
from swinv2.config import SwinV2Config, clamp_window
from swinv2.encoder import SwinV2
from swinv2.field_values import MOST_STAGES, Pair

ModelClass = Literal[
    "Swinv2Model",
    "Swinv2Backbone",
    "Swinv2ForMaskedImageModeling",
    "Swinv2ForImageClassification",
]
"""Classes that encoders are exported to and imported from."""

FOLDERS: dict[ModelClass, str] = {
    "Swinv2Model": ".",
    "Swinv2Backbone": "backbone",
    "Swinv2ForMaskedImageModeling": "masked-image-modeling",
    "Swinv2ForImageClassification": "image-classification",
}
"""Subfolder of an export for each class."""

WEIGHTS_FILE = "model.safetensors"


def transformers_config(encoder: SwinV2) -> dict[str, Any]:
    """Return the fields of the `Swinv2Config` that computes the same as `encoder`.

    They hold at the encoder's nominal image size, from which transformers fixes its windows.

    Raises:
        BridgeError: transformers cannot compute it; all reasons are listed.
    """
    config = encoder.config
    problems = unsupported(config)
    if problems:
        raise BridgeError(
            "transformers' Swinv2 cannot compute the same as this encoder:\n  "
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
        "pretrained_window_sizes": _pretrained_windows_argument(config),
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
class ParsedConfig:
    """Contents of the `config.json` of a model of transformers."""

    model: ModelClass
    architecture: dict[str, Any]
    """Fields of `SwinV2Config`."""
    sizes: Sizes
    drop_path: float
    num_classes: int | None
    """Number of classes of the classifier; None if there is none."""
    classes: tuple[str, ...]
    """Names of the classes, if they are not the default ones."""


def parse_config(content: Mapping[str, Any], names: Collection[str], source: str) -> ParsedConfig:
    """Parse a `config.json`; missing fields have transformers' defaults.

    Args:
        content: content of the file.
        names: tensor names, which determine the class if `architectures` is missing.
        source: the file, for messages.

    Raises:
        BridgeError: it is another class, or has fields that this encoder cannot express; each is
            listed with its value and a remedy.
    """
    model = _model_class(content, names, source)
    settings = _DEFAULTS | {name: value for name, value in content.items() if value is not None}
    try:
        problems = _unsupported_fields(settings, model)
        if problems:
            listed = "\n  ".join(problems)
            raise BridgeError(f"its model cannot be expressed by this encoder:\n  {listed}")
        architecture = _architecture(settings)
        num_classes, classes = _read_classes(content)
        return ParsedConfig(
            model=model,
            architecture=architecture,
            sizes=_read_sizes(settings, architecture),
            drop_path=float(settings["drop_path_rate"]),
            num_classes=(num_classes or None) if model == "Swinv2ForImageClassification" else None,
            classes=classes,
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise BridgeError(f"{source} cannot be used: {error}") from error


# Defaults of Swinv2Config.
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


def check_config_is_swinv2(content: Mapping[str, Any], source: str) -> None:
    """Check that a `config.json` is that of a Swin Transformer V2 of transformers.

    Raises:
        BridgeError: it is not; the message says what it is, and how to read that.
    """
    kind = content.get("model_type")
    if kind == "swinv2":
        return
    if content.get("format") == "swinv2-encoder":
        raise BridgeError(
            f"{source} describes an encoder of swinv2: load its directory with load_encoder."
        )
    if str(content.get("architecture", "")).startswith("swinv2_"):
        raise BridgeError(f"{source} describes a model of timm: import it with --format timm.")
    names = {
        "swin": " (a Swin Transformer V1)",
        None: ", so it is not a config.json of transformers",
    }
    raise BridgeError(
        f"{source} has model_type {kind!r}{names.get(kind, '')}, and a Swin Transformer V2 "
        "('swinv2') is expected: give a folder written by its save_pretrained."
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


def _unsupported_fields(settings: Mapping[str, Any], model: ModelClass) -> list[str]:
    """List the fields that this encoder cannot express, with remedies."""
    depths = settings["depths"]
    if len(depths) > MOST_STAGES:
        raise ValueError(f"depths lists {len(depths):,} stages; there are at most {MOST_STAGES}")
    problems = [
        f"{name} is {settings[name]!r}, and this encoder has {ours!r}: {remedy}"
        for name, ours, remedy in _FIXED
        if settings[name] != ours
    ]
    patch = as_pair(settings["patch_size"])
    if patch[0] != patch[1]:
        problems.append(
            f"patch_size is {settings['patch_size']!r}, and this encoder has square patches: {_NO}"
        )
    windows = settings["pretrained_window_sizes"]
    if any(1 in as_pair(window) for window in windows):
        problems.append(
            f"pretrained_window_sizes is {windows!r}, and transformers divides by the window minus "
            "1: write 2 instead of 1, which has the same meaning here"
        )
    stride = patch[0] * 2 ** (len(settings["depths"]) - 1)
    if model == "Swinv2ForMaskedImageModeling" and settings["encoder_stride"] != stride:
        problems.append(
            f"encoder_stride is {settings['encoder_stride']!r}, and this encoder has {stride} "
            "(patch_size doubled at each merging): save only its encoder, as a Swinv2Model"
        )
    return problems


_NO = "choose another checkpoint: no other value gives the same features"
_DROPOUT = "write 0.0, which changes no feature in evaluation; drop_path_rate is kept"
_FIXED: tuple[tuple[str, Any, str], ...] = (
    ("hidden_act", "gelu", _NO),
    ("use_absolute_embeddings", False, _NO),
    ("qkv_bias", True, "add query and value biases of zeros to its tensors and write true"),
    ("layer_norm_eps", 1e-5, _NO),
    ("hidden_dropout_prob", 0.0, _DROPOUT),
    ("attention_probs_dropout_prob", 0.0, _DROPOUT),
)


def _architecture(settings: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {
        "embed_dim": settings["embed_dim"],
        "depths": tuple(settings["depths"]),
        "num_heads": tuple(settings["num_heads"]),
        "extra_norm_every": 0,
    }
    return {
        **sizes,
        "variant": variant_of(sizes),
        "in_channels": settings["num_channels"],
        "patch_size": as_pair(settings["patch_size"])[0],
        "mlp_ratio": float(settings["mlp_ratio"]),
    }


def _read_sizes(settings: Mapping[str, Any], architecture: Mapping[str, Any]) -> Sizes:
    image_size, window_size = as_pair(settings["image_size"]), as_pair(settings["window_size"])
    windows = tuple(as_pair(window) for window in settings["pretrained_window_sizes"])
    stages = len(architecture["depths"])
    if len(windows) < stages:
        raise ValueError(f"pretrained_window_sizes has {len(windows)} of {stages} stages")
    # transformers ignores further entries; zeros mean the present window of the stage.
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
    """Return the number of classes and their names, none if they are LABEL_0, LABEL_1, ..."""
    labels = content.get("id2label")
    if not isinstance(labels, Mapping):
        return int(content.get("num_labels", 2)), ()
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    unnamed = names == tuple(f"LABEL_{number}" for number in range(len(names)))
    return len(names), () if unnamed else names


def unsupported(config: SwinV2Config) -> list[str]:
    """List features that transformers cannot express, with remedies."""
    problems = []
    if 0 < config.extra_norm_every <= max(config.depths):
        problems.append(
            f"it has a norm after every {config.extra_norm_every} blocks, which that model lacks: "
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
                f"{place}: that model takes window and shift from the rows, counted before "
                "padding: load it with a square image_size that is a multiple of the strides"
            )
        elif any(ours.padding):
            problems.append(
                f"{place}: that model attends to the padding that fills the last windows: "
                "load it with an image_size or window_size whose windows divide the stage"
            )
    for stage, reference in enumerate(config.pretrained_window_sizes or ()):
        if reference[0] != reference[1]:
            problems.append(f"stage {stage + 1}: pretraining window {reference} is not square")
    return problems


def _their_window(config: SwinV2Config, stage: int) -> tuple[Pair, Pair]:
    """Return (window, shift) as `Swinv2Layer` computes both, from the height only."""
    rows = config.image_size[0] // config.patch_size // 2**stage
    window, moves = clamp_window(rows, config.window_size[0])
    shift = config.window_size[0] // 2 if moves else 0
    return (window, window), (shift, shift)


def _pretrained_windows_argument(config: SwinV2Config) -> list[int]:
    """Return the `pretrained_window_sizes` argument: one per stage, 0 for the present window.

    A window of one token has no offsets, and transformers would divide by zero; a window of two
    divides by 1, as ours does.
    """
    if config.pretrained_window_sizes is None:
        return [0] * len(config.depths)
    return [max(rows, 2) for rows, _ in config.pretrained_window_sizes]


def layout_of(model: ModelClass) -> TensorLayout:
    """Return the tensor names of a model class."""
    headed = model in ("Swinv2ForMaskedImageModeling", "Swinv2ForImageClassification")
    return TensorLayout(
        rename=rename_tensor,
        classifier="classifier.",
        prefix="swinv2." if headed else "",
        mask="swinv2.embeddings.mask_token" if model == "Swinv2ForMaskedImageModeling" else None,
    )


def rename_tensor(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the tensor, or its parts, under the names of `Swinv2Model`."""
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
