"""The architecture that a fine-tuning trains: that of the encoder it starts from.

Trained weights come with their sizes, mean and std, whatever the recipe says. The recipe of a run
records what was trained, so what the recipe said before is replaced here, in one place.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from data_prep.channels import describe
from simmim.data.settings import IMAGENET_MEAN, MEASURED
from simmim.engine.checkpoint.adapting import ChannelChange, find_change
from simmim.engine.checkpoint.directory import read_best
from simmim.recipe import differences, to_values
from simmim.tasks.measured import with_measured
from simmim.tasks.other_encoder import other_class
from simmim.tasks.pretrained import find_weights
from simmim.tasks.recipe import OF_VARIANT, EncoderSettings, FineTuningRecipe, TaskRecipe
from swinv2.config import SwinV2Config, VideoConfig, variant_config
from swinv2.config_file import (
    EncoderDescription,
    is_video_encoder,
    read_encoder_config,
    read_video_config,
)

RecipeT = TypeVar("RecipeT", bound=FineTuningRecipe)


def describe_directory(path: Path) -> EncoderDescription:
    """Read the `config.json` of an encoder directory, of images or of clips."""
    return read_video_config(path) if is_video_encoder(path) else read_encoder_config(path)


def resolve_architecture(recipe: RecipeT) -> RecipeT:
    """Return the recipe with the architecture, mean and std that it trains.

    They come from the encoder that `init` names or, for random weights, `like`. Image size, window
    and drop path stay the recipe's.

    Raises:
        ValueError: there is no such encoder, or it does not fit the recipe.
    """
    source = recipe.architecture_source
    if source is None:
        return recipe
    description = describe_directory(find_weights(source).encoder)
    recipe.training.optimizer.check_freeze(len(description.config.depths))
    data, count = recipe.data, description.config.in_channels
    change = find_change(
        description.channels,
        data.wanted_channels,
        recipe.encoder.adapt_channels,
        source=f"the encoder of {source}",
        count=count,
    )
    mean, std = description.mean, description.std
    if change is not None:
        given = _given_statistics(recipe, change)
        mean, std = change.mix(mean, given[0]), change.mix(std, given[1])
        count = len(change.want)
    channels = data.wanted_channels or description.channels
    try:
        return replace(
            recipe,
            encoder=replace(settings_of(recipe.encoder, description.config), in_channels=count),
            data=replace(data, mean=mean, std=std, channels=channels),
            like=None,
        )
    except ValueError as error:
        raise ValueError(f"the encoder of {source} does not fit the recipe: {error}") from None


def _given_statistics(
    recipe: FineTuningRecipe, change: ChannelChange
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the recipe's mean and std of each channel, those of shared ones being of no concern.

    Raises:
        ValueError: there are new channels, and none are given or measured.
    """
    data, count = recipe.data, len(change.want)
    unused = ((0.0,) * count, (1.0,) * count)
    if not change.new:
        return unused
    if MEASURED in (data.mean, data.std):
        encoder = replace(recipe.encoder, in_channels=count)
        data = with_measured(replace(recipe, encoder=encoder)).data
    mean, std = data.normalisation
    if len(mean) != count or mean == IMAGENET_MEAN:
        measured = ", or set both to measured" if data.MEASURABLE else ""
        raise ValueError(
            f"{', '.join(change.new)} {'is' if len(change.new) == 1 else 'are'} new to the trained "
            f"weights, so mean and std are not known: give data.mean and data.std of "
            f"{describe(change.want)}, one number each, of which those of new channels count"
            f"{measured}."
        )
    return mean, std


def settings_of(wanted: EncoderSettings, config: SwinV2Config) -> EncoderSettings:
    """Return encoder settings with the architecture of a config; see `resolve_architecture`."""
    variant = config.variant or wanted.variant
    published = variant_config(variant)
    values: dict[str, Any] = {
        "variant": variant,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
    }
    rows, columns = config.window_size
    if wanted.window_size is None and rows == columns:  # else load_encoder takes both
        values["window_size"] = rows
    for name in OF_VARIANT:
        value, usual = getattr(config, name), getattr(published, name)
        as_given = variant == wanted.variant and getattr(wanted, name) == value
        values[name] = value if as_given or value != usual else None
    if isinstance(config, VideoConfig):
        values["frame_patch"] = config.frame_patch
    known = {field.name for field in fields(wanted)}
    return replace(wanted, **{name: value for name, value in values.items() if name in known})


def describe_start(recipe: TaskRecipe) -> str | None:
    """Return a line if the exported encoder of the run that a recipe starts from is not its best.

    Runs of earlier versions exported their last step.
    """
    source = recipe.init_directory
    if source is None:
        return None
    if any(other_class(path) for path in (Path(source), Path(source) / "encoder")):
        return None  # of an encoder that keeps no best
    encoder = find_weights(source).encoder
    run = next((path for path in (encoder.parent, encoder) if read_best(path)), encoder.parent)
    best, step = read_best(run), describe_directory(encoder).provenance.step
    if best is None or step is None or step == best.step:
        return None
    return (
        f"WARNING: {encoder} is of step {step:,} of its run, and the best is step {best.step:,} "
        f"({best.metric} {best.value:.4f}): to start from that, export it with `simmim export "
        f"{run} FOLDER` and set init to FOLDER."
    )


def overridden(given: TaskRecipe, trained: TaskRecipe) -> str | None:
    """Return a line on the settings of a recipe that the encoder overrides; None if there are none.

    Args:
        given: the recipe as it was given.
        trained: the recipe with the architecture that is trained.
    """
    source = given.architecture_source
    if source is None:
        return None
    found = differences(_with_sizes(given), _with_sizes(trained))
    described = given.encoder.window_size is not None  # else nothing is said that is overridden
    listed = [
        f"{key} {text}"
        for key, text in found.items()
        if (key.startswith("encoder.") and described) or key in ("data.mean", "data.std")
    ]
    if not listed:
        return None
    return f"the encoder of {source} overrides the recipe: {', '.join(listed)}"


def _with_sizes(recipe: TaskRecipe) -> dict[str, Any]:
    """Return a recipe's values with the sizes of its variant where it leaves them to that."""
    values = to_values(recipe)
    published = variant_config(recipe.encoder.variant)
    for name in OF_VARIANT:
        if values["encoder"][name] is None:
            size = getattr(published, name)
            values["encoder"][name] = list(size) if isinstance(size, tuple) else size
    return values
