"""Whether images fit the encoder: their channels, range and statistics, before training starts.

Images whose channels do not fit cannot be trained on. Images of another scale than `data.mean` and
`data.std` train silently and badly: of 16-bit images that fill a hundredth of their range nearly
nothing is left after normalisation with the statistics of photographs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.format.text import count_noun
from simmim.data.datasets.clips import ClipSet
from simmim.data.datasets.mixture import MixedShards, StreamedShards
from simmim.data.datasets.shards import ShardSet
from simmim.data.order.source import DataError, SampleSource
from simmim.data.settings import follows_images
from simmim.data.transforms.sampling import RANGES, ImageForm, SampledImages, sample_images
from simmim.data.transforms.settings import DecodeSettings
from simmim.tasks.recipe import TaskRecipe

SAMPLES = 32
"""Images that are decoded before training starts."""
SMALL_SET = 256
"""Images of a set up to which all are decoded, so that a single one of another kind is found."""
SECONDS = 5.0
"""Longest time that is taken for it."""

LISTED_CHANNELS = 16
"""Channels up to which mean and std are written out in a message."""
LEAVE_OUT = (
    "name those to keep by `data-prep shard FOLDER DST --include PATTERN`, or those to leave out "
    "by --exclude PATTERN"
)
FOLLOW = "; data.mean and data.std, which are measured, follow"
OTHER_IMAGES = "give images like those of the training, of the same channels, bits and range"
SMALLEST_STD = 1e-5
"""Standard deviation that is proposed for constant channels; 0 would be no divisor."""

NEAR_MEAN, NEAR_STD = 0.5, 1.5
"""Largest difference of means, in units of the recipe's std, and ratio of stds without warning."""
LOUD_MEAN, LOUD_STD = 1.0, 2.0
"""Those up to which only the doctor warns."""
FAR_MEAN, FAR_STD = 4.0, 5.0
"""Those from which training is refused."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """How images fit the encoder and its normalisation, in one respect."""

    name: Literal["channels", "types", "transparency", "range", "statistics"]
    verdict: Literal["ok", "warning", "problem"]
    found: str
    change: str = ""
    """Advice on what to change; empty if nothing."""
    minor: bool = False
    """Whether a warning is not worth a line at the start of training."""


@dataclass(frozen=True, kw_only=True)
class EncoderInput:
    """What an encoder takes."""

    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    measurable: bool = False
    """Whether the images are shards, of which mean and std can be measured."""
    streamed: bool = False
    """Whether the images are streamed, so that mean and std cannot be measured."""
    measured: bool = False
    """Whether the recipe has mean and std measured, so that they follow the images."""
    trained: str | None = None
    """Trained weights that fix channels, mean and std, as named by the user; None for none."""
    evaluated: bool = False
    """Whether the images are only evaluated on, so that other images are the remedy."""


def input_of(stage: Any, given: TaskRecipe | None = None) -> EncoderInput:
    """Return what the encoder of a task's stage takes.

    Args:
        stage: the stage.
        given: the recipe that it was made of, which tells whether trained weights fix channels,
            mean and std, or whether these are measured: the stage's own has taken their values.
            None for the stage's own.
    """
    normalise = stage.module.normalise
    recipe = stage.recipe if given is None else given
    return EncoderInput(
        channels=stage.encoder.in_channels,
        mean=normalise.mean.flatten().tolist(),
        std=normalise.std.flatten().tolist(),
        measurable=is_measurable(stage.training_shards),
        streamed=isinstance(stage.training_shards, StreamedShards),
        measured=follows_images(recipe.data),
        trained=recipe.architecture_source,
    )


def is_measurable(source: SampleSource[Any]) -> bool:
    """Return whether `data-prep info --statistics` can measure all images of a source."""
    sets = source.sets if isinstance(source, MixedShards) else (source,)
    return all(isinstance(one, ShardSet) for one in sets)


def check_stage_input(stage: Any, given: TaskRecipe | None = None) -> list[str]:
    """Check the training images of a task's stage, held-out ones, and those of an online probe.

    Args:
        stage: the stage.
        given: see `input_of`.

    Raises:
        ValueError: they do not fit the encoder; see `check_input`.
    """
    wanted, data = input_of(stage, given), stage.recipe.data
    warnings = check_input(stage.training_shards, wanted, data)
    for name, source in stage.evaluated_sources.items():
        if source is None or not source.samples:
            continue
        compared = replace(
            wanted, trained="the encoder of this training", evaluated=True, measured=False
        )
        try:
            found = check_input(source, compared, data)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        warnings += [f"{name}: {text}" for text in found]
    return warnings


def check_input(source: SampleSource[Any], wanted: EncoderInput, data: DecodeSettings) -> list[str]:
    """Compare a few images with what the encoder takes, and return warnings.

    Raises:
        ValueError: the images do not fit; the message has the settings that do.
    """
    if isinstance(source, ClipSet) or not source.samples:
        return []
    try:
        found = sample_images(
            source,
            channels=wanted.channels,
            data=data,
            most=SAMPLES if source.samples > SMALL_SET else SMALL_SET,
            seconds=SECONDS,
        )
    except DataError:  # training will retry it, and report it
        return []
    findings = [
        one for one in compare_input(found, wanted) if one.verdict != "ok" and not one.minor
    ]
    if any(one.verdict == "problem" for one in findings):
        raise ValueError(_as_text(findings))
    return [_as_text(findings)] if findings else []


def _as_text(findings: Sequence[Finding]) -> str:
    """Return findings as one message; a change that several have in common is said once."""
    changes = "; ".join(dict.fromkeys(one.change for one in findings))
    found = "; ".join(one.found for one in findings)
    if changes == OTHER_IMAGES:
        return f"{found}. {changes.capitalize()}."
    return f"{found}. To fit the images, {changes}."


def compare_input(found: SampledImages, wanted: EncoderInput) -> Iterator[Finding]:
    """Yield how sampled images fit the encoder; nothing if none could be decoded."""
    if not found.forms:
        return
    yield _compare_channels(found, wanted)
    if found.mixes_types:
        yield _compare_types(found)
    if found.transparent:
        yield _compare_transparency(found, wanted)
    scale = _check_scale(found.main, wanted, advice(found, wanted))
    if scale is not None:
        yield scale
    elif found.main not in found.refused:
        yield _compare_statistics(found, wanted)


def _compare_channels(found: SampledImages, wanted: EncoderInput) -> Finding:
    form, total = found.main, found.forms.total()
    source = "encoder.in_channels is" if wanted.trained is None else f"{wanted.trained} takes"
    text = f"{found.listed(examples=bool(found.refused))}; {source} {wanted.channels}"
    if found.refused:
        changes = [advice(found, wanted)] if form in found.refused else []
        if len(found.forms) > 1:
            changes.insert(0, f"leave out images of other channels: {LEAVE_OUT}")
        stops = form in found.refused or bool(found.stopping)
        return Finding(
            name="channels",
            verdict="problem" if stops else "warning",
            found=text,
            change="; or ".join(changes),
        )
    grey = sum(count for one, count in found.forms.items() if one.channels == 1)
    if wanted.channels == 3 and grey > total / 2:
        text = f"{text}, so that grey is copied to three channels"
    elif wanted.channels == 4 and form.channels < 4:
        text = f"{text}, so that the fourth channel is constant"
    else:
        return Finding(name="channels", verdict="ok", found=text)
    if wanted.trained is not None:
        return Finding(name="channels", verdict="ok", found=text)
    return Finding(name="channels", verdict="warning", found=text, change=advice(found, wanted))


def _compare_types(found: SampledImages) -> Finding:
    listed = ", ".join(f"{kind} (such as {name})" for kind, name in sorted(found.types.items()))
    return Finding(
        name="types",
        verdict="problem",
        found=f"the images are of types that a batch cannot mix: {listed}",
        change=f"leave out all but one type: {LEAVE_OUT}; or write all arrays in one type",
    )


def _compare_transparency(found: SampledImages, wanted: EncoderInput) -> Finding:
    count, total = len(found.transparent), found.forms.total()
    change = "set encoder.in_channels to 4, and data.mean and data.std to measured"
    if wanted.measured:
        change = f"set encoder.in_channels to 4{FOLLOW}"
    if wanted.trained is not None:
        change = "start from an encoder of 4 channels"
    return Finding(
        name="transparency",
        verdict="warning",
        found=f"{count:,} of {count_noun(total, 'image')} (such as {found.transparent[0]}) "
        f"{'has' if count == 1 else 'have'} transparency, shown on white",
        change=f"if the fourth band is data, such as near infrared, {change}",
        minor=wanted.trained is not None,
    )


def _check_scale(form: ImageForm, wanted: EncoderInput, change: str) -> Finding | None:
    """Return a finding if mean or std are on the scale of stored integers, else None."""
    largest = max(*wanted.mean, *wanted.std)
    if form.type not in RANGES or largest <= 1:
        return None
    return Finding(
        name="range",
        verdict="problem",
        found=f"data.mean {_listed(wanted.mean)} and data.std {_listed(wanted.std)} are not on the "
        f"scale of 0 to 1 on which images of {form.type} are normalised",
        change=change,
    )


def _compare_statistics(found: SampledImages, wanted: EncoderInput) -> Finding:
    mean, std = found.statistics(found.main)
    text = f"mean {_listed(mean)}, std {_listed(std)} of "
    text += f"{count_noun(found.forms[found.main], 'image')} of {found.main}"
    owner = "the recipe has" if wanted.trained is None else f"{wanted.trained} was trained with"
    text += f"; {owner} {_listed(wanted.mean)} and {_listed(wanted.std)}"
    count = min(len(wanted.mean), 3 if len(mean) == 1 else len(mean))
    own_mean, own_std = np.asarray(wanted.mean)[:count], np.asarray(wanted.std)[:count]
    distance = float(np.abs((mean - own_mean) / own_std).max())
    ratios = np.maximum(std, 1e-9) / own_std
    ratio = float(np.maximum(ratios, 1 / ratios).max())
    far = distance > FAR_MEAN or ratio > FAR_STD
    # All images, or 1,000, were measured: a few may differ.
    near = wanted.measured or (distance <= NEAR_MEAN and ratio <= NEAR_STD)
    if near or (wanted.trained is not None and not far):
        return Finding(name="statistics", verdict="ok", found=text)
    return Finding(
        name="statistics",
        verdict="problem" if far and wanted.trained is None else "warning",
        found=text,
        change=advice(found, wanted),
        minor=distance <= LOUD_MEAN and ratio <= LOUD_STD,
    )


def advice(found: SampledImages, wanted: EncoderInput) -> str:
    """Return the settings of channels, mean and std that fit the images together."""
    form = found.main
    if wanted.evaluated:
        return OTHER_IMAGES
    if wanted.trained is not None:
        return (
            "start from an encoder that was pretrained on such images, or from scratch and set "
            f"{settings_for(found)}"
        )
    if wanted.measured:
        return f"set encoder.in_channels to {form.channels}{FOLLOW}"
    keeps = form not in found.refused and form.channels > wanted.channels
    text = f"set {settings_for(found, wanted.channels if keeps else None)}"
    if wanted.streamed:
        return text
    info = "`data-prep info --statistics`" if wanted.measurable else ""
    if len(found.statistics(form)[0]) > LISTED_CHANNELS and not keeps:
        return f"{text}, after {info}" if info else text
    first = f"measure all images with {info} and " if info else ""
    differs = not keeps and form.channels != wanted.channels
    channels = f"encoder.in_channels to {form.channels}, and " if differs else ""
    return f"{text}; or {first}set {channels}data.mean and data.std to measured"


def settings_for(found: SampledImages, channels: int | None = None) -> str:
    """Return `encoder.in_channels`, `data.mean` and `data.std` for images, from their statistics.

    Args:
        found: the images.
        channels: channels that they are decoded to; None are those that they have.
    """
    mean, std = found.statistics(found.main)
    std = np.maximum(std, SMALLEST_STD)
    count = len(mean) if channels is None else channels
    if count > LISTED_CHANNELS:
        return f"encoder.in_channels to {count}, data.mean and data.std to measured"
    return (
        f"encoder.in_channels to {count}, data.mean to {_numbers(mean)} and data.std to "
        f"{_numbers(std)} (those of {count_noun(found.forms[found.main], 'image')})"
    )


def _numbers(values: NDArray[Any]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"


def _listed(values: Sequence[float] | NDArray[Any]) -> str:
    shown = [f"{value:.3g}" for value in values[:5]]
    return "[" + ", ".join(shown) + (", …" if len(values) > 5 else "") + "]"
