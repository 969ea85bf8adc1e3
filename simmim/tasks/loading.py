"""Loading data as a recipe asks: labelled sets and their split, transforms, batches."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from simmim.data.datasets.mixture import Shards, StreamedShards, order_of, slots_of
from simmim.data.loader.bad_samples import BadSamples
from simmim.data.loader.batches import TrainingBatches
from simmim.data.loader.sampler import TrainingSampler
from simmim.data.loader.stream_batches import StreamBatches
from simmim.data.order.order import Address, Order, Slots
from simmim.data.order.source import BadSampleError, DataError, Encoded, SampleSource
from simmim.data.settings import SampleSettings
from simmim.data.transforms.image_transforms import Sample
from simmim.engine.checkpoint.choosing import choose_checkpoint
from simmim.engine.checkpoint.directory import RECIPE_FILE
from simmim.engine.run import RunFolder
from simmim.engine.settings import TrainingSettings
from simmim.environment import print_on_main
from simmim.recipe import read_values
from swinv2.config_file import EncoderDescription

RecipeT = TypeVar("RecipeT")


def with_slots(recipe: RecipeT, training: SampleSource[Any]) -> RecipeT:
    """Return a task's recipe with the number of slots that its data and batch size lead to."""
    settings: Any = recipe
    if settings.data.slots is not None:
        return recipe
    return _replace_slots(recipe, slots_of(training, settings.training.batch_size))


def with_recorded_slots(recipe: RecipeT, run: RunFolder, resume: str | None) -> RecipeT:
    """Return a task's recipe with the number of slots of the run that it resumes.

    A recipe that fixes the number keeps it. In a run of an earlier version, whose recipe may not
    record it, it is that version's default.

    Args:
        recipe: the recipe.
        run: the run folder.
        resume: None to start a new training, `auto`, or the path of a checkpoint.

    Raises:
        ValueError: there is no such checkpoint, or its recipe cannot be read.
    """
    settings: Any = recipe
    if settings.data.slots is not None:
        return recipe
    saved = _recorded(run, resume)
    if saved is None:
        return recipe
    recorded = saved["data"].get("slots", settings.data.UNRECORDED_SLOTS)
    return _replace_slots(recipe, tuple(recorded) if isinstance(recorded, list) else recorded)


def with_recorded_windows(
    recipe: RecipeT, run: RunFolder, resume: str | None, start: EncoderDescription | None
) -> RecipeT:
    """Return a task's recipe with the pretraining windows that its position offsets relate to.

    Args:
        recipe: the recipe.
        run: the run folder.
        resume: None to start a new training, `auto`, or the path of a checkpoint.
        start: the encoder of `--init-from`, from which training starts if it does not resume.
    """
    settings: Any = recipe
    saved = _recorded(run, resume)
    name = "pretrained_window_sizes"
    if saved is None:
        started: RecipeT = recipe if start is None else settings.starting_from(start)
        return started
    windows = saved["encoder"].get(name)
    if windows is None or getattr(settings.encoder, name, ...) is not None:
        return recipe
    pairs = tuple((rows, columns) for rows, columns in windows)
    changed: RecipeT = replace(
        settings, encoder=replace(settings.encoder, pretrained_window_sizes=pairs)
    )
    return changed


def _recorded(run: RunFolder, resume: str | None) -> dict[str, Any] | None:
    """Return the values of the recipe of the run that is resumed; None if there is none yet."""
    if resume is None:
        return None
    checkpoint = choose_checkpoint(run.checkpoints, resume, run=run.identity(), tensors=False).path
    saved = run.recipe if checkpoint is None else checkpoint / RECIPE_FILE
    return read_values(saved) if saved.is_file() else None


def _replace_slots(recipe: RecipeT, slots: Slots | None) -> RecipeT:
    changed: Any = recipe
    changed = replace(changed, data=replace(changed.data, slots=slots))
    replaced: RecipeT = changed
    return replaced


def order_for(recipe: Any, training: SampleSource[Any]) -> Order:
    """Return the order of the samples for a recipe whose slots are chosen; see `with_slots`."""
    return order_of(training, seed=recipe.training.seed, slots=recipe.data.slots)


