"""Memory that data workers share with the main process, in which the images of batches travel.

A pipe takes megabytes in pieces of 64 KiB, each with a turn of both sides, and copies them five
times; here they are written once and read once. It is mapped once for all batches, so that pages
are not cleared anew for each, and is not in /dev/shm, which containers keep small.
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
from torch.utils.data import get_worker_info


@dataclass(frozen=True)
class Place:
    """Where an array is in the slots."""

    slots: int
    """Their number in the main process."""
    worker: int
    filled: int
    """How many slots the worker has filled before."""
    dtype: str
    shape: tuple[int, ...]


SLOT = 256 * 2**20
"""Bytes of a slot; only those in use take memory. Larger images travel through the pipe."""

_numbers = itertools.count()
_open: "WeakValueDictionary[int, Slots]" = WeakValueDictionary()


class Slots:
    """A few slots for each worker, which it fills in turn.

    Args:
        workers: how many processes write.
        each: slots of a worker; of batches that are not taken yet, more go through the pipe.

    Raises:
        OSError: the system grants no such memory.
    """

    def __init__(self, workers: int, each: int) -> None:
        self.workers, self.each = workers, each
        self.number = next(_numbers)
        self.filled = 0
        """By this process, if it is a worker."""
        file = os.memfd_create("batches")
        try:
            os.ftruncate(file, mmap.PAGESIZE * workers + SLOT * workers * each)
            self._map(file)
        except BaseException:
            os.close(file)
            raise
        _open[self.number] = self

    def _map(self, file: int) -> None:
        self.memory = mmap.mmap(file, 0)
        self.file = file
        # How many slots of each worker were taken, each number on a page of its own.
        pages = mmap.PAGESIZE * self.workers
        self.taken = np.frombuffer(self.memory, np.int64, pages // 8)[:: mmap.PAGESIZE // 8]

    def __getstate__(self) -> dict[str, Any]:
        """Travel to a worker that was not forked."""
        state = dict(self.__dict__)
        del state["memory"], state["taken"]
        return state | {"file": reduction.DupFd(self.file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map(state["file"].detach())

    def __del__(self) -> None:
        if hasattr(self, "taken"):  # it was made in full
            os.close(self.file)

    def fill(self, array: np.ndarray) -> Place | None:
        """Put an array into a slot of this worker and return where; None where none is free."""
        worker = get_worker_info()
        assert worker is not None
        free = self.filled - self.taken[worker.id] < self.each
        if not free or not 0 < array.nbytes <= SLOT:
            return None
        place = Place(self.number, worker.id, self.filled, array.dtype.str, array.shape)
        np.copyto(self.at(place), array)
        self.filled += 1
        return place

    def at(self, place: Place) -> np.ndarray:
        """Return the array in a slot, which later ones will replace."""
        slot = place.worker * self.each + place.filled % self.each
        start = mmap.PAGESIZE * self.workers + SLOT * slot
        array: np.ndarray = np.frombuffer(self.memory, place.dtype, math.prod(place.shape), start)
        return array.reshape(place.shape)


def take(place: Place) -> np.ndarray:
    """Return what a worker has put into a slot, and let it have the slot again."""
    slots = _open[place.slots]
    array: np.ndarray = slots.at(place).copy()
    slots.taken[place.worker] = place.filled + 1
    return array
