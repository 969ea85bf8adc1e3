"""Shared memory through which data workers pass images to the main process.

A pipe transfers megabytes in chunks of 64 KiB, with a context switch each, and copies them five
times; here they are written once and read once. The memory is mapped once for all batches, so that
pages are not cleared for each, and is not in /dev/shm, which is small in containers.
"""

import itertools
import math
import mmap
import os
from dataclasses import dataclass
from multiprocessing import reduction
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from simmim.data.loader.batch import Batch, unpack_batch


@dataclass(frozen=True)
class BufferedArray:
    """Reference to an array in a buffer."""

    buffers: int
    """Number of the `BatchBuffers` in the main process."""
    worker: int
    filled: int
    """Number of buffers the worker has filled before."""
    dtype: str
    shape: tuple[int, ...]


BUFFER_BYTES = 256 * 2**20
"""Size of a buffer, of which only used pages take memory; larger batches go through the pipe."""

_numbers = itertools.count()
_open: "WeakValueDictionary[int, BatchBuffers]" = WeakValueDictionary()


class BatchBuffers:
    """A few buffers per worker, which it fills in turn.

    Args:
        workers: number of worker processes.
        each: buffers per worker; further pending batches go through the pipe.

    Raises:
        OSError: the system does not provide the memory.
    """

    def __init__(self, workers: int, each: int) -> None:
        self.workers, self.each = workers, each
        self.number = next(_numbers)
        self.filled = 0
        """Number of buffers filled by this process, if it is a worker."""
        file = os.memfd_create("batches")
        try:
            os.ftruncate(file, mmap.PAGESIZE * workers + BUFFER_BYTES * workers * each)
            self._map(file)
        except BaseException:
            os.close(file)
            raise
        _open[self.number] = self

    def _map(self, file: int) -> None:
        self.memory = mmap.mmap(file, 0)
        self.file = file
        # Number of buffers taken from each worker, each on its own page.
        pages = mmap.PAGESIZE * self.workers
        self.taken = np.frombuffer(self.memory, np.int64, pages // 8)[:: mmap.PAGESIZE // 8]

    def __getstate__(self) -> dict[str, Any]:
        """Pickle for a worker that was not forked."""
        state = dict(self.__dict__)
        del state["memory"], state["taken"]
        return state | {"file": reduction.DupFd(self.file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map(state["file"].detach())

    def __del__(self) -> None:
        if hasattr(self, "taken"):  # fully constructed
            os.close(self.file)

    def fill(self, array: NDArray[Any]) -> BufferedArray | None:
        """Copy an array into a buffer of this worker and return its reference; None if full."""
        worker = get_worker_info()
        assert worker is not None
        free = self.filled - self.taken[worker.id] < self.each
        if not free or not 0 < array.nbytes <= BUFFER_BYTES:
            return None
        place = BufferedArray(self.number, worker.id, self.filled, array.dtype.str, array.shape)
        np.copyto(self.at(place), array)
        self.filled += 1
        return place

    def at(self, place: BufferedArray) -> NDArray[Any]:
        """Return a view of the array in a buffer, which later arrays will overwrite."""
        buffer = place.worker * self.each + place.filled % self.each
        start = mmap.PAGESIZE * self.workers + BUFFER_BYTES * buffer
        array: NDArray[Any] = np.frombuffer(self.memory, place.dtype, math.prod(place.shape), start)
        return array.reshape(place.shape)


def take(place: BufferedArray) -> NDArray[Any]:
    """Return a copy of an array in a buffer, and free the buffer for its worker."""
    buffers = _open[place.buffers]
    array: NDArray[Any] = buffers.at(place).copy()
    buffers.taken[place.worker] = place.filled + 1
    return array


@dataclass(frozen=True)
class BufferedBatch:
    """A batch whose images are in a buffer; unpickles as a `Batch`."""

    images: BufferedArray
    rest: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        """Take the images out of their buffer on unpickling."""
        return _receive, (self.images, self.rest)


def _receive(images: BufferedArray, rest: tuple[Any, ...]) -> Batch:
    """Rebuild a batch whose images are in a buffer."""
    return unpack_batch(take(images), *rest)


@dataclass(frozen=True)
class BatchSender:
    """Collate function of a worker: moves the images of a batch to a buffer, if one is free."""

    buffers: BatchBuffers

    def __call__(self, batch: Any) -> Any:
        """Return the object to send through the pipe: a batch whose images are in a buffer."""
        if not isinstance(batch, Batch):
            return batch
        images = self.buffers.fill(batch.pixels)
        return batch if images is None else BufferedBatch(images, batch.rest)