def training_batches(
    shards: SampleSource[Encoded],
    order: Order,
    transform: Callable[[Encoded, Address], Sample],
    data: SampleSettings,
    training: TrainingSettings,
    *,
    rank: int,
    world: int,
    start: int,
    end: int,
    bad_samples: BadSamples,
) -> TrainingBatches | StreamBatches:
    """Return this rank's micro-batches, from `start` to `end` samples of the global stream.

    Args:
        shards: training data.
        order: order of the samples.
        transform: transform of the samples.
        data: settings for reading samples.
        training: batch size and accumulation.
        rank: number of this process.
        world: number of processes.
        start: cursor of the first batch.
        end: cursor after the last batch.
        bad_samples: counts the samples that had to be replaced.
    """
    if isinstance(shards, StreamedShards):
        sampler = TrainingSampler(
            order=order,
            batch_size=training.batch_size,
            accumulation=training.accumulation,
            rank=rank,
            world=world,
            start=start,
            stop=end,
        )
        return StreamBatches(
            shards,
            transform,
            sampler,
            seed=training.seed,
            workers=data.workers,
            pin_memory=torch.cuda.is_available(),
            bad_samples=bad_samples,
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


def open_labelled(
    shards: Shards,
    *,
    validation: Shards | None,
    validation_shards: int,
    fraction: float,
    seed: int,
) -> tuple[Shards, Shards | None]:
    """Split labelled shards into training and validation shards.

    Args:
        shards: labelled shards.
        validation: separate validation shards; None holds out some of `shards`.
        validation_shards: number of shards at the end to hold out; not used with `validation`.
        fraction: fraction of each class's training samples to keep.
        seed: seed of that choice.

    Returns:
        Training shards, and validation shards or None.

    Raises:
        ValueError: the shards have no classes, samples without a class or of one class only, or
            validation shards with different classes.
    """
    if validation is None:
        training, held_out = shards.split(validation_shards)
    else:
        training, held_out = shards, validation
        _check_same_classes(training, held_out)
    _check_labels(training)
    _check_labels(held_out)
    lone = _only_class(training)
    if lone is not None:
        raise ValueError(
            f"all {training.samples:,} images to learn from in {training.folder} are of the class "
            f"{lone!r}: add images of another, or choose other shards to train on."
        )
    _warn_of_only_class(held_out)
    if fraction < 1:
        training = training.share(fraction, seed=seed)
    return training, held_out if held_out.samples else None


def any_labelled(source: SampleSource[Encoded], is_labelled: Callable[[Encoded], bool]) -> bool:
    """Return whether a sample has a label, reading no further than the first that has.

    Also True if no sample can be read: damaged ones are counted and named in training.

    Args:
        source: the samples.
        is_labelled: returns whether one has a label.

    Raises:
        DataError: a label cannot be used; names its sample.
    """
    readable = False
    for shard, size in enumerate(source.sizes):
        for sample in range(size):
            try:
                if is_labelled(source.read(shard, sample)):
                    return True
            except BadSampleError:
                continue
            except DataError as error:
                raise DataError(f"sample {source.name(shard, sample)}: {error}") from None
            readable = True
    return not readable


def _only_class(shards: Shards) -> str | None:
    """Return the class that all of several labelled images have; None if they differ."""
    labels = all_labels(shards)
    is_alone = len(labels) > 1 and labels.min() == labels.max() >= 0
    return shards.classes[labels[0]] if is_alone else None


def _warn_of_only_class(held_out: Shards) -> None:
    """Warn of held-out samples that are all of one class, which any constant answer is right on."""
    lone = _only_class(held_out)
    if lone is not None:
        print_on_main(
            f"WARNING: all {held_out.samples:,} held-out images of {held_out.folder} are of the "
            f"class {lone!r}, so accuracy on them says little: hold out others."
        )


def all_labels(shards: Shards) -> np.ndarray:
    """Return the labels of all samples in order, int64 (samples,), -1 for none."""
    labels = [shards.labels(number) for number in range(len(shards.sizes))]
    return np.concatenate([np.zeros(0, dtype=np.int64), *labels])


def _check_labels(shards: Shards) -> None:
    shards.require_labels()
    missing = int((all_labels(shards) < 0).sum())
    if missing:
        raise ValueError(
            f"{missing} of {shards.samples} images in {shards.folder} have no class: put each "
            "image in the folder of its class, and make shards again with `data-prep shard` if "
            "they are shards."
        )


def _check_same_classes(training: Shards, validation: Shards) -> None:
    if training.classes == validation.classes:
        return
    unknown = sorted(set(validation.classes) - set(training.classes))
    absent = sorted(set(training.classes) - set(validation.classes))
    raise ValueError(
        f"{training.folder} and {validation.folder} have different classes, so a label does not "
        f"mean the same in both (only in the first: {_listed(absent)}; only in the second: "
        f"{_listed(unknown)}). Give both the same class folders, or hold out shards of the "
        "first with validation_shards."
    )


def _listed(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) or "none"
