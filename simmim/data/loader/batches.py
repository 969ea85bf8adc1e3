"""Streams of batches, made by data workers in an order that they cannot change."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from simmim.data.loader.bad_samples import BadSamples
from simmim.data.loader.batch import Batch, BatchDataset, Failure
from simmim.data.loader.lost_workers import lost_worker, unstartable_workers, usable_workers
from simmim.data.loader.sampler import EvaluationSampler, ShardPrefetcher, TrainingSampler
from simmim.data.loader.shared_memory import BatchBuffers, BatchSender
from simmim.data.order.order import Address, Order
from simmim.data.order.source import DataError, Encoded, SampleSource
from simmim.data.transforms.image_transforms import Sample
from simmim.stop_signals import STOP_SIGNALS

Item = TypeVar("Item")


def start_without_stop_signals(loader: Iterable[Item]) -> Iterator[Item]:
    """Start the workers with stop signals blocked until `init_worker` handles them.

    A terminal or a launcher signals the whole process group; only the main process decides how a
    run ends, and it needs its workers until then.
    """
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # it would unblock the signals if started later
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with warnings.catch_warnings():
            # Python 3.12 and later warn about any thread; torch's own threads survive a fork.
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")
            return iter(loader)
    except OSError as error:
        raise unstartable_workers(error) or error from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(_worker: int) -> None:
    """Make a worker exit only if its parent terminates it or is gone, whoever else signals it."""
    ignored = set(STOP_SIGNALS) - {signal.SIGTERM}
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)
    if hasattr(signal, "sigtimedwait"):  # SIGTERM stays blocked; the thread receives it
        threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def exit_with_parent(starter: int) -> None:
    """Exit once the parent is gone or sends SIGTERM, as Python does before it exits.

    `starter` is the process that started this one: the parent, or the fork server, which dies
    with it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == starter and parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


def next_batch(batches: Iterator[Item]) -> Item | None:
    """Return the next batch, the error that prevented it, or None at the end.

    Raises:
        WorkerLostError: a worker was killed.
    """
    try:
        return next(batches, None)
    except (RuntimeError, MemoryError, EOFError, ConnectionError, FileNotFoundError) as error:
        raise lost_worker(error) or error from None


class BatchStream:
    """Batches made by data workers, one per list of addresses, in order."""

    def __init__(
        self,
        dataset: BatchDataset[Any],
        sampler: TrainingSampler | EvaluationSampler | Sequence[Sequence[Address]],
        *,
        workers: int,
        prefetch: int,
        pin_memory: bool,
        bad_samples: BadSamples | None,
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise ValueError(
                f"workers is {workers} and prefetch {prefetch}; they must be at least 0 and 1."
            )
        self.dataset = dataset
        self.sampler = sampler
        self.workers = workers
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        self.bad_samples = BadSamples() if bad_samples is None else bad_samples

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches, except those without any readable sample.

        Raises DataError naming a shard that cannot be read, or if too many samples are bad, and
        WorkerLostError if a worker was killed.
        """
        workers = usable_workers(self.workers) if self.workers else 0
        loader: DataLoader[Batch | Failure] = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=self._addresses(),
            num_workers=workers,
            collate_fn=self._collate(workers),
            pin_memory=self.pin_memory,
            worker_init_fn=init_worker,
            prefetch_factor=self.prefetch if workers else None,
            # Keeps the start of a loader from drawing from the global generator.
            generator=torch.Generator().manual_seed(0),
        )
        batches = start_without_stop_signals(loader)
        try:
            while (batch := next_batch(batches)) is not None:
                if isinstance(batch, Failure):
                    raise DataError(batch.message)
                skipped = sum(sample.kind == "skipped" for sample in batch.bad)
                self.bad_samples.record(len(batch) + skipped, batch.bad)
                if len(batch):
                    yield batch
        finally:
            # Ends the workers now. Kept alive by the traceback of an error, they would be
            # garbage collected after their queues, and could not be stopped.
            del batches

    def _collate(self, workers: int) -> Callable[[Any], Any]:
        """Return the collate function, which passes batches through shared memory if possible."""
        if workers:
            with suppress(AttributeError, OSError):  # not Linux, or not permitted
                return BatchSender(BatchBuffers(workers, self.prefetch + 1))
        return _identity

    def _addresses(self) -> Iterable[Sequence[Address]]:
        """Return the sampler, with shards fetched ahead if they are cached whole."""
        shards = self.dataset.shards
        if not shards.fetches_whole_shards:
            return self.sampler
        return ShardPrefetcher(self.sampler, shards.fetch)


class TrainingBatches(BatchStream):
    """The micro-batches of one rank between two cursors, across epochs.

    Each rank takes a contiguous, equal part of each global batch, divided into `accumulation`
    micro-batches in order. The samples of a global batch and their augmentation depend neither on
    ranks nor on workers. `len` counts micro-batches. Raises ValueError if sizes do not divide.
    """

    def __init__(
        self,
        shards: SampleSource[Encoded],
        order: Order,
        transform: Callable[[Encoded, Address], Sample],
        *,
        batch_size: int,
        start_position: int,
        end_position: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        bad_samples: BadSamples | None = None,
    ) -> None:
        if order.shard_sizes.tolist() != shards.sizes:
            raise ValueError("the order was made for other shards: create it with `shards.sizes`.")
        sampler = TrainingSampler(
            order=order,
            batch_size=batch_size,
            accumulation=accumulation,
            rank=rank,
            world=world,
            start=start_position,
            stop=end_position,
        )
        super().__init__(
            BatchDataset(shards, transform, replacing=True),
            sampler,
            workers=workers,
            prefetch=prefetch,
            pin_memory=pin_memory,
            bad_samples=bad_samples,
        )


def evaluation_batches(
    shards: SampleSource[Encoded],
    transform: Callable[[Encoded, Address], Sample],
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    bad_samples: BadSamples | None = None,
) -> BatchStream:
    """Return the batches of one rank; all ranks together visit every sample once, in order.

    `batch_size` is global, and each rank takes a contiguous, equal part of it. The last batch may
    be shorter, and a rank without samples in it skips it, so ranks may differ by one batch.
    Unreadable samples are skipped, counted and listed, not replaced.
    """
    sampler = EvaluationSampler(sizes=shards.sizes, batch_size=batch_size, rank=rank, world=world)
    return BatchStream(
        BatchDataset(shards, transform, replacing=False),
        sampler,
        workers=workers,
        prefetch=prefetch,
        pin_memory=pin_memory,
        bad_samples=bad_samples,
    )


def picture_batches(
    shards: SampleSource[Encoded],
    transform: Callable[[Encoded, Address], Sample],
    *,
    count: int,
    batch_size: int,
    bad_samples: BadSamples | None = None,
) -> BatchStream:
    """Return batches of up to `count` samples spread over a set, always the same.

    Unreadable ones are skipped, counted and listed.
    """
    addresses = [Address(0, shard, sample) for shard, sample in shards.spread(count)]
    return BatchStream(
        BatchDataset(shards, transform, replacing=False),
        [addresses[first : first + batch_size] for first in range(0, len(addresses), batch_size)],
        workers=0,
        prefetch=1,
        pin_memory=False,
        bad_samples=bad_samples,
    )


def _identity(batch: Any) -> Any:
    """Return the batch, which the dataset has collated already."""
    return batch
