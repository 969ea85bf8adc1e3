"""The channels that a training takes, matched by name with those of its images and its weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from data_prep.channels import (
    PICTURES,
    RGB,
    ChannelNames,
    are_pictures,
    compare_names,
    describe,
)
from data_prep.format.text import count_noun
from simmim.data.datasets.clips import ClipSet
from simmim.data.datasets.mixture import MixedShards, StreamedShards
from simmim.data.datasets.shards import ShardSet
from simmim.data.order.source import BadSampleError, DataError, SampleSource
from simmim.data.settings import IMAGENET_MEAN, IMAGENET_STD
from simmim.data.transforms.decoding import names_of
from simmim.data.transforms.settings import DecodeSettings
from simmim.environment import print_on_main

RecipeT = TypeVar("RecipeT")

FILES_LOOKED_AT = 8
"""Files of a folder whose names are compared before training starts; workers compare all."""

_said: set[str] = set()


def with_channels(
    recipe: RecipeT,
    sources: Mapping[str, SampleSource[Any] | None],
    *,
    asked: bool,
    trained: str | None = None,
) -> RecipeT:
    """Return a recipe that names the channels it takes, once all images have proved to have them.

    Without names in the recipe they are those of the first set that has some.

    Args:
        recipe: a recipe whose `data.channels` are those of the trained weights, if there are any.
        sources: the images of the training, by what they are.
        asked: whether the user has named the channels, so that others are left out and reordered;
            otherwise such images are refused.
        trained: the trained weights, for messages; None for random ones.

    Raises:
        ValueError: images lack a channel, or have others or another order though none are asked
            for; the message has both lists and the remedy.
    """
    task: Any = recipe
    data: DecodeSettings = task.data
    count = task.encoder.in_channels
    found = [
        (where, names)
        for name, source in sources.items()
        if source is not None
        for where, names in _names_of_sets(name, source, data)
    ]
    wanted, owner = data.wanted_channels, f"{trained} takes" if trained else "data.channels are"
    if wanted is not None and len(wanted) != count:
        raise ValueError(
            f"data.channels names {count_noun(len(wanted), 'channel')}, {describe(wanted)}, and "
            f"encoder.in_channels is {count}: set it to {len(wanted)}, or name {count}."
        )
    if wanted is None:
        first = next(((where, names) for where, names in found if names is not None), None)
        if first is None:
            return recipe
        owner = f"{first[0]} has"
        wanted = first[1]
        if are_pictures(wanted):  # decoders convert them to the channels of the encoder
            wanted = PICTURES.get(count, wanted)
        if len(wanted) != count:  # refused by their number, with the settings that fit
            return recipe
    for where, names in found:
        _compare(where, names, wanted, owner, asked=asked, weights="adaptable" if trained else None)
    changes: dict[str, Any] = {"channels": wanted}
    given = (task.data.mean, task.data.std)
    imagenet = trained is None and given == (IMAGENET_MEAN, IMAGENET_STD)
    if imagenet and wanted != RGB and set(wanted) == set(RGB):
        mean, std = (tuple(one[RGB.index(name)] for name in wanted) for one in given)
        changes |= {"mean": mean, "std": std}
        say_once(f"data.mean and data.std are ImageNet's, in the order {describe(wanted)}")
    named: RecipeT = replace(task, data=replace(task.data, **changes))
    return named


def check_channels(
    sources: Mapping[str, SampleSource[Any] | None],
    data: DecodeSettings,
    wanted: ChannelNames | None,
    *,
    asked: bool,
    trained: str,
) -> None:
    """Compare the channels of images with those of trained weights that are not trained further.

    Args:
        sources: the images, by what they are.
        data: how they are read.
        wanted: channels of the weights; None if they are not known.
        asked: see `with_channels`.
        trained: the weights, for messages.

    Raises:
        ValueError: see `with_channels`.
    """
    for name, source in sources.items():
        if source is None or wanted is None:
            continue
        for where, names in _names_of_sets(name, source, data):
            _compare(where, names, wanted, f"{trained} takes", asked=asked, weights="fixed")


def _compare(
    where: str,
    names: ChannelNames | None,
    wanted: ChannelNames,
    owner: str,
    *,
    asked: bool,
    weights: Literal["adaptable", "fixed"] | None,
) -> None:
    """Raise ValueError if images have other channels than those wanted, or say how they match.

    Args:
        where: the images, for messages.
        names: their channels; None if they are not known.
        wanted: the channels wanted.
        owner: what wants them, for messages.
        asked: see `with_channels`.
        weights: whether those are the channels of weights, which may be adapted or not.
    """
    if names is None:
        say_once(f"{where} does not name its channels: they are taken as {describe(wanted)}")
        return
    if names == wanted or are_pictures(names, wanted):
        return
    difference = compare_names(names, wanted)
    has = set(names) | (set(PICTURES[3]) if are_pictures(names) else set())
    adapt = (
        f", or adapt the weights by name: set data.channels to {describe(names)} and "
        "encoder.adapt_channels to repeat, average or zero"
    )
    if set(wanted) <= has:
        if asked:
            say_once(
                f"{where} has channels {describe(names)}: {describe(wanted)} are taken by name"
            )
            return
        remedy = f"set data.channels to {describe(wanted)} to take them by name"
        remedy += adapt if weights == "adaptable" and len(names) > len(wanted) else ""
    else:
        remedy = "give images that have them"
        if weights == "adaptable":
            remedy += adapt
        elif weights is None and set(names) & set(wanted):
            shared = [name for name in wanted if name in names]
            remedy += f", or set data.channels to those of both, {describe(shared)}"
    raise ValueError(
        f"{where} has channels {describe(names)}, and {owner} {describe(wanted)}: {difference}; "
        f"{remedy}."
    )


def _names_of_sets(
    name: str, source: SampleSource[Any], data: DecodeSettings
) -> Iterator[tuple[str, ChannelNames | None]]:
    """Yield what each dataset of a source is called in messages, and the names of its channels."""
    sets: Sequence[SampleSource[Any]] = (source,)
    if isinstance(source, MixedShards | StreamedShards):
        sets = source.sets if isinstance(source, MixedShards) else source.parts
    for one in sets:
        if isinstance(one, ClipSet) or not one.samples:
            continue
        where = f"{name} ({one.folder_of(0)})"
        if isinstance(one, ShardSet) and one.channels is not None:
            yield where, one.channels
        else:
            yield where, _told(where, one, data)


def _told(where: str, source: SampleSource[Any], data: DecodeSettings) -> ChannelNames | None:
    """Return the names given in a few files; None if they have none, or cannot be read.

    Raises:
        ValueError: some have other names.
    """
    found: dict[ChannelNames | None, str] = {}
    for place in source.spread(1 if isinstance(source, ShardSet) else FILES_LOOKED_AT):
        try:
            raw = source.read(*place)
            names = names_of(raw, raw.image, data)
        except BadSampleError:
            continue
        except DataError:  # training will retry it, and report it
            return None
        if names is not None and are_pictures(names):
            names = PICTURES[3]
        found.setdefault(names, raw.name)
    if len(found) < 2:
        return next(iter(found), None)
    if data.channels is not None:
        return next(names for names in found if names is not None)
    listed = "; ".join(f"{describe(names)} (such as {name})" for names, name in found.items())
    raise ValueError(
        f"{where} has files of different channels: {listed}. Name those to take by data.channels."
    )


def say_once(text: str) -> None:
    """Print a line once: a stage may be built several times."""
    if text not in _said:
        _said.add(text)
        print_on_main(text)
