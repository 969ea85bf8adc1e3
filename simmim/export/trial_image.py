"""The picture that exports are compared on: the first of a run's shards, or one that is drawn."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simmim.data.datasets.opening import open_set
from simmim.data.datasets.procedural import MIN_SIZE, render
from simmim.data.datasets.remote import RemoteReading
from simmim.data.transforms.cropping import center_crop_resize
from simmim.data.transforms.decoding import decode_pixels
from simmim.tasks.features import Normalise
from swinv2 import SwinV2Config, VideoConfig


@dataclass(frozen=True, kw_only=True)
class TrialImage:
    """A picture as the encoder takes it."""

    images: Tensor
    """Normalised (1, channels, height, width) of the encoder's size."""
    origin: str
    """Where it comes from, for a person."""


def trial_image(
    config: SwinV2Config,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    shards: str | Path | None = None,
) -> TrialImage:
    """Prepare a picture with the size, mean and std of an encoder.

    Args:
        config: of the encoder, of any number of channels.
        mean: of each channel, for images in [0, 1].
        std: of each channel.
        shards: whose first image is taken, where they are still there and it can be read.
    """
    pixels, origin = None, "a picture that was drawn for it"
    if shards is not None:
        try:
            # By range: one picture is not worth a shard.
            reading = RemoteReading(mode="ranges", attempts=2)
            sample = open_set(shards, reading).read(0, 0)
            image = decode_pixels(sample.image, sample.extension, channels=config.in_channels)
            pixels = center_crop_resize(image.pixels, config.image_size)
            origin = f"{sample.name} of {shards}"
        except ValueError:  # gone, or damaged since: what follows needs no shards
            pixels = None
    if pixels is None:
        pixels = draw_image(config)
    return TrialImage(images=Normalise(mean, std)(pixels[None]), origin=origin)


def trial_clip(config: VideoConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> TrialImage:
    """Draw a picture that moves, (1, frames, channels, height, width) as a video encoder takes it.

    Args:
        config: of the encoder.
        mean: of each channel, for frames in [0, 1].
        std: of each channel.
    """
    picture = Normalise(mean, std)(draw_image(config)[None])
    frames = [picture.roll(config.patch_size * number, -1) for number in range(config.frames)]
    return TrialImage(images=torch.stack(frames, 1), origin="a moving picture drawn for it")


def draw_image(config: SwinV2Config) -> Tensor:
    """Draw a star, uint8 (channels, height, width); beyond three, its colours come again."""
    side = max(*config.image_size, MIN_SIZE)
    drawn = render("star", [0], side, seed=0)[0]
    planes = center_crop_resize(drawn, config.image_size)
    return planes[torch.arange(config.in_channels) % len(planes)]
