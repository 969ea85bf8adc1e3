"""Progress of writing a set, reported through callbacks."""

from collections.abc import Callable
from dataclasses import dataclass

from data_prep.executors.processes import Tick
from data_prep.write.shard import ShardReport


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """The work ahead, for display."""

    found: int | None
    """Images found; None while they are still being listed."""
    done: int
    """Images done by an interrupted run."""
    classes: int
    """Number of classes."""
    shards: int | None
    """Shards of this run, including finished ones; None like `found`."""
    finished: int
    """Shards finished by an interrupted run."""
    workers: int
    """Number of worker processes."""
    labels: str = ""
    """Where the labels of a list come from, and what is doubtful of classes of folders."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress callbacks; the defaults do nothing."""

    listed: Tick = lambda _: None
    """Called regularly during listing with the number of images found so far."""
    planned: Callable[[PlanSummary], None] = lambda _: None
    """Called once before anything is written."""
    counted: Tick = lambda _: None
    """Called with the number of images of this run when a streamed listing ends."""
    tick: Tick = lambda _: None
    """Called with the number of samples done since the last call."""
    finished: Callable[[ShardReport], None] = lambda _: None
    """Called with the report of every finished shard."""
    uploaded: Callable[[int, int], object] = lambda _, __: None
    """Called regularly during uploads with the shards uploaded and the bytes sent so far."""
