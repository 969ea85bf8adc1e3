"""Batches from a recipe, for training and held out: the same for every stage on images."""

import torch

from simmim.data.bad_samples import BadSamples
from simmim.data.batches import TrainingBatches
from simmim.data.mixture import Order, Shards
from simmim.data.settings import AugmentedDataSettings, DataSettings
from simmim.data.transforms import (
    LabelReading,
    MaskDraw,
    PictureChange,
    TrainTransform,
    class_of,
)
from simmim.engine.settings import TrainingSettings


def check_batches(data: DataSettings, training: TrainingSettings) -> None:
    """Check what a batch and the order of the data ask of each other.

    Raises:
        ValueError: the batch cannot take equally from each slot.
    """
    check_slots(data.slots, training)


def check_slots(slots: int, training: TrainingSettings) -> None:
    """Check that a batch can take equally from each of so many slots.

    Raises:
        ValueError: it cannot.
    """
    if training.batch_size % slots:
        raise ValueError(
            f"training.batch_size {training.batch_size} is no multiple of data.slots "
            f"{slots}; every batch takes equally from each slot. Change either."
        )


def training_batches(
    shards: Shards,
    order: Order,
    data: AugmentedDataSettings,
    training: TrainingSettings,
    *,
    channels: int,
    mask: MaskDraw | None = None,
    augment: PictureChange | None = None,
    label: LabelReading = class_of,
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
        data: size and augmentation of the images, and how they are read.
        training: batch size, accumulation and seed.
        channels: of the images.
        mask: draws the mask of an image, where the stage wants one.
        augment: changes a cropped image, where the stage wants more than crop and mirroring.
        label: reads the label of an image.
        rank: number of this process.
        world: number of processes.
        start: cursor of the first batch.
        end: cursor behind the last one.
        bad_samples: where those that had to be replaced are counted.
    """
    transform = TrainTransform(
        size=(data.image_size, data.image_size),
        seed=training.seed,
        scale=data.scale,
        ratio=data.ratio,
        flip=data.flip,
        channels=channels,
        mask=mask,
        augment=augment,
        label=label,
        max_pixels=data.max_pixels,
    )
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
