"""Tasks on a Ray cluster: a bounded number in flight, retried if a node is lost."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from data_prep.executors.processes import LostWorkerError, TaskQueue, Tick, WorkerError

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
    max_in_flight: int,
    tick: Tick,
    may_start: Callable[[Task], bool] = lambda _: True,
) -> Iterator[Result]:
    """Yield `function(task, tick)` for every task in order of completion, from a Ray cluster.

    Source and destination must be on a file system that all nodes mount at the same paths.

    Args:
        function: a module-level function that is safe to run again.
        tasks: arguments of the calls; the next one is drawn when fewer than `max_in_flight` are in
            flight.
        address: address of the cluster; None starts a local one.
        max_in_flight: maximum number of tasks in flight.
        tick: called after each task with the number of its samples (`found` of its result).
        may_start: see `TaskQueue`.

    Raises:
        MissingRayError: Ray is not installed.
        ValueError, OSError: what `function` raised.
        LostWorkerError: the node of a task was lost repeatedly.
        WorkerError: a task raised something else.
    """
    try:
        import ray  # noqa: PLC0415
    except ImportError:
        raise MissingRayError(
            "--executor ray needs Ray, which is not installed: pip install 'simmim[ray]'."
        ) from None
    started = not ray.is_initialized()
    if started:
        local: dict[str, Any] = {} if address else {"num_cpus": max_in_flight}
        ray.init(
            address=address or "local",
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            **local,
        )
    try:
        yield from _run(ray, function, TaskQueue(tasks, may_start), max_in_flight, tick)
    finally:
        if started:
            ray.shutdown()


def _run(
    ray: Any,
    function: Callable[[Task, Tick], Result],
    tasks: TaskQueue[Task],
    max_in_flight: int,
    tick: Tick,
) -> Iterator[Result]:
    remote = ray.remote(num_cpus=1, max_retries=_MAX_RETRIES)(_call)
    in_flight: list[Any] = []
    while True:
        while len(in_flight) < max_in_flight and (task := list(tasks.next_task())):
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
            message = f"a Ray task failed after {_MAX_RETRIES} retries: {error}"
            raise LostWorkerError(message) from None
        tick(getattr(result, "found", 1))
        yield result


def _call(function: Callable[[Task, Tick], Result], task: Task) -> Result:
    return function(task, lambda _: None)
