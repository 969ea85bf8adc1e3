"""Batches of a stream of tars, perhaps mixed with indexed datasets, through webdataset's loader."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from data_prep.format.kinds import describe_kinds
from data_prep.format.text import count_noun
from simmim.data.datasets.mixture import StreamedShards
from simmim.data.datasets.stream import StreamedImage
from simmim.data.loader.bad_samples import BadKind, BadSample, BadSamples
from simmim.data.loader.batch import Batch, BatchDataset, Failure
from simmim.data.loader.batches import init_worker, next_batch, start_without_stop_signals
from simmim.data.loader.lost_workers import usable_workers
from simmim.data.loader.sampler import TrainingSampler
from simmim.data.loader.shared_memory import BatchBuffers, BatchSender
from simmim.data.order.order import Address
from simmim.data.order.source import BadSampleError, DataError, EncodedImage
from simmim.data.transforms.image_transforms import Sample
from simmim.environment import print_on_main


@dataclass(frozen=True)
class EndOfPart:
    """What a data worker sends in place of a batch that it has too few samples for."""

    bad: tuple[BadSample, ...] = ()
    """What it has left out since its last batch."""


class _PartEndedError(Exception):
    """A data worker has read its part of a pass."""


class StreamDataset(BatchDataset[EncodedImage]):
    """Makes batches of addresses, those of the stream being the next of its samples.

    Damaged samples of the stream are left out. The epoch of a batch's addresses is the number of
    samples of the stream before its pass: passes of no two starts of a training are confused.

    Args:
        shards: the stream, and what it is mixed with.
        transform: transform of the samples.
        rank: number of this process.
        world: number of processes.
        seed: seed of the training.
        first: number of samples of the stream before the first batch.
    """

    def __init__(
        self,
        shards: StreamedShards,
        transform: Callable[[Any, Address], Sample],
        *,
        rank: int,
        world: int,
        seed: int,
        first: int,
    ) -> None:
        super().__init__(shards, transform, replacing=True)
        self.streamed = shards
        self.rank, self.world, self.seed, self.first = rank, world, seed, first
        self._pass = -1
        self._images: Iterator[StreamedImage] = iter(())
        self._bad: list[BadSample] = []
        """Samples of the stream that were left out or repaired since the last batch."""

    def make(self, addresses: Sequence[Address]) -> Batch | Failure | EndOfPart:
        """Return the batch, or what prevented it."""
        made: Batch | Failure | EndOfPart
        try:
            made = self[addresses]
        except _PartEndedError:
            made = EndOfPart()
        if isinstance(made, Failure):
            return made
        bad, self._bad = tuple(self._bad), []
        return replace(made, bad=made.bad + bad)

    def _where(self, address: Address) -> str:
        if address.shard < self.streamed.first_tar:
            return super()._where(address)
        return "data.stream"  # the error names the tar, and the address does not

    def _sample(self, address: Address, bad: list[BadSample]) -> tuple[Sample, Address, str] | None:
        shards = self.streamed
        if address.shard < shards.first_tar:
            return super()._sample(address, bad)
        samples = shards.stream.samples
        number = address.epoch * samples + address.sample - self.first
        began = self.first + number // samples * samples
        if began != self._pass:
            self._pass = began
            self._images = self._start_pass(began)
        for raw in self._images:
            place = Address(began, shards.first_tar + raw.tar, raw.row)
            try:
                sample = self.transform(raw, place)
            except BadSampleError as error:
                self._note("skipped", raw.shard_name, raw.key, str(error))
                continue
            except DataError as error:
                raise DataError(f"sample {raw.name}: {error}") from None
            if sample.repaired is not None:
                self._note("repaired", raw.shard_name, raw.key, sample.repaired)
            return sample, place, raw.name
        raise _PartEndedError

    def _start_pass(self, began: int) -> Iterator[StreamedImage]:
        worker = get_worker_info()
        return self.streamed.stream.images(
            rank=self.rank,
            world=self.world,
            workers=1 if worker is None else worker.num_workers,
            seed=self.seed,
            began=began,
            report=lambda one: self._note(one.kind, one.shard_name, one.key, one.reason),
        )

    def _note(self, kind: BadKind, shard: str, key: str, reason: str) -> None:
        folder = self.streamed.stream.settings.tars
        self._bad.append(BadSample(kind=kind, folder=folder, shard=shard, key=key, reason=reason))


class _WorkerBatches(IterableDataset[Batch | Failure | EndOfPart]):
    """The batches of a data worker: every n-th of a sampler, if there are n workers."""

    def __init__(self, dataset: StreamDataset, sampler: TrainingSampler) -> None:
        self.dataset, self.sampler = dataset, sampler

    def __iter__(self) -> Iterator[Batch | Failure | EndOfPart]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for addresses in islice(self.sampler, first, None, step):
            yield self.dataset.make(addresses)


class StreamBatches:
    """The micro-batches of one rank between two cursors, of a stream and what it is mixed with.

    A part of the tars may have fewer samples than others. Where one has no more before the epoch
    ends, all ranks begin the next pass together, so that none waits for another and no sample comes
    twice: before each step the training asks `is_short` of all ranks, and then calls `begin_again`
    on all. Without that, a rank begins again alone.

    Args:
        shards: the stream, and what it is mixed with.
        order: order of the samples.
        transform: transform of the samples.
        sampler: addresses of all micro-batches.
        seed: seed of the training.
        workers: data worker processes.
        prefetch: batches that each prepares ahead.
        pin_memory: whether batches are in pinned memory.
        bad_samples: counts what is left out.
    """

    def __init__(
        self,
        shards: StreamedShards,
        transform: Callable[[Any, Address], Sample],
        sampler: TrainingSampler,
        *,
        seed: int,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        bad_samples: BadSamples | None = None,
    ) -> None:
        self.shards, self.transform, self.sampler, self.seed = shards, transform, sampler, seed
        self.workers, self.prefetch, self.pin_memory = workers, prefetch, pin_memory
        self.bad_samples = BadSamples() if bad_samples is None else bad_samples
        self.position = sampler.start
        """Cursor behind the batches of `_ahead`."""
        self._ahead: deque[Batch] = deque()
        self._loader: Iterator[Batch | Failure | EndOfPart] | None = None
        self._steps = 0
        """Batches since the loader was started."""
        self._first = 0
        """Samples of the stream before these."""
        self._told = False
        """Whether an epoch has ended early, which is said once."""

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the micro-batches.

        Raises:
            DataError: a tar cannot be read, too many samples are bad, or a part of the tars has
                fewer samples than a micro-batch.
            WorkerLostError: a worker was killed.
        """
        try:
            while self._ahead or self.position < self.sampler.stop:
                while not self._ahead and not self._fill():
                    self._require_progress()
                    self.begin_again()
                yield self._ahead.popleft()
        finally:
            self._loader = None  # ends the workers now; see `BatchStream`

    def is_short(self) -> bool:
        """Return whether this rank lacks samples for its next step; it waits for them."""
        return not self._ahead and self.position < self.sampler.stop and not self._fill()

    def begin_again(self) -> None:
        """Begin a new pass at the next step; batches that are ready are dropped."""
        if self._ahead:
            self.position -= self.sampler.batch_size
            self._ahead.clear()
        if self._steps and not self._told:
            self._told = True
            samples = self.shards.stream.samples
            read = (self._drawn_before(self.position) - self._first) % samples
            print_on_main(
                f"\ndata.stream: an epoch ends after {read:,} of {samples:,} samples, where a data "
                "worker has no more in its part of the tars; so may later ones"
            )
        self._loader, self._steps = None, 0

    def _fill(self) -> bool:
        """Prepare the micro-batches of a step; return False if there are too few samples."""
        if self._loader is None:
            self._loader = self._start()
        ready: list[Batch] = []
        for _ in range(self.sampler.accumulation):
            made = next_batch(self._loader)
            if isinstance(made, Failure):
                raise DataError(made.message)
            assert made is not None
            skipped = sum(sample.kind == "skipped" for sample in made.bad)
            samples = len(made) if isinstance(made, Batch) else 0
            self.bad_samples.record(samples + skipped, made.bad)
            if not isinstance(made, Batch):
                return False
            ready.append(made)
        self._ahead.extend(ready)
        self.position += self.sampler.batch_size
        self._steps += 1
        return True

    def _require_progress(self) -> None:
        """Raise DataError if a part of the tars has fewer samples than a micro-batch."""
        if self._steps:
            return
        sampler = self.sampler
        micro = sampler.batch_size // sampler.world // sampler.accumulation
        parts = sampler.world * max(1, self.workers)
        kinds = self.bad_samples.without_image
        without = f" Samples without an image hold {describe_kinds(kinds)}." if kinds else ""
        raise DataError(
            f"data.stream: the tars of {self.shards.stream.settings.tars} are read in "
            f"{count_noun(parts, 'part')}, one per data worker and process, and one has fewer than "
            f"the {count_noun(micro, 'sample')} of a micro-batch.{without} Use fewer data.workers "
            "or processes, a smaller training.batch_size or more training.accumulation, or more "
            "tars."
        )

    def _start(self) -> Iterator[Batch | Failure | EndOfPart]:
        """Start the data workers at the current cursor."""
        import webdataset  # noqa: PLC0415 (slow to import, and few trainings use it)

        sampler = replace(self.sampler, start=self.position)
        self._first = self._drawn_before(self.position)
        dataset = StreamDataset(
            self.shards,
            self.transform,
            rank=sampler.rank,
            world=sampler.world,
            seed=self.seed,
            first=self._first,
        )
        workers = usable_workers(self.workers) if self.workers else 0
        loader = webdataset.WebLoader(
            _WorkerBatches(dataset, sampler),
            batch_size=None,
            num_workers=workers,
            collate_fn=self._collate(workers),
            pin_memory=self.pin_memory,
            worker_init_fn=init_worker,
            prefetch_factor=self.prefetch if workers else None,
            # Keeps the start of a loader from drawing from the global generator.
            generator=torch.Generator().manual_seed(0),
        )
        return start_without_stop_signals(_Started(loader))

    def _collate(self, workers: int) -> Callable[[Any], Any]:
        if workers:
            with suppress(AttributeError, OSError):  # not Linux, or not permitted
                return BatchSender(BatchBuffers(workers, self.prefetch + 1))
        return _identity

    def _drawn_before(self, position: int) -> int:
        """Return the number of samples of the stream before a cursor."""
        sampler, samples = self.sampler, self.shards.stream.samples
        for start in count(position, sampler.batch_size):
            drawn = [
                address.epoch * samples + address.sample
                for address in sampler.order.batch(start, sampler.batch_size)
                if address.shard == self.shards.first_tar
            ]
            if drawn:
                return min(drawn)
        raise AssertionError


class _Started:
    """A WebLoader whose iterator starts the workers; its own does so when asked for a batch."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Batch | Failure | EndOfPart]:
        batches: Iterator[Batch | Failure | EndOfPart] = self.loader.iterator1()
        return batches


def _identity(batch: Any) -> Any:
    """Return the batch, which the dataset has collated already."""
    return batch
