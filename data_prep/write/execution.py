"""Execution of the work: processes or Ray, parts, and progress callbacks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_prep.executors.processes import Tick, map_tasks
from data_prep.executors.ray_cluster import map_on_ray
from data_prep.write.shard import ShardReport, ShardTask, write_shard


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the work is done; the bytes written do not depend on it."""

    workers: int = 1
    """Number of worker processes, or maximum number of tasks on the cluster."""
    ray: bool = False
    """Whether to use a Ray cluster."""
    address: str | None = None
    """Address of the Ray cluster; None: start a local one."""
    part: tuple[int, int] | None = None
    """(part, number of parts) to write, counted from 1; None: all."""
    max_rejected: float = 1.0
    """Largest fraction of images that may be rejected, 0 to 1."""

    def __post_init__(self) -> None:
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise ValueError(f"--part must be 1/N to N/N, got {self.part[0]}/{self.part[1]}.")
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"--max-rejected must be 0 to 1, got {self.max_rejected}.")

    def writes(self, number: int) -> bool:
        """Return whether this run writes the shard of that number."""
        part, parts = self.part or (1, 1)
        return number % parts == part - 1


def map_shards(
    execution: Execution,
    tasks: Iterator[ShardTask],
    tick: Tick,
    may_start: Callable[[ShardTask], bool] = lambda _: True,
) -> Iterator[ShardReport]:
    """Write shards and yield their reports in order of completion.

    Raises:
        ValueError, OSError, WorkerError: see `map_tasks` and `map_on_ray`.
    """
    if execution.ray:
        return map_on_ray(
            write_shard,
            tasks,
            address=execution.address,
            max_in_flight=execution.workers,
            tick=tick,
            may_start=may_start,
        )
    return map_tasks(write_shard, tasks, workers=execution.workers, tick=tick, may_start=may_start)


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
