"""Data workers that the system does not allow, or has killed, usually because memory ran out."""

import errno
import multiprocessing
import sys
from contextlib import suppress

ADVICE = (
    "usually the machine or its container ran out of memory. Lower data.workers or the batch size, "
    "or give the job more memory"
)
SHARED = (
    "the shared memory (/dev/shm) is full. Make it larger, for example with --shm-size for a "
    "container, or lower data.workers"
)
CRASH = (
    "a crash in native code, for example in an image decoder; data.workers 0 shows where it happens"
)

_WORKER = "DataLoader worker"
_IN_WORKER = f"in {_WORKER} process"
_NO_MEMORY = ("MemoryError", "can't allocate memory", "Cannot allocate memory")


class WorkerLostError(RuntimeError):
    """A data worker was killed or has crashed; the same command may succeed when repeated."""


def lost_worker(error: BaseException) -> WorkerLostError | None:
    """Return what an error says about a lost data worker, None if it is another error.

    torch raises a RuntimeError wherever the main thread happens to be when a worker is killed, and
    passes on what a worker raised. Reading from a worker that is gone raises the errors of pipes.
    """
    if isinstance(error, WorkerLostError):
        return error
    text = str(error).strip().rstrip(".")
    if _IN_WORKER in text:
        if not any(word in text for word in _NO_MEMORY):
            return None
        return WorkerLostError(f"a data worker could not allocate memory: {ADVICE}.")
    if isinstance(error, RuntimeError) and _WORKER in text:
        first = text.splitlines()[0].rstrip(". ")
        return WorkerLostError(f"a data worker was lost: {first}; {_reason(text)}.")
    if isinstance(error, EOFError | ConnectionError | FileNotFoundError):
        return WorkerLostError(
            f"a data worker was lost ({text or type(error).__name__}); {ADVICE}."
        )
    return None


def usable_workers(workers: int) -> int:
    """Return the number of workers that can be started: all, or 0 with a warning.

    Their queues need semaphores, which Linux keeps in /dev/shm; it may be read-only or full. The
    batches are the same without workers.
    """
    try:
        held = [multiprocessing.Lock() for _ in range(_SEMAPHORES + _PER_WORKER * workers)]
    except OSError as error:
        if error.errno in _WARNED:
            return 0
        _WARNED.add(error.errno)
        with suppress(OSError):
            sys.stderr.write(
                f"\nWARNING: no data workers can be started ({error.strerror} in /dev/shm), so the "
                "main process reads the data, which is slower. Make /dev/shm writable and larger, "
                "for example with --shm-size for a container.\n"
            )
        return 0
    del held
    return workers


_SEMAPHORES, _PER_WORKER = 20, 4
"""Semaphores of a loader, and of each worker, rounded up."""
_WARNED: set[int | None] = set()


def unstartable_workers(error: OSError) -> WorkerLostError | None:
    """Return the error for workers that cannot be started for lack of memory, None for others."""
    if error.errno not in (errno.ENOMEM, errno.EAGAIN):
        return None
    return WorkerLostError(f"data workers cannot be started ({error.strerror}); {ADVICE}.")


def _reason(text: str) -> str:
    if "Bus error" in text:
        return SHARED
    if any(signal in text for signal in ("Segmentation fault", "Aborted", "Illegal instruction")):
        return CRASH
    return ADVICE
