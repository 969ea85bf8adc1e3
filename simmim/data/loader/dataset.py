"""The dataset that data workers run: reads and transforms the samples of a batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Literal

import torch
from torch.utils.data import Dataset

from data_prep.format.manifest import ManifestError
from simmim.data.loader.bad_samples import BadSample
from simmim.data.loader.batch import Batch, stack_images
from simmim.data.order.order import Address
from simmim.data.order.randomness import shuffled
from simmim.data.order.source import BadSampleError, DataError, Encoded, SampleSource
from simmim.data.transforms.sample import Sample, stack_labels

REPLACEMENTS = 100
"""Samples of a shard tried in place of a damaged one before the shard is rejected."""


@dataclass(frozen=True)
class Failure:
    """An error in a data worker, to be raised in the main process."""

    message: str


class BatchDataset(Dataset[Batch | Failure], Generic[Encoded]):
    """A map-style dataset from a list of addresses to the batch of these samples.

    Damaged samples are listed in the batch. With `replacing`, each is replaced by another sample of
    its shard, chosen as a pure function of the address; otherwise it is skipped.
    """

    def __init__(
        self,
        shards: SampleSource[Encoded],
        transform: Callable[[Encoded, Address], Sample],
        *,
        replacing: bool,
    ) -> None:
        self.shards = shards
        self.transform = transform
        self.replacing = replacing

    def __getitem__(self, addresses: Sequence[Address]) -> Batch | Failure:
        """Return the batch, or the error that prevented it."""
        bad: list[BadSample] = []
        samples, found = [], []
        for address in addresses:
            try:
                taken = self._sample(address, bad)
            except (DataError, ManifestError) as error:
                folder = self.shards.folder_of(address.shard)
                return Failure(f"shard {address.shard} of {folder}: {error}")
            if taken is not None:
                samples.append(taken[0])
                found.append(taken[1])
        dtypes = {str(sample.image.dtype).removeprefix("torch.") for sample in samples}
        if len(dtypes) > 1:
            return Failure(
                f"a batch would mix {' and '.join(sorted(dtypes))}: put images and arrays of"
                " different types in separate shards, or write all arrays in one type."
            )
        masks = [sample.mask for sample in samples if sample.mask is not None]
        return Batch(
            images=stack_images([sample.image for sample in samples]),
            masks=torch.stack(masks) if masks else None,
            labels=stack_labels(samples, has_classes=bool(self.shards.classes)),
            addresses=torch.tensor(found, dtype=torch.int64).view(-1, 3),
            flips=torch.tensor([sample.flip for sample in samples]) if self.replacing else None,
            bad=tuple(bad),
            targets=tuple(sample.targets for sample in samples if sample.targets is not None),
        )

    def _sample(self, address: Address, bad: list[BadSample]) -> tuple[Sample, Address] | None:
        """Return the sample at an address or its replacement, with the address of either."""
        name = ""
        for candidate in self._candidates(address):
            raw = self.shards.read(candidate.shard, candidate.sample)
            name = name or raw.name
            bad_sample = partial(
                BadSample,
                folder=self.shards.folder_of(candidate.shard),
                shard=raw.shard_name,
                key=raw.key,
            )
            try:
                sample = self.transform(raw, candidate)
            except BadSampleError as error:
                kind: Literal["replaced", "skipped"] = "replaced" if self.replacing else "skipped"
                bad.append(bad_sample(kind=kind, reason=str(error)))
                continue
            except DataError as error:
                raise DataError(f"sample {raw.name}: {error}") from None
            if sample.repaired is not None:
                bad.append(bad_sample(kind="repaired", reason=sample.repaired))
            return sample, candidate
        if self.replacing:
            raise DataError(
                f"sample {name} is damaged ({bad[-1].reason}), and so are all replacements tried;"
                " write the samples again."
            )
        return None

    def _candidates(self, address: Address) -> Iterator[Address]:
        """Yield the address, then those of its replacements."""
        yield address
        if self.replacing:
            others = shuffled(self.shards.sizes[address.shard], "replacement", *address)
            for sample in others[: REPLACEMENTS + 1].tolist():
                if sample != address.sample:
                    yield address._replace(sample=sample)
