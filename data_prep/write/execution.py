"""How shards are written: where, how many at once, and which of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_prep.executors.processes import Tick, map_tasks
from data_prep.executors.ray_cluster import map_on_ray
from data_prep.write.shard import ShardReport, ShardTask, write_shard


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the work is done; what is written does not depend on it."""

    workers: int = 1
    """Processes that write, on this machine or, at most, on the cluster."""
    ray: bool = False
    """Whether shards are written on a Ray cluster."""
    address: str | None = None
    """Address of the Ray cluster; None starts one on this machine."""
    part: tuple[int, int] | None = None
    """Which part of how many is written here, counted from 1; None writes all."""
    max_rejected: float = 1.0
    """Largest share of images that may be rejected."""

    def __post_init__(self) -> None:
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise ValueError(f"--part must be from 1/n to n/n, got {self.part[0]}/{self.part[1]}.")
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"--max-rejected must be from 0 to 1, got {self.max_rejected}.")

    def writes(self, number: int) -> bool:
        """Tell whether the shard of that number is written here."""
        part, parts = self.part or (1, 1)
        return number % parts == part - 1


def map_shards(
    execution: Execution,
    tasks: Iterator[ShardTask],
    tick: Tick,
    may_start: Callable[[ShardTask], bool] = lambda _: True,
) -> Iterator[ShardReport]:
    """Write shards and yield their reports, as they are done.

    Raises:
        ValueError, OSError, WorkerError: as `map_tasks` and `map_on_ray`.
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
    planned: Callable[[PlanSummary], None] = lambda _: None
    """Called once before anything is written."""
    counted: Tick = lambda _: None
    """Called with the images to be written here, once the listing that went on meanwhile ends."""
    tick: Tick = lambda _: None
    """Called with the number of samples done since the last call."""
    finished: Callable[[ShardReport], None] = lambda _: None
    """Called with every shard that is finished."""
    uploaded: Callable[[int, int], object] = lambda _, __: None
    """Called with the shards that are uploaded, and the bytes that went out; often meanwhile."""
