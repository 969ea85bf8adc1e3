"""Checks of labelled files: all exist, and a sample of them is prepared as in training."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from data_prep.format.text import count_noun, count_range
from simmim.data.datasets.clips import ClipSet
from simmim.data.datasets.local_files import LocalFiles
from simmim.data.order.order import Address
from simmim.data.order.source import BadSampleError, DataError, SampleSource
from simmim.data.transforms.image_transforms import ClassMap, Instances, Targets
from simmim.data.transforms.labels import IGNORED
from simmim.data.transforms.sampling import sample_images
from simmim.doctor.checks import Check
from simmim.doctor.shards import input_checks
from simmim.tasks.fine_tuning import FineTuningStage, Prepare
from simmim.tasks.input_check import input_of
from simmim.tasks.recipe import TaskRecipe

PREPARED = 256
"""Maximum number of samples of a set that are prepared."""
PREPARING_SECONDS = 10.0
MEASURED = 64
"""Maximum number of images whose channels and statistics are compared with the recipe."""
MOST_IGNORED = 0.9
MOST_EMPTY = 0.5
NAMED = 5


@dataclass
class PreparedSamples:
    """Results of preparing some samples."""

    count: int = 0
    seconds: float = 0.0
    bad: list[str] = field(default_factory=list)
    """Damaged samples, which training replaces."""
    turned: list[str] = field(default_factory=list)
    """Samples whose labels may not be upright although the image is."""
    wrong: str = ""
    """An error that would end training; preparing stops at it."""
    pixels: Counter[int] = field(default_factory=Counter)
    """Number of pixels of each class, and of IGNORED."""
    objects: list[int] = field(default_factory=list)
    """Number of objects in each crop."""


def check_labelled_files(stage: FineTuningStage[Any, Any], given: TaskRecipe) -> Iterator[Check]:
    """Check the training and validation files; `given` as in `input_of`."""
    training, validation = stage.training_shards, stage.validation_shards
    of = stage.recipe.SAMPLES
    yield Check(
        name="data",
        verdict="ok",
        found=f"{training.samples:,} {of} to train on",
    )
    if validation is None:
        yield Check(
            name="validation",
            verdict="warning",
            found="nothing is held out, so the model is never evaluated",
            change=f"name validation {of} in the data section",
        )
    else:
        yield Check(name="validation", verdict="ok", found=f"{validation.samples:,} {of}")
    sets = [training] if validation is None else [training, validation]
    yield check_presence([one for one in sets if isinstance(one, LocalFiles)])
    yield from _check_samples(stage, "samples", training, stage.training_transform())
    if not isinstance(training, ClipSet):
        found = sample_images(
            training,
            channels=stage.encoder.in_channels,
            data=stage.recipe.data,
            most=MEASURED,
            seconds=PREPARING_SECONDS,
        )
        yield from input_checks(found, input_of(stage, given))
    if validation is not None:
        yield from _check_samples(stage, "held out", validation, stage.validation_transform())


def check_presence(sets: list[LocalFiles[Any]]) -> Check:
    """Check that all files exist and are not empty."""
    places = dict.fromkeys(file for one in sets for file in one.files())
    total, wrong = 0, []
    for place in places:
        try:
            size = place.stat().st_size
        except OSError as error:
            wrong.append(f"{place}: {error.strerror}")
            continue
        total += size
        if not size:
            wrong.append(f"{place}: empty")
    if wrong:
        more = f"\nand {len(wrong) - NAMED:,} more" if len(wrong) > NAMED else ""
        return Check(
            name="files",
            verdict="problem",
            found=f"{len(wrong):,} of {len(places):,} files cannot be used:\n"
            + "\n".join(wrong[:NAMED])
            + more,
            change="copy them here, or remove them from the lists",
        )
    return Check(
        name="files", verdict="ok", found=f"all {len(places):,} exist, {total / 2**30:,.2f} GiB"
    )


def prepare_some(source: SampleSource[Any], prepare: Prepare) -> PreparedSamples:
    """Prepare samples spread evenly over all shards, for a limited time."""
    places = source.spread(PREPARED)
    found, began = PreparedSamples(), time.perf_counter()
    # In random order, which covers the whole set even if time runs out.
    for index in np.random.default_rng(0).permutation(len(places)).tolist():
        if time.perf_counter() - began > PREPARING_SECONDS:
            break
        shard, sample = places[index]
        found.count += 1
        try:
            prepared = prepare(source.read(shard, sample), Address(0, shard, sample))
        except BadSampleError as error:
            found.bad.append(f"{source.name(shard, sample)}: {error}")
        except DataError as error:
            found.wrong = f"{source.name(shard, sample)}: {error}"
            break
        else:
            _note(found, prepared.targets)
            if prepared.turned is not None:
                found.turned.append(f"{source.name(shard, sample)}: {prepared.turned}")
    found.seconds = time.perf_counter() - began
    return found


def _note(found: PreparedSamples, targets: Targets | None) -> None:
    match targets:
        case ClassMap(classes=classes):
            values, counts = torch.unique(classes, return_counts=True)
            found.pixels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        case Instances(labels=labels):
            found.objects.append(len(labels))


def _check_samples(
    stage: FineTuningStage[Any, Any], name: str, source: SampleSource[Any], prepare: Prepare
) -> Iterator[Check]:
    """Prepare some samples, and report damaged ones and the labels of the others."""
    found, of = prepare_some(source, prepare), stage.recipe.SAMPLES
    if found.wrong:
        yield Check(name=name, verdict="problem", found=found.wrong)
        return
    share = len(found.bad) / max(found.count, 1)
    rate = found.count / max(found.seconds, 1e-9)
    text = f"{found.count:,} prepared at {rate:,.1f} {of}/s in one process"
    if found.bad:
        text += f"; {len(found.bad)} damaged ({share:.1%}), the first {found.bad[0]}"
    too_many = share > stage.recipe.data.max_bad_share
    yield Check(
        name=name,
        verdict="problem" if too_many else "warning" if found.bad else "ok",
        found=text,
        change=stage.recipe.data.REMEDY if found.bad else "",
    )
    if found.turned:
        yield Check(
            name="orientation",
            verdict="warning",
            found=f"{len(found.turned):,} of {found.count:,} {of} are turned upright when read, "
            f"the first {found.turned[0]}",
            change="look at the pictures of a validation, where labels are drawn; turn labels that "
            "are not upright, or remove the orientation from the image files",
        )
    if name == "samples" and found.pixels:
        yield _check_pixels(found.pixels, stage.class_names(stage.recipe))
    if name == "samples" and found.objects:
        yield _check_objects(found.objects)


def _check_pixels(pixels: Counter[int], names: tuple[str, ...]) -> Check:
    """Check which classes are in the crops."""
    total, ignored = sum(pixels.values()), pixels[IGNORED]
    absent = [name for number, name in enumerate(names) if not pixels[number]]
    found = (
        f"{len(names) - len(absent)} of {len(names)} classes in these crops; "
        f"{ignored / total:.0%} of the pixels are ignored"
    )
    if absent:
        more = ", …" if len(absent) > NAMED else ""
        found += f"; missing: {', '.join(absent[:NAMED])}{more}"
    if ignored > MOST_IGNORED * total:
        return Check(
            name="labels",
            verdict="problem" if ignored == total else "warning",
            found=found,
            change="check data.ignore_label and data.reduce_zero_label",
        )
    return Check(name="labels", verdict="ok", found=found)


def _check_objects(objects: list[int]) -> Check:
    """Check how many objects are in the crops."""
    empty = objects.count(0) / len(objects)
    found = (
        f"{np.mean(objects):.1f} objects per crop, at most {max(objects)}; "
        f"{empty:.0%} of the crops have none"
    )
    if empty > MOST_EMPTY:
        return Check(
            name="labels",
            verdict="warning",
            found=found,
            change="narrow data.scale: crops are too small, or images are scaled down too far",
        )
    return Check(name="labels", verdict="ok", found=found)


def check_class_sizes(counts: Mapping[str, int], of: str) -> Check:
    """Check that every class has samples.

    Args:
        counts: number of training samples of each class.
        of: plural noun for samples.
    """
    absent = [name for name, size in counts.items() if not size]
    found = (
        f"{count_noun(len(counts), 'class', 'classes')} with "
        f"{count_range(min(counts.values()), max(counts.values()))} {of}"
    )
    if absent:
        more = ", …" if len(absent) > NAMED else ""
        return Check(
            name="classes",
            verdict="warning",
            found=f"{found}; no {of} of {', '.join(absent[:NAMED])}{more}",
            change="add some, or number the classes without gaps",
        )
    return Check(name="classes", verdict="ok", found=found)
