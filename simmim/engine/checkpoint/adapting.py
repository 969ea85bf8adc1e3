"""Weights of trained channels for images of other channels, matched by name."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.channels import (
    PICTURES,
    AdaptRule,
    ChannelNames,
    channel_sources,
    describe,
    read_names,
)

PATCH_WEIGHT = "patch_embed.projection.weight"
"""Name of the one weight of a SwinV2 that depends on the channels of images: (width, channels of a
patch, rows, columns)."""


@dataclass(frozen=True, kw_only=True)
class ChannelChange:
    """From which channels of trained weights those of other images start."""

    have: ChannelNames
    """Channels of the trained weights."""
    want: ChannelNames
    """Channels of the images."""
    rule: AdaptRule | None
    """Rule for channels that the weights do not have; None if there is none."""

    @property
    def shared(self) -> list[str]:
        """Channels that keep their weights."""
        return [name for name in self.want if name in self.have]

    @property
    def new(self) -> list[str]:
        """Channels that start by the rule."""
        return [name for name in self.want if name not in self.have]

    @property
    def left_out(self) -> list[str]:
        """Channels of the weights that are not used."""
        return [name for name in self.have if name not in self.want]

    @property
    def sources(self) -> tuple[tuple[int, ...], ...]:
        """Channels of the weights whose mean each channel starts from; see `channel_sources`."""
        return channel_sources(self.have, self.want, self.rule or "zero")

    def __str__(self) -> str:
        parts = [
            f"{', '.join(names)} {text}"
            for names, text in (
                (self.shared, "keep their weights"),
                (self.new, f"start from {_START[self.rule or 'zero']}"),
                (self.left_out, "left out"),
            )
            if names
        ]
        return f"channels {describe(self.have)} adapted to {describe(self.want)}: " + "; ".join(
            parts
        )

    def apply(self, weight: Tensor) -> Tensor:
        """Return patch weights for the images: (width, len(want), ...).

        Args:
            weight: trained patch weights, (width, len(have), ...).
        """
        columns = [
            weight[:, list(places)].mean(dim=1) if places else torch.zeros_like(weight[:, 0])
            for places in self.sources
        ]
        return torch.stack(columns, dim=1)

    def mix(self, trained: Sequence[float], given: Sequence[float]) -> tuple[float, ...]:
        """Return one number per channel: the trained of shared channels, the given of new ones."""
        return tuple(
            trained[self.have.index(name)] if name in self.have else given[place]
            for place, name in enumerate(self.want)
        )


_START = {
    "repeat": "those of the trained channels in turn",
    "average": "the mean of the trained channels",
    "zero": "zeros",
}


def find_change(
    have: ChannelNames | None,
    want: ChannelNames | None,
    rule: AdaptRule | None,
    *,
    source: object,
    count: int,
) -> ChannelChange | None:
    """Return how trained weights are adapted to the channels of images; None if they fit.

    Args:
        have: channels of the weights; None if they are not known.
        want: channels of the images; None if they are not known.
        rule: `encoder.adapt_channels`.
        source: the weights, for messages.
        count: number of channels of the weights.

    Raises:
        ValueError: channels differ, and no rule is given or the weights do not name theirs.
    """
    if want is None or have == want:
        return None
    if have is None:
        if len(want) == count:  # by their number, which is said where images are compared
            return None
        raise ValueError(
            f"{source} has weights for {count} channels without names, and data.channels are "
            f"{describe(want)}: start from weights that name their channels, or of as many."
        )
    change = ChannelChange(have=have, want=want, rule=rule)
    if rule is None and (change.new or change.left_out):
        shared = ", ".join(change.shared) or "none"
        parts = [f"shared: {shared}"]
        parts += [f"new: {', '.join(change.new)}"] if change.new else []
        parts += [f"left out: {', '.join(change.left_out)}"] if change.left_out else []
        raise ValueError(
            f"{source} takes channels {describe(have)}, and data.channels are {describe(want)} "
            f"({'; '.join(parts)}). Say what new channels start from: set encoder.adapt_channels "
            "to repeat, average or zero."
        )
    if rule == "zero" and not change.shared:
        raise ValueError(
            f"{source} takes channels {describe(have)}, and data.channels are {describe(want)}: "
            "none is shared, so encoder.adapt_channels zero would leave no weights. Set it to "
            "repeat or average."
        )
    return change


def trained_channels(values: Mapping[str, Any]) -> ChannelNames | None:
    """Return the names of the channels of a run, by the values of its recipe.

    Recipes of earlier versions have none: grey and colour were meant by their number.
    """
    if "channels" in values["data"]:
        names = values["data"]["channels"]
        return None if names is None else read_names(names)
    return _implied(values.get("encoder", {}).get("in_channels", 3))


def described_channels(folder: Path) -> ChannelNames | None:
    """Return the names of the channels in the `config.json` of an encoder directory, if any.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if "channels" in values:
            names = values["channels"]
            return None if names is None else read_names(names)
        return _implied(values["config"]["in_channels"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): export the encoder again.") from None


def _implied(count: int) -> ChannelNames | None:
    return PICTURES[count] if count in (1, 3) else None
