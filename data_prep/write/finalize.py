"""Finished shards made into a set: counted, named and published with what was kept out."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

from data_prep.format.index import index_name
from data_prep.format.manifest import Manifest, ShardEntry
from data_prep.sources.external_sort import ExternalSort
from data_prep.sources.files import SourceError
from data_prep.write.listing import Listing
from data_prep.write.output_dir import (
    REJECTED_NAME,
    VALIDATION_SHARDS,
    Destination,
    DestinationError,
)
from data_prep.write.plan import path_key
from data_prep.write.shard import Rejection, shard_name


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
        manifest = replace(
            _describe(destination, listing, gathered),
            rejected=_write_rejected(destination.partial / REJECTED_NAME, rows),
        )
        return destination.publish(manifest, [entry.name for entry in gathered.entries])
    finally:
        sorter.discard()


def _describe(destination: Destination, listing: Listing, gathered: _Gathered) -> Manifest:
    """Return the manifest of a set, its shards numbered without gaps; none is rejected yet."""
    identity = destination.identity()
    assert identity is not None
    options = dict(identity.options)
    if listing.validation_shards:
        options[VALIDATION_SHARDS] = gathered.validation_shards
    names = map(shard_name, range(len(gathered.entries)))
    return Manifest(
        folder=destination.folder,
        shards=tuple(
            replace(entry, name=name, index=index_name(name))
            for entry, name in zip(gathered.entries, names, strict=True)
        ),
        classes=listing.survey.classes,
        notes=dict(sorted(gathered.notes.items())),
        options=options,
        fingerprint=identity.fingerprint,
    )


def _write_rejected(path: Path, rows: Iterator[Rejection]) -> int:
    count = 0
    with path.open("w", encoding="ascii") as file:
        for count, rejection in enumerate(rows, start=1):  # noqa: B007 - used below
            values = {"key": rejection.key} if rejection.key is not None else {}
            values |= {"path": rejection.path, "reason": rejection.reason}
            file.write(json.dumps(values) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return count


def _gather(destination: Destination, listing: Listing, sorter: ExternalSort) -> _Gathered:
    gathered = _Gathered()
    missing: list[int] = []
    for file in listing.refused():
        _add(sorter, Rejection(path=file.path, reason=file.problem))
        gathered.rejected += 1
        is_duplicate = file.problem.startswith(("a duplicate of ", "a near duplicate of "))
        gathered.damaged += not is_duplicate
    reports = destination.reports(plan.number for plan in listing.shards)
    for plan, report in zip(listing.shards, reports, strict=True):
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
