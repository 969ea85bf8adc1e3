"""How shards are written: where, how many at once, and which of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_prep.executors.processes import map_tasks
from data_prep.executors.ray_cluster import map_on_ray
from data_prep.format.index import Tick
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
    may_begin: Callable[[ShardTask], bool] = lambda _: True,
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
            at_once=execution.workers,
            tick=tick,
            may_begin=may_begin,
        )
    return map_tasks(write_shard, tasks, workers=execution.workers, tick=tick, may_begin=may_begin)
