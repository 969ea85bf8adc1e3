"""Tasks on a Ray cluster: a bounded number in flight, and tried again when a node is lost."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from data_prep.executors.processes import TaskQueue, Tick, WorkerError

Task = TypeVar("Task")
Result = TypeVar("Result")

_MAX_RETRIES = 3


class MissingRayError(ValueError):
    """Ray is not installed."""


def map_on_ray(
    function: Callable[[Task, Tick], Result],
    tasks: Iterator[Task],
    *,
    address: str | None,
    at_once: int,
    tick: Callable[[int], object],
    may_start: Callable[[Task], bool] = lambda _: True,
) -> Iterator[Result]:
    """Yield `function(task, tick)` of every task, as they are done, from a Ray cluster.

    Source and destination must be on a file system that all nodes see at the same paths.

    Args:
        function: what to do; a module-level function that may be run again.
        tasks: its arguments; each is drawn only when fewer than `at_once` are in flight.
        address: address of the cluster; None starts one on this machine.
        at_once: most tasks in flight.
        tick: called with the number of samples of each task that is done, if its result counts
            them in `found`.
        may_start: see `TaskQueue`.

    Raises:
        MissingRayError: Ray is not installed.
        ValueError, OSError: what `function` raised.
        WorkerError: a task failed in another way, or its node was lost again and again.
    """
    try:
        import ray  # noqa: PLC0415
    except ImportError:
        raise MissingRayError(
            "--executor ray needs Ray, which is missing: pip install 'simmim[ray]'"
        ) from None
    started = not ray.is_initialized()
    if started:
        local: dict[str, Any] = {} if address else {"num_cpus": at_once}
        ray.init(
            address=address or "local",
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            **local,
        )
    try:
        yield from _run(ray, function, TaskQueue(tasks, may_start), at_once, tick)
    finally:
        if started:
            ray.shutdown()


def _run(
    ray: Any,
    function: Callable[[Task, Tick], Result],
    tasks: TaskQueue[Task],
    at_once: int,
    tick: Callable[[int], object],
) -> Iterator[Result]:
    remote = ray.remote(num_cpus=1, max_retries=_MAX_RETRIES)(_call)
    in_flight: list[Any] = []
    while True:
        while len(in_flight) < at_once and (task := list(tasks.draw())):
            in_flight.append(remote.remote(function, task[0]))
        if not in_flight:
            return
        done, in_flight = ray.wait(in_flight, num_returns=1)
        try:
            result = ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, (ValueError, OSError)):
                raise cause from None
            raise WorkerError(str(error)) from None
        except ray.exceptions.RayError as error:
            raise WorkerError(f"a task on Ray was lost {_MAX_RETRIES} times: {error}") from None
        tick(getattr(result, "found", 1))
        yield result


def _call(function: Callable[[Task, Tick], Result], task: Task) -> Result:
    return function(task, lambda _: None)
