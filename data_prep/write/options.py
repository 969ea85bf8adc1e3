"""Options of writing a set: contents of the shards, and execution of the work."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from cyclopts import Token

from data_prep.bounds import Bounds, Count, Probability, Rate, Seed, check_bounds
from data_prep.channels import ChannelNames, read_names
from data_prep.format.command_line import FLAT, PASSED, shown_as
from data_prep.images.settings import MAX_PIXELS, Encoding
from data_prep.sources.files import Selection

ChannelAxis = Literal["auto", "first", "last"]


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Options that, with the input, determine the bytes of the shards.

    They are the options of `data-prep shard`, where the fields are documented as there.
    """

    samples_per_shard: Count | None = None
    """Maximum samples per shard. Default: 10,000, fewer if > 256 MiB or < 8 shards."""
    bytes_per_shard: Count | None = None
    """Maximum source bytes per shard; a larger image has its own."""
    selection: Annotated[Selection, FLAT] = field(default_factory=Selection)
    """Files to use."""
    seed: Seed = 0
    """Seed of shuffle and validation."""
    shuffle: bool = True
    """Shuffle the samples, or keep the order of the source (folders: by path)."""
    shuffle_window: Count | None = None
    """Files per window of the shuffle. Default: all, listed first."""
    validation_fraction: Rate = 0.0
    """Fraction of samples for validation, chosen by path and seed, in the last shards."""
    deduplicate: bool = False
    """Of files with identical bytes, keep the one with the smallest path."""
    near_duplicates: Annotated[int, Bounds(ge=0, le=16)] | None = None
    """Drop images whose 64-bit perceptual hash differs from another's in at most this many bits."""
    check: bool = True
    """Decode every image; --no-check reads the headers only."""
    max_pixels: Count = MAX_PIXELS
    """Reject images with more pixels."""
    encoding: Annotated[Encoding, FLAT] = field(default_factory=Encoding)
    """Size and format of stored pictures."""
    channels: Annotated[str | None, shown_as("NAME,...")] = None
    """Names of the channels in stored order, as in B2,B3,B4,B8,B12 (Sentinel-2's) or red,nir.
    Default: those given in the files."""
    no_data: float | None = None
    """No-data value of arrays, excluded from statistics. Default: GDAL's tag."""
    channel_axis: Annotated[ChannelAxis, PASSED] = "auto"
    """Axis of the channels of arrays: first, last, or auto, which recognises few channels before
    rows and columns. Shards hold them last."""

    def __post_init__(self) -> None:
        check_bounds(self, "--")
        if self.channels is not None:
            read_names(self.channels)
        if self.no_data is not None and not math.isfinite(self.no_data):
            raise ValueError("--no-data must be a number; NaN is always left out.")
        if self.channel_axis not in ("auto", "first", "last"):
            raise ValueError(f"channel_axis is auto, first or last, got {self.channel_axis!r}.")

    @property
    def channel_names(self) -> ChannelNames | None:
        """Names of the channels, if they are given."""
        return None if self.channels is None else read_names(self.channels)

    @property
    def window(self) -> int | None:
        """Size of the window, in files in source order, in which files may move; None: all."""
        return self.shuffle_window if self.shuffle else 1

    @property
    def streams(self) -> bool:
        """Whether shards can be cut while the rest of the source is still being listed."""
        return self.window is not None and not self.deduplicate and self.near_duplicates is None

    def values(self) -> dict[str, Any]:
        """Return the options as plain values, for the manifest."""
        values: dict[str, Any] = asdict(self)
        selection: dict[str, Any] = values.pop("selection")
        for name in ("root", "path_column", "label_column", "allow_missing_end"):
            del selection[name]  # the fingerprint covers the files and labels they lead to
        encoding: dict[str, Any] = values.pop("encoding")
        if values["channel_axis"] == "auto":
            del values["channel_axis"]  # as in the manifests of earlier versions
        for name in ("channels", "no_data"):
            if values[name] is None:
                del values[name]  # as in the manifests of earlier versions
        if self.channel_names is not None:
            values["channels"] = list(self.channel_names)
        lists = {name: list(selection[name]) for name in ("include", "exclude")}
        return {**values, **encoding, **selection, **lists}


def parse_part(type_: object, tokens: Sequence[Token]) -> tuple[int, int]:
    """Parse `I/N`, the part of `--part`."""
    del type_
    text = tokens[-1].value
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"{text!r} is not from 1/N to N/N.")
    return int(match[1]), int(match[2])


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How the work is done; the bytes written do not depend on it."""

    workers: Count = 1
    """Number of worker processes, or maximum number of tasks on the cluster."""
    executor: Literal["processes", "ray"] = "processes"
    """Write shards in local processes or on a Ray cluster."""
    address: str | None = None
    """Address of the Ray cluster. Default: start a local one."""
    part: Annotated[tuple[int, int] | None, shown_as("I/N", converter=parse_part, n_tokens=1)] = (
        None
    )
    """Write only this part, 1/N to N/N; finish with `data-prep merge`."""
    max_rejected: Probability = 1.0
    """Fail if a larger fraction of images is rejected (duplicates not counted)."""

    def __post_init__(self) -> None:
        check_bounds(self, "--")
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise ValueError(f"--part must be 1/N to N/N, got {self.part[0]}/{self.part[1]}.")

    def writes(self, number: int) -> bool:
        """Return whether this run writes the shard of that number."""
        part, parts = self.part or (1, 1)
        return number % parts == part - 1
