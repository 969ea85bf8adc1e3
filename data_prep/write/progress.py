"""What is told of shards while they are written."""

from collections.abc import Callable
from dataclasses import dataclass

from data_prep.format.index import Tick
from data_prep.write.shard import ShardReport


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is about to be done, for a person to see."""

    found: int | None
    """Images found; None where they are still being listed."""
    done: int
    """Images that an interrupted run has done."""
    classes: int
    """Classes among them."""
    shards: int | None
    """Shards to be written here, those already finished included; None as for `found`."""
    finished: int
    """Shards that an interrupted run finished."""
    workers: int
    """Processes that write."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Who is told how far the work is; the defaults tell nobody."""

    listed: Tick = lambda _: None
    """Called with the number of images found, now and then while they are listed."""
    planned: Callable[[Plan], None] = lambda _: None
    """Called once before anything is written."""
    counted: Tick = lambda _: None
    """Called with the images to be written here, once the listing that went on meanwhile ends."""
    tick: Tick = lambda _: None
    """Called with the number of samples done since the last call."""
    finished: Callable[[ShardReport], None] = lambda _: None
    """Called with every shard that is finished."""
    uploaded: Callable[[int, int], object] = lambda _, __: None
    """Called with the shards that are uploaded, and the bytes that went out; often meanwhile."""
