"""Mean and std that are `measured`, as numbers: recorded of shards, or of a sample of images."""

import math
from dataclasses import replace
from typing import Any, TypeVar

from data_prep.format.storage import locate
from data_prep.format.text import count_noun
from simmim.data.datasets.opening import ChannelStatistics, is_image_folder, recorded_statistics
from simmim.data.settings import MEASURED, with_statistics
from simmim.data.transforms.sampling import SampledImages, sample_images
from simmim.environment import print_on_main
from simmim.tasks.input_check import LISTED_CHANNELS, SAMPLES, SECONDS, settings_for

RecipeT = TypeVar("RecipeT")

MEASURED_IMAGES = 1_000
"""Images that are decoded to measure a folder."""


def with_measured(recipe: RecipeT) -> RecipeT:
    """Return a recipe of images with `measured` mean and std replaced by numbers.

    They are those that `data-prep info --statistics` recorded of shards. Of folders, and of shards
    whose pictures are trained on with other channels than were recorded, such as transparency, a
    fixed choice of up to MEASURED_IMAGES images is measured.

    Raises:
        ValueError: shards were not measured, or images are of other channels than the encoder's;
            the message has all settings that fit.
    """
    task: Any = recipe
    data = task.data
    if MEASURED not in (data.mean, data.std):
        return recipe
    measured: RecipeT = replace(task, data=with_statistics(data, lambda one: _read(task, one)))
    return measured


def _read(task: Any, folder: str) -> ChannelStatistics:
    """Return the statistics of one of a recipe's datasets, for the channels of its encoder."""
    channels = task.encoder.in_channels
    if not is_image_folder(locate(folder)):
        try:
            recorded = recorded_statistics(
                folder, allow_pipe=task.data.allow_pipe, channels=task.data.wanted_channels
            )
        except ValueError as error:
            raise _with_settings(error, _sample(task, folder, SAMPLES, SECONDS), channels) from None
        if len(recorded.mean) == channels or task.architecture_source is not None:
            return recorded
    found = _sample(task, folder, MEASURED_IMAGES, math.inf)
    if not found.forms:
        reason = f", the first {found.bad[0]}" if found.bad else ""
        raise ValueError(
            f"data.mean and data.std cannot be measured: none of {found.count:,} images of "
            f"{folder} can be decoded{reason}. Repair or remove them."
        )
    constant_alpha = channels == 4 and max(form.channels for form in found.forms) < 4
    if found.main in found.refused or constant_alpha:
        fitting = found.main.channels
        raise ValueError(
            f"the images measured of {folder} have {found.main}; encoder.in_channels is {channels}:"
            f" set encoder.in_channels to {fitting}; data.mean and data.std follow."
        )
    mean, std = found.trained_on.statistics()
    if std.min() <= 0:
        raise ValueError(
            f"a channel of the images in {folder} is constant, so its measured standard deviation"
            " is 0: set data.mean and data.std to numbers."
        )
    images = count_noun(len(found.trained_on.means), "image")
    print_on_main(f"data.mean and data.std are measured of {images} in {folder}")
    return ChannelStatistics(mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def _sample(task: Any, folder: str, most: int, seconds: float) -> SampledImages:
    data = task.data
    classes = data.classes if isinstance(data.shards, str) else None
    return sample_images(
        replace(data, shards=folder, classes=classes).open_shards(),
        channels=task.encoder.in_channels,
        data=data,
        most=most,
        seconds=seconds,
    )


def _with_settings(error: ValueError, found: SampledImages, channels: int) -> ValueError:
    """Return the error of shards that were not measured, with the settings that fit them."""
    if not found.forms:
        return error
    text = (
        f"{str(error).rstrip('.')}. The images have {found.main}; encoder.in_channels is {channels}"
    )
    if len(found.statistics(found.main)[0]) > LISTED_CHANNELS:
        return ValueError(f"{text}: set {settings_for(found)}.")
    # Not the channels that the recipe has already.
    settings = settings_for(found).removeprefix(f"encoder.in_channels to {channels}, ")
    return ValueError(f"{text}. Without measuring all, set {settings}.")
