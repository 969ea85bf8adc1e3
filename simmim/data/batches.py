"""Batches: samples read, decoded and stacked by workers, in an order they cannot change."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_prep.manifest import ManifestError
from simmim.data.errors import DataError
from simmim.data.order import Address, SampleOrder
from simmim.data.reading import ShardSet
from simmim.data.remote import AheadOfBatches
from simmim.data.transforms import Transform

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Batch:
    """Images of one micro-batch, still in bytes: the device converts and normalises them."""

    images: Tensor
    """uint8 (batch, channels, height, width)."""
    masks: Tensor | None
    """bool (batch, rows, columns) of mask cells, True = hidden."""
    labels: Tensor | None
    """int64 (batch,), -1 where a sample has none; None where no sample of the set has one."""
    addresses: Tensor
    """int64 (batch, 3): epoch, shard and sample. Stays on the CPU."""

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Return the batch on a device."""
        return Batch(
            self.images.to(device, non_blocking=non_blocking),
            None if self.masks is None else self.masks.to(device, non_blocking=non_blocking),
            None if self.labels is None else self.labels.to(device, non_blocking=non_blocking),
            self.addresses,
        )

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory, from where it copies to a GPU while that computes."""
        return Batch(
            self.images.pin_memory(),
            None if self.masks is None else self.masks.pin_memory(),
            None if self.labels is None else self.labels.pin_memory(),
            self.addresses,
        )


@dataclass(frozen=True)
class Failure:
    """A mistake in the data, carried from a worker to the process that can report it."""

    message: str


class AddressedSamples(Dataset[Batch | Failure]):
    """Answers a list of addresses with the batch of what stands there."""

    def __init__(self, shards: ShardSet, transform: Transform) -> None:
        self.shards = shards
        self.transform = transform

    def __getitem__(self, addresses: Sequence[Address]) -> Batch | Failure:
        """Return the batch, or what kept it from being made."""
        samples = []
        for address in addresses:
            name = f"sample {address.sample} of shard {address.shard}"
            try:
                raw = self.shards.read(address.shard, address.sample)
                name = f"sample {raw.name}"
                samples.append(self.transform(raw, address))
            except (DataError, ManifestError) as error:
                return Failure(f"{name} in {self.shards.folder}: {error}")
        masks = [sample.mask for sample in samples if sample.mask is not None]
        labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
        return Batch(
            images=torch.stack([sample.image for sample in samples]),
            masks=torch.stack(masks) if masks else None,
            labels=labels if self.shards.classes else None,
            addresses=torch.tensor(addresses, dtype=torch.int64),
        )


class BatchStream:
    """Batches of the listed addresses, one for each list, in their order."""

    def __init__(
        self,
        dataset: AddressedSamples,
        plan: "TrainingPlan | EvaluationPlan",
        *,
        workers: int,
        prefetch: int,
        pin_memory: bool,
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise ValueError(
                f"workers is {workers} and prefetch {prefetch}; they must be at least 0 and 1"
            )
        self.dataset = dataset
        self.plan = plan
        self.workers = workers
        self.prefetch = prefetch
        self.pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches. Raises DataError naming the shard and key of what cannot be used."""
        loader: DataLoader[Batch | Failure] = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=self._addresses(),
            num_workers=self.workers,
            collate_fn=as_it_is,
            pin_memory=self.pin_memory,
            worker_init_fn=heed_only_the_parent,
            prefetch_factor=self.prefetch if self.workers else None,
            # Its own, so that starting a loader does not draw from the global generator.
            generator=torch.Generator().manual_seed(0),
        )
        batches = start_without_stop_signals(loader)
        try:
            while (batch := fetch(batches)) is not None:
                if isinstance(batch, Failure):
                    raise DataError(batch.message)
                yield batch
        finally:
            # Ends the workers now. Left to the traceback of an error, they would go with a heap
            # of garbage, their queues first, and could not be told.
            del batches

    def _addresses(self) -> Iterable[Sequence[Address]]:
        """Return the plan, with the shards of coming batches fetched ahead where that helps."""
        shards = self.dataset.shards
        return AheadOfBatches(self.plan, shards.fetch) if shards.fetches_whole_shards else self.plan


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The addresses of each micro-batch of one rank between two cursors."""

    order: SampleOrder
    batch_size: int
    accumulation: int
    rank: int
    world: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        self.order.check_batch(self.batch_size, self.world)
        share = self.batch_size // self.world
        if self.accumulation < 1 or share % self.accumulation:
            raise ValueError(
                f"accumulation is {self.accumulation}, which does not divide the {share} samples"
                f" that each of {self.world} processes takes of a global batch of"
                f" {self.batch_size}"
            )
        if self.start > self.stop or (self.stop - self.start) % self.batch_size:
            raise ValueError(
                f"from cursor {self.start} to {self.stop} is no whole number of batches of"
                f" {self.batch_size} samples"
            )

    def __len__(self) -> int:
        return (self.stop - self.start) // self.batch_size * self.accumulation

    def __iter__(self) -> Iterator[list[Address]]:
        micro = self.batch_size // self.world // self.accumulation
        for position in range(self.start, self.stop, self.batch_size):
            part = self.order.batch(position, self.batch_size, self.rank, self.world)
            for first in range(0, len(part), micro):
                yield part[first : first + micro]


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """The addresses of each batch of one rank: every sample once over all ranks, in order."""

    sizes: Sequence[int]
    batch_size: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.rank < self.world:
            raise ValueError(
                f"batch_size is {self.batch_size} and rank {self.rank} of {self.world};"
                " the batch must hold at least 1 sample and ranks count from 0"
            )

    def __len__(self) -> int:
        return sum(1 for part in self._ranges() if part)

    def __iter__(self) -> Iterator[list[Address]]:
        places = ((shard, row) for shard, size in enumerate(self.sizes) for row in range(size))
        passed = 0
        for part in self._ranges():
            if part:
                for _ in range(part.start - passed):
                    next(places)
                yield [Address(0, *next(places)) for _ in part]
                passed = part.stop

    def _ranges(self) -> Iterator[range]:
        """Yield which samples, counted through all shards, this rank takes of each batch."""
        total = sum(self.sizes)
        for first in range(0, total, self.batch_size):
            count = min(self.batch_size, total - first)
            yield range(
                first + count * self.rank // self.world,
                first + count * (self.rank + 1) // self.world,
            )


class TrainingBatches(BatchStream):
    """The micro-batches of one rank, from one cursor to another, across epochs.

    Each global batch is dealt to the ranks by slots, and a rank's part is cut into `accumulation`
    micro-batches in order. Neither ranks nor workers change which samples a global batch holds or
    how they look. `len` counts micro-batches. Raises ValueError where sizes do not divide.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: SampleOrder,
        transform: Transform,
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
    ) -> None:
        if order.shard_sizes.tolist() != shards.sizes:
            raise ValueError("the order was made for other shards: give it `shards.sizes`")
        plan = TrainingPlan(
            order=order,
            batch_size=batch_size,
            accumulation=accumulation,
            rank=rank,
            world=world,
            start=start_position,
            stop=end_position,
        )
        dataset = AddressedSamples(shards, transform)
        super().__init__(dataset, plan, workers=workers, prefetch=prefetch, pin_memory=pin_memory)


