"""Names of tensors that the reference code and timm share, and the architecture they imply.

Both call stages `layers`; the reference code merges patches at the end of a stage, timm at the
start of the next. The learned tensors imply every size but three: image size, window size and
pretraining windows. The position buffers of older files imply these too.
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from swinv2.attention import window_grid
from swinv2.bridges.checkpoints import BridgeError
from swinv2.bridges.sizes import variant_of
from swinv2.config import SwinV2Config

BUFFERS = ("relative_coords_table", "relative_position_index", "attn_mask")
"""Leaves of names of buffers, which both compute from sizes."""
POSITIONS = {"cls_token", "pos_embed", "absolute_pos_embed", "position_embeddings", "gamma_1"}
"""Leaves of names that position embeddings, or a ViT, have."""


def rename_tensor(name: str, tensor: Tensor, *, merge_shift: int) -> dict[str, Tensor]:
    """Return our tensor under its name in the reference code or timm.

    Args:
        name: ours; extra norms have no name there.
        tensor: on any device.
        merge_shift: 0 if a stage ends with merging, 1 if the next stage starts with it.
    """
    if name.endswith("logit_scale"):
        tensor = tensor[:, None, None]
    return {_layer_name(name, merge_shift): tensor}


def _layer_name(name: str, merge_shift: int) -> str:
    """Return the name of our tensor there."""
    module, _, leaf = name.rpartition(".")
    match module.split("."):
        case ["patch_embed", "projection"]:
            return f"patch_embed.proj.{leaf}"
        case ["patch_embed", "norm"] | ["norm"]:
            return name
        case ["merges", stage, part]:
            return f"layers.{int(stage) + merge_shift}.downsample.{part}.{leaf}"
        case ["stages", stage, "blocks", block, *part]:
            return f"layers.{stage}.blocks.{block}.{_BLOCK_NAMES['.'.join([*part, leaf])]}"
    raise AssertionError(f"no name for {name}")


_BLOCK_NAMES = {
    "attention.qkv.weight": "attn.qkv.weight",
    "attention.query_bias": "attn.q_bias",
    "attention.value_bias": "attn.v_bias",
    "attention.logit_scale": "attn.logit_scale",
    "attention.position_bias.expand.weight": "attn.cpb_mlp.0.weight",
    "attention.position_bias.expand.bias": "attn.cpb_mlp.0.bias",
    "attention.position_bias.reduce.weight": "attn.cpb_mlp.2.weight",
    "attention.projection.weight": "attn.proj.weight",
    "attention.projection.bias": "attn.proj.bias",
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.expand.weight": "mlp.fc1.weight",
    "mlp.expand.bias": "mlp.fc1.bias",
    "mlp.reduce.weight": "mlp.fc2.weight",
    "mlp.reduce.bias": "mlp.fc2.bias",
}


def split_off_buffers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the learned tensors, and the names of the buffers."""
    dropped = tuple(name for name in tensors if name.rpartition(".")[2] in BUFFERS)
    return {name: part for name, part in tensors.items() if name not in dropped}, dropped


def check_is_swinv2(
    tensors: Mapping[str, Tensor], source: str, naming: Literal["layers", "transformers"]
) -> None:
    """Check that names are those of a Swin Transformer V2 in the expected naming.

    Args:
        tensors: tensors by name.
        source: source of the tensors, for the message.
        naming: the expected one; `layers` is that of the published code and timm.

    Raises:
        BridgeError: they are those of another model or library; the message says of which.
    """
    found = _other_model(tensors) or _other_layout(tensors, naming)
    if found is not None:
        reason, remedy = found
        raise BridgeError(f"{source} holds {reason}: {remedy}.")


def _leaves(tensors: Mapping[str, Tensor]) -> set[str]:
    return {name.rpartition(".")[2] for name in tensors}


