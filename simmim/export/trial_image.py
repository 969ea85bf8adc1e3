"""The image that exports are compared on: a run's first training image, or a drawn one."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simmim.data.datasets.opening import open_set
from simmim.data.datasets.procedural import MIN_SIZE, render
from simmim.data.datasets.remote import RemoteReading
from simmim.data.transforms.cropping import center_crop_resize
from simmim.data.transforms.decoding import decode_image
from simmim.data.transforms.settings import DecodeSettings
from simmim.tasks.features import RANGES, Normalise
from swinv2 import SwinV2Config, VideoConfig


@dataclass(frozen=True, kw_only=True)
class TrialImage:
    """An input of the encoder, and where it comes from."""

    images: Tensor
    """Normalised images (1, channels, height, width), or clips with frames second."""
    origin: str
    """Source of the input, for messages."""
    largest: float | None = None
    """Stored value of the data that becomes 1.0; None if the input was drawn."""


def trial_image(
    config: SwinV2Config,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    shards: str | Path | None = None,
    settings: DecodeSettings | None = None,
) -> TrialImage:
    """Return an image with the size, mean and std of an encoder.

    Args:
        config: config of the encoder, with any number of channels.
        mean: mean per channel, for images in [0, 1].
        std: standard deviation per channel.
        shards: data whose first image is used if it can still be read.
        settings: names of the encoder's channels, and of files in `shards` that do not tell them.
    """
    pixels, origin, largest = None, "a drawn image", None
    if shards is not None:
        try:
            # By range: do not fetch a shard for one image.
            reading = RemoteReading(mode="ranges", attempts=2)
            sample = open_set(shards, reading).read(0, 0)
            image = decode_image(
                sample, channels=config.in_channels, settings=settings or DecodeSettings()
            )
            pixels = center_crop_resize(image.pixels, config.image_size)
            largest = RANGES.get(pixels.dtype, 1.0)
            origin = f"{sample.name} of {shards}"
        except ValueError:  # the data are gone or damaged: draw an image instead
            pixels = largest = None
    if pixels is None:
        pixels = draw_image(config)
    return TrialImage(images=Normalise(mean, std)(pixels[None]), origin=origin, largest=largest)


def trial_clip(config: VideoConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> TrialImage:
    """Return a drawn moving image, (1, frames, channels, height, width), for a video encoder.

    Args:
        config: config of the encoder.
        mean: mean per channel, for frames in [0, 1].
        std: standard deviation per channel.
    """
    picture = Normalise(mean, std)(draw_image(config)[None])
    frames = [picture.roll(config.patch_size * number, -1) for number in range(config.frames)]
    return TrialImage(images=torch.stack(frames, 1), origin="a drawn clip")


def draw_image(config: SwinV2Config) -> Tensor:
    """Draw a star, uint8 (channels, height, width); colours repeat beyond three channels."""
    side = max(*config.image_size, MIN_SIZE)
    drawn = render("star", [0], side, seed=0)[0]
    planes = center_crop_resize(drawn, config.image_size)
    return planes[torch.arange(config.in_channels) % len(planes)]
