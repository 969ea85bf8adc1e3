"""Batches from a recipe: the same for every stage."""

from collections.abc import Callable

import torch

from simmim.data.datasets.mixture import Order
from simmim.data.loader.bad_samples import BadSamples
from simmim.data.loader.batches import TrainingBatches
from simmim.data.order.order import Address
from simmim.data.order.source import Raw, Source
from simmim.data.settings import AugmentedDataSettings, SampleSettings
from simmim.data.transforms.image_transforms import (
    LabelReading,
    MaskDraw,
    PictureChange,
    Sample,
    TrainTransform,
    class_of,
)
from simmim.engine.settings import TrainingSettings


def train_transform(
    data: AugmentedDataSettings,
    *,
    seed: int,
    channels: int,
    mask: MaskDraw | None = None,
    augment: PictureChange | None = None,
    label: LabelReading = class_of,
) -> TrainTransform:
    """Return what crops and mirrors the images of shards.

    Args:
        data: size and augmentation of the images.
        seed: of all that is drawn.
        channels: of the images.
        mask: draws the mask of an image, where the stage wants one.
        augment: changes a cropped image, where the stage wants more than crop and mirroring.
        label: reads the label of an image.
    """
    return TrainTransform(
        size=(data.image_size, data.image_size),
        seed=seed,
        scale=data.scale,
        ratio=data.ratio,
        flip=data.flip,
        channels=channels,
        mask=mask,
        augment=augment,
        label=label,
        max_pixels=data.max_pixels,
    )


def training_batches(
    shards: Source[Raw],
    order: Order,
    transform: Callable[[Raw, Address], Sample],
    data: SampleSettings,
    training: TrainingSettings,
    *,
    rank: int,
    world: int,
    start: int,
    end: int,
    bad_samples: BadSamples,
) -> TrainingBatches:
    """Return this rank's micro-batches, from `start` to `end` samples of the global stream.

    Args:
        shards: to train on.
        order: of their samples.
        transform: makes a sample of what is read.
        data: how samples are read.
        training: batch size and accumulation.
        rank: number of this process.
        world: number of processes.
        start: cursor of the first batch.
        end: cursor behind the last one.
        bad_samples: where those that had to be replaced are counted.
    """
    return TrainingBatches(
        shards,
        order,
        transform,
        batch_size=training.batch_size,
        start_position=start,
        end_position=end,
        accumulation=training.accumulation,
        rank=rank,
        world=world,
        workers=data.workers,
        pin_memory=torch.cuda.is_available(),
        bad_samples=bad_samples,
    )