def _other_model(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Return what model tensors are of, if not of a Swin Transformer V2, and the remedy."""
    leaves = _leaves(tensors)
    if "logit_scale" not in leaves and "cls_token" in leaves:
        reason = "a ViT (it has a class token, and no logit_scale)"
    elif "relative_position_bias_table" in leaves:
        reason = "a Swin Transformer V1 (it has relative_position_bias_table)"
    elif "logit_scale" not in leaves and leaves & POSITIONS:
        reason = "a ViT (it has position tokens, and no logit_scale)"
    elif "logit_scale" not in leaves:
        reason = f"not a Swin Transformer V2 (no block has a logit_scale; {_some(tensors)})"
    elif any("meta_mlp" in name.split(".") for name in tensors):
        reason = "a swinv2_cr of timm (it has meta_mlp), another architecture"
    else:
        return None
    return reason, "give a Swin Transformer V2 of the published code, timm or transformers"


def _some(tensors: Mapping[str, Tensor]) -> str:
    return f"it begins with {', '.join(list(tensors)[:3])}"


def _other_layout(
    tensors: Mapping[str, Tensor], naming: Literal["layers", "transformers"]
) -> tuple[str, str] | None:
    """Return whose layout tensors have, if not the expected one, and the remedy."""
    leaves = _leaves(tensors)
    firsts = {name.partition(".")[0] for name in tensors}
    found = "transformers" if firsts & {"swinv2", "embeddings"} else "layers"
    remedy = "give a Swin Transformer V2 of the published code, timm or transformers"
    if any("w_msa" in name.split(".") for name in tensors):
        reason, remedy = (
            "a model of mmpretrain (it has w_msa)",
            "import it with --format mmpretrain",
        )
    elif "features" in firsts:
        reason = "a model of torchvision (its stages are features.*)"
        remedy = "import it with --format torchvision"
    elif "stages" in firsts:
        reason, remedy = "an encoder of swinv2", "load its directory with load_encoder"
    elif found != naming and found == "transformers":
        reason = "a model in the layout of transformers (it has embeddings)"
        remedy = "import its folder with --format transformers"
    elif found != naming:
        reason = "a model in the layout of the published code or timm (it has no embeddings)"
        remedy = "import it with --format reference or --format timm"
    elif leaves & POSITIONS:
        reason = "a Swin Transformer with position embeddings, which this encoder does not have"
    elif naming == "layers" and "encoder.mask_token" in tensors:
        reason = "a SimMIM model of the published code (it has encoder.mask_token)"
        remedy = "import it with --format reference"
    elif naming == "layers" and not firsts & {"layers", "patch_embed"}:
        reason = f"a Swin Transformer V2 under other names ({_some(tensors)})"
        remedy = "rename its tensors as in the published code (patch_embed.*, layers.*)"
    else:
        return None
    return reason, remedy


def read_architecture(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Return the fields of `SwinV2Config` that follow from the learned tensors.

    Raises:
        BridgeError: a tensor needed for that is missing.
    """
    patches = _needed(tensors, "patch_embed.proj.weight", 4, source)
    depths: list[int] = []
    for name in tensors:
        match name.split("."):
            case ["layers", stage, "blocks", block, *_] if stage.isdigit() and block.isdigit():
                depths += [0] * (int(stage) + 1 - len(depths))
                depths[int(stage)] = max(depths[int(stage)], int(block) + 1)
    if not depths or not all(depths):
        raise BridgeError(
            f"{source} has no blocks in some stage (layers.N.blocks): give a complete checkpoint."
        )
    dim, channels, rows, columns = patches.shape
    if rows != columns:
        raise BridgeError(
            f"{source}: patches of {rows}x{columns} pixels are not square: give another checkpoint."
        )
    heads = [
        len(_needed(tensors, f"layers.{stage}.blocks.0.attn.logit_scale", 3, source))
        for stage in range(len(depths))
    ]
    hidden = len(_needed(tensors, "layers.0.blocks.0.mlp.fc1.weight", 2, source))
    architecture = {
        "embed_dim": dim,
        "depths": tuple(depths),
        "num_heads": tuple(heads),
        "extra_norm_every": 0,
    }
    return {
        **architecture,
        "variant": variant_of(architecture),
        "in_channels": channels,
        "patch_size": rows,
        "mlp_ratio": hidden / dim,
    }


def _needed(tensors: Mapping[str, Tensor], name: str, ndim: int, source: str) -> Tensor:
    if name not in tensors:
        raise BridgeError(f"{source} does not fit a Swin Transformer V2:\n  missing: {name}")
    if tensors[name].ndim != ndim or not tensors[name].numel():
        raise BridgeError(
            f"{source}: shape of {name}: {tuple(tensors[name].shape)}, expected {ndim} axes of at "
            "least 1."
        )
    return tensors[name]


def unsupported(config: SwinV2Config) -> list[str]:
    """List features that neither library can express, with remedies."""
    problems = []
    if 0 < config.extra_norm_every <= max(config.depths):
        problems.append(
            f"it has a norm after every {config.extra_norm_every} blocks, which that model lacks: "
            "use the native format"
        )
    if any(side % config.patch_size for side in config.image_size):
        problems.append(
            f"image_size {config.image_size} is not a multiple of the patch size, "
            f"{config.patch_size}: load it with one that is"
        )
        return problems
    for stage, resolution in enumerate(config.stage_resolutions):
        grid = window_grid(resolution, config.window_size, shifted=True)
        if any(grid.padding):
            problems.append(
                f"stage {stage + 1} of {resolution[0]}x{resolution[1]} tokens, window "
                f"{grid.window[0]}x{grid.window[1]}: that model attends to the padding that fills "
                "the last windows, or fails: load it with an image_size or window_size whose "
                "windows divide the stage"
            )
    return problems


def pretrained_windows_argument(config: SwinV2Config) -> list[int | list[int]]:
    """Return the `pretrained_window_sizes` argument: one per stage, 0 for the present window.

    A window of one token has no offsets, and the other code would divide by zero; a window of two
    divides by 1, as ours does.
    """
    windows = config.pretrained_window_sizes
    if windows is None:
        if all(min(pair) > 1 for pair in config.stage_windows):
            return [0] * len(config.depths)
        windows = config.stage_windows
    pairs = [[max(side, 2) for side in pair] for pair in windows]
    return [rows if rows == columns else [rows, columns] for rows, columns in pairs]
