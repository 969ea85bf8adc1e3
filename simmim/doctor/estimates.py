"""The memory of a training step from its sizes alone: bounds that take no time."""

import math
from dataclasses import replace
from typing import Any

from simmim.bench.memory import Placement
from simmim.tasks.pretrained import find_weights
from simmim.tasks.recipe import TaskRecipe
from swinv2.config import SwinV2Config
from swinv2.config_file import WEIGHTS_FILE, read_encoder_config
from swinv2.weights import read_shapes

HEAD_ROOM = 1.6
"""Factor by which `most_activations` may exceed the activations of a step in fp32."""
SHARE_KEPT = {"none": 1.0, "attention": 0.7, "full": 0.07}
"""Share of the activations that is kept until the backward, by activation checkpointing."""


def most_parameters(config: SwinV2Config) -> float:
    """Return an upper estimate of the number of an encoder's parameters, from its sizes."""
    decoder = config.num_features * config.strides[-1] ** 2 * config.in_channels
    return 1.05 * (least_parameters(config) + decoder) + 512 * sum(
        depth * heads for depth, heads in zip(config.depths, config.num_heads, strict=True)
    )


def least_parameters(config: SwinV2Config) -> float:
    """Return the number of parameters in the matrices of an encoder's blocks and merges."""
    blocks = sum(
        depth * dim * dim * (4 + 2 * config.mlp_ratio)
        for depth, dim in zip(config.depths, config.stage_dims, strict=True)
    )
    return blocks + sum(8 * dim * dim for dim in config.stage_dims[:-1])


def least_memory(
    recipe: TaskRecipe, config: SwinV2Config, micro: int, placement: Placement
) -> float:
    """Return a lower bound of the bytes of a training step, from its sizes.

    Weights and AdamW's two states are there throughout, as a frozen encoder's weights are;
    gradients replace activations in the backward. Images are counted once.
    """
    weights = 4 * least_parameters(config) / placement.devices
    states = 0.5 if recipe.training.optimizer.name == "adamw_8bit" else 2.0
    kept = 1 + states + (recipe.training.ema_decay is not None)
    maps = least_activations(config) * clip_length(recipe) * share_kept(recipe)
    height, width = config.image_size
    images = 4 * height * width * config.in_channels * getattr(recipe.data, "frames", 1)
    trained = weights * kept + max(weights, micro * maps) + micro * images
    return trained + frozen_memory(recipe, 0)


def least_activations(config: SwinV2Config) -> float:
    """Return a lower bound of the bytes of activations of an image, in fp32.

    A block keeps at least 6 maps of its width and 2 of its MLP's.
    """
    return sum(
        4.0 * depth * rows * columns * dim * (6 + 2 * config.mlp_ratio)
        for (rows, columns), dim, depth in zip(
            config.stage_resolutions, config.stage_dims, config.depths, strict=True
        )
    )


def most_activations(config: SwinV2Config) -> float:
    """Return an upper estimate of the bytes of activations of an image, in fp32."""
    blocks = _activations_of_blocks(config)
    return sum(depth * block for depth, block in zip(config.depths, blocks, strict=True))


def _activations_of_blocks(config: SwinV2Config) -> list[float]:
    """Return an upper estimate of the bytes of activations of a block of each stage, in fp32.

    It keeps about 10 maps of its width, 3 of its MLP's, and two sets of attention weights.
    """
    return [
        4.0
        * (rows * columns)
        * (dim * (10 + 3 * config.mlp_ratio) + 2 * heads * window[0] * window[1])
        for (rows, columns), dim, heads, window in zip(
            config.stage_resolutions,
            config.stage_dims,
            config.num_heads,
            config.stage_windows,
            strict=True,
        )
    ]


def frozen_memory(recipe: TaskRecipe, micro: int) -> float:
    """Return the bytes that a frozen encoder takes beside the trained one; 0 if there is none.

    They are its weights, which are not sharded, and the activations of one block at a time.

    Args:
        recipe: the recipe.
        micro: samples of a micro-batch; 0 for the weights alone.
    """
    if recipe.frozen_encoder is None:
        return 0.0
    try:
        folder = find_weights(recipe.frozen_encoder).encoder
        config = read_encoder_config(folder).config
        config = replace(config, image_size=recipe.data.image_size)
        shapes = read_shapes(folder / WEIGHTS_FILE).values()
    except ValueError:  # loading it says why
        return 0.0
    return 4.0 * sum(map(math.prod, shapes)) + micro * max(_activations_of_blocks(config))


def share_kept(recipe: TaskRecipe) -> float:
    """Return the least share of the activations in fp32 that a step keeps."""
    chosen = recipe.execution.checkpointing
    choices = [chosen] if isinstance(chosen, str) else list(chosen)
    kept = min(SHARE_KEPT[choice] for choice in choices)
    return kept * (1.0 if recipe.training.precision == "fp32" else 0.6)


def clip_length(recipe: TaskRecipe) -> float:
    """Return the number of maps of a sample: the patches of a clip along time, else 1."""
    data: Any = recipe.data
    return max(1.0, getattr(data, "frames", 1) / getattr(recipe.encoder, "frame_patch", 1))


def advise_accumulation(share: int, fitting: float) -> str:
    """Return what to set to need less memory.

    Args:
        share: samples of a process per step.
        fitting: samples of a micro-batch that fit for sure; negative if the weights do not.
    """
    if fitting < 0:
        return "shard weights and optimiser over devices, see `simmim bench memory`"
    if fitting < 1:
        return (
            "set training.accumulation to the batch size, execution.checkpointing to full and "
            "training.precision to bf16"
        )
    parts = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= fitting)
    return f"raise training.accumulation to {parts}; or lower training.batch_size"
