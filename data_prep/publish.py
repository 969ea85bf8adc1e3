"""Finished shards made into a set: counted, named and published with what was kept out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice

from data_prep.destination import VALIDATION_SHARDS, Destination, DestinationError
from data_prep.external_sort import ExternalSort
from data_prep.files import SourceError
from data_prep.listing import Listing
from data_prep.manifest import Manifest, ShardEntry
from data_prep.plan import path_key
from data_prep.shard import Rejection, read_report


class TooManyRejectedError(SourceError):
    """More images were rejected than may be; the work is kept."""


@dataclass(kw_only=True)
class _Gathered:
    entries: list[ShardEntry] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    validation_shards: int = 0
    damaged: int = 0
    """Images rejected for damage."""
    rejected: int = 0
    """All rejected, duplicates too."""


def publish(destination: Destination, listing: Listing, *, max_rejected: float) -> Manifest:
    """Check that all shards are written, and make a set of them.

    Args:
        destination: where they are.
        listing: what they were to hold.
        max_rejected: largest share of images that may be rejected, duplicates left aside.

    Raises:
        DestinationError: shards are missing.
        SourceError: no image, or too few, can be used.
    """
    sorter = ExternalSort(destination.partial, "rejected")
    try:
        gathered = _gather(destination, listing, sorter)
        found = listing.survey.found
        rows = _rejections(sorter)
        if gathered.rejected == found:
            first = list(islice(rows, 5))
            destination.abandon()
            raise SourceError(_describe_uselessness(found, first))
        if gathered.damaged > max_rejected * found:
            reasons = "\n  ".join(f"{row.path}: {row.reason}" for row in islice(rows, 5))
            raise TooManyRejectedError(
                f"{gathered.damaged:,} of {found:,} images were rejected, more than --max-rejected "
                f"{max_rejected:g}. The work is kept: mend the source, or run the same command "
                f"again with a larger --max-rejected. The first are:\n  {reasons}"
            )
        options = {}
        if listing.validation_shards:
            options[VALIDATION_SHARDS] = gathered.validation_shards
        return destination.publish(
            gathered.entries, listing.survey.classes, rows, gathered.notes, options
        )
    finally:
        sorter.discard()


def _gather(destination: Destination, listing: Listing, sorter: ExternalSort) -> _Gathered:
    gathered = _Gathered()
    missing: list[int] = []
    for file in listing.refused():
        _add(sorter, Rejection(path=file.path, reason=file.problem))
        gathered.rejected += 1
        is_duplicate = file.problem.startswith(("a duplicate of ", "a near duplicate of "))
        gathered.damaged += not is_duplicate
    for plan in listing.shards:
        report = read_report(destination.partial, plan.number)
        if report is None:
            missing.append(plan.number)
            continue
        if report.listing != plan.digest:
            raise destination.other_work()
        for rejection in report.rejected:
            _add(sorter, rejection)
        gathered.rejected += len(report.rejected)
        gathered.damaged += len(report.rejected)
        gathered.notes.update(report.notes)
        if report.entry is not None:
            gathered.entries.append(report.entry)
            is_validation = plan.number >= len(listing.shards) - listing.validation_shards
            gathered.validation_shards += is_validation
    if missing:
        some = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise DestinationError(
            f"{destination.folder} lacks {len(missing):,} of {len(listing.shards):,} shards "
            f"({some}): part i of n writes shards i-1, i-1+n, ... Run the missing parts, then "
            "merge again."
        )
    return gathered


def _add(sorter: ExternalSort, rejection: Rejection) -> None:
    sorter.add(path_key(rejection.path), json.dumps(asdict(rejection)))


def _rejections(sorter: ExternalSort) -> Iterator[Rejection]:
    for _, line in sorter.merged():
        yield Rejection(**json.loads(line))


def _describe_uselessness(found: int, first: list[Rejection]) -> str:
    lines = [f"none of the {found:,} images can be used; give other images:"]
    lines += [f"{rejection.path}: {rejection.reason}" for rejection in first]
    if found > len(first):
        lines.append(f"and {found - len(first):,} more")
    return "\n  ".join(lines)
