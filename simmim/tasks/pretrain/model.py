"""The model of a pretraining: encoder and target that a recipe asks for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from data_prep.channels import are_pictures, describe
from simmim.engine.generators import seeded
from simmim.method.encoder_protocol import ImageEncoder, check_encoder
from simmim.method.model import SimMIM
from simmim.method.targets import Features, NormalisedPixels, Pixels, Target
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrained import find_weights
from swinv2 import SwinV2, build_encoder, load_encoder, read_encoder_config


def build_swinv2(recipe: PretrainRecipe) -> SwinV2:
    """Build the encoder that a recipe describes."""
    return build_encoder(recipe.encoder.config(recipe.data.image_size))


EncoderBuilder = Callable[[PretrainRecipe], ImageEncoder]
"""Builds the encoder of a pretraining, with random weights drawn from torch's generator."""


def build_model(recipe: PretrainRecipe, encoder: EncoderBuilder = build_swinv2) -> SimMIM[Any]:
    """Build the model with its initial weights, which depend on the recipe's seed alone.

    Raises:
        TypeError: `encoder` is an encoder, not a function that builds one.
        ValueError: the encoder is for other images than the recipe's.
    """
    if isinstance(encoder, nn.Module):
        name = type(encoder).__name__
        raise TypeError(
            f"encoder is a {name}: give a function that builds one from the recipe, such as "
            f"`lambda recipe: {name}()`, so that its initial weights depend on the seed alone."
        )
    target = build_target(recipe)
    with seeded(recipe.training.seed):
        built = encoder(recipe)
        _check_sizes(built, recipe)
        return SimMIM(
            built,
            mask_cell=recipe.mask.cell,
            loss=recipe.loss.name,
            loss_area=recipe.loss.area,
            target=target,
        )


def _check_sizes(encoder: ImageEncoder, recipe: PretrainRecipe) -> None:
    """Raise ValueError unless an encoder is for the images of a recipe, which the data follow."""
    check_encoder(encoder)
    side = recipe.data.image_size
    for name, wanted, found in (
        ("data.image_size", (side, side), encoder.image_size),
        ("encoder.patch_size", recipe.encoder.patch_size, encoder.patch_size),
        ("encoder.in_channels", recipe.encoder.in_channels, encoder.in_channels),
    ):
        if found != wanted:
            raise ValueError(
                f"the {type(encoder).__name__} has {name.split('.')[1]} {found}, and {name} of the "
                f"recipe asks for {wanted}: change one of them."
            )


def build_target(recipe: PretrainRecipe) -> Target:
    """Build the target of a recipe; it is not part of the model that is trained.

    Raises:
        ValueError: the encoder of features cannot be loaded, or is for images of other channels.
    """
    match recipe.loss.target_name:
        case "pixels":
            return Pixels(recipe.encoder.in_channels)
        case "normalised_pixels":
            return NormalisedPixels(recipe.encoder.in_channels)
        case "features":
            assert recipe.loss.target_encoder is not None
            return _features(recipe, recipe.loss.target_encoder)


def _features(recipe: PretrainRecipe, source: str) -> Features:
    try:
        directory = find_weights(source).encoder
        described = read_encoder_config(directory)
        with torch.random.fork_rng(devices=[]):  # the weights of the model depend on its seed alone
            encoder = load_encoder(directory, image_size=recipe.data.image_size)
    except ValueError as error:
        raise ValueError(f"loss.target_encoder: {error}") from None
    if encoder.in_channels != recipe.encoder.in_channels:
        raise ValueError(
            f"the encoder of loss.target_encoder {source} has {encoder.in_channels} channels, and "
            f"encoder.in_channels is {recipe.encoder.in_channels}: both see the same images."
        )
    named, its = recipe.data.wanted_channels, described.channels
    if named is not None and its is not None and named != its and not are_pictures(named, its):
        raise ValueError(
            f"the encoder of loss.target_encoder {source} takes channels {describe(its)}, and the "
            f"training {describe(named)}: both see the same images. Set data.channels to "
            f"{describe(its)}, or give another encoder."
        )
    # (x · std + mean - its mean) / its std, of images that are normalised as the recipe says.
    mean, std = recipe.data.normalisation
    channels = list(zip(mean, std, described.mean, described.std, strict=True))
    return Features(
        encoder,
        scale=tuple(own_std / its_std for _, own_std, _, its_std in channels),
        shift=tuple((own - its) / its_std for own, _, its, its_std in channels),
    )