def evaluation_batches(
    shards: ShardSet,
    transform: Transform,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> BatchStream:
    """Return the batches of one rank: every sample once over all ranks, in order.

    `batch_size` is global, and each rank takes an equal run of it; the last batch is shorter, and
    a rank that would get nothing of it skips it, so ranks may differ by one batch.
    """
    plan = EvaluationPlan(sizes=shards.sizes, batch_size=batch_size, rank=rank, world=world)
    dataset = AddressedSamples(shards, transform)
    return BatchStream(dataset, plan, workers=workers, prefetch=prefetch, pin_memory=pin_memory)


def fetch(batches: Iterator[Batch | Failure]) -> Batch | Failure | None:
    """Return the next batch, what kept it from being made, or None at the end."""
    try:
        return next(batches, None)
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
        # The last three come of tensors whose sender is no more.
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        return Failure(
            f"a data worker died ({error or 'it left nothing'}); most often the machine ran out"
            " of memory or of shared memory (/dev/shm): use fewer workers, or smaller batches"
        )


def as_it_is(batch: Any) -> Any:
    """Return what the dataset made: it collates by itself."""
    return batch


def start_without_stop_signals(
    loader: DataLoader[Batch | Failure],
) -> Iterator[Batch | Failure]:
    """Start the workers with the stop signals blocked, so that none meets them unprepared.

    A terminal or a launcher signals the whole process group; the main process alone decides how
    a run ends, and needs its workers until then.
    """
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # which would unblock the signals if it started later
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with warnings.catch_warnings():
            # Python 3.12 and later warn of any thread; torch's own threads survive a fork.
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")
            return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def heed_only_the_parent(_worker: int) -> None:
    """Make a worker end when its parent asks for it or is gone, and at no other's signal."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if hasattr(signal, "sigtimedwait"):  # SIGTERM stays blocked, for the thread to receive
        threading.Thread(target=end_with_parent, args=(parent.pid,), daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def end_with_parent(parent: int) -> None:
    """Wait until the parent is gone or itself sends SIGTERM, as Python does before it ends."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
