"""Finalizing a set: check that all shards are there, list rejected images, write the manifest."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.channels import ChannelNames, are_pictures, describe, read_names
from data_prep.format.atomic import name_in_errors
from data_prep.format.index import checksum, index_name
from data_prep.format.manifest import Manifest, ShardEntry
from data_prep.format.text import WarnOnce, count_noun
from data_prep.sources.external_sort import ExternalSort
from data_prep.sources.files import SourceError
from data_prep.write.listing import SourceListing, Survey
from data_prep.write.output_dir import (
    REJECTED_NAME,
    VALIDATION_SHARDS,
    OutputDir,
    OutputDirError,
)
from data_prep.write.plan import path_key
from data_prep.write.shard import Counts, Rejection, report_name, shard_name, share_batches

_NAMED = 5


class TooManyRejectedError(SourceError):
    """More images were rejected than allowed; the work is kept."""


@dataclass(kw_only=True)
class _Totals:
    entries: list[ShardEntry] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    kinds: Counts = field(default_factory=Counts)
    channels: Counts = field(default_factory=Counts)
    no_data: Counts = field(default_factory=Counts)
    validation_shards: int = 0
    damaged: int = 0
    """Images rejected for damage."""
    rejected: int = 0
    """All rejected images, including duplicates."""


def finalize_set(output: OutputDir, listing: SourceListing, *, max_rejected: float) -> Manifest:
    """Check that all shards are written and publish them as a set.

    Args:
        output: the output folder.
        listing: the planned shards.
        max_rejected: largest fraction of images that may be rejected, without duplicates.

    Raises:
        OutputDirError: shards are missing.
        SourceError: none or too few of the images can be used, or an archive in the archive cannot.
    """
    refuse_unread_archives(listing.survey, max_rejected=max_rejected)
    sorter = ExternalSort(output.partial, "rejected")
    try:
        totals = _gather(output, listing, sorter)
        found = listing.survey.found
        rows = _rejections(sorter)
        if totals.rejected == found:
            first = list(islice(rows, _NAMED))
            output.abandon()
            raise SourceError(_describe_all_rejected(found, first))
        path = output.partial / REJECTED_NAME
        rejected = _write_rejected(path, rows)
        if totals.damaged > max_rejected * found:
            raise TooManyRejectedError(
                f"{totals.damaged:,} of {found:,} images were rejected, more than --max-rejected "
                f"{max_rejected:g}. The finished shards are kept: repair the source, or run the "
                f"same command again with a larger --max-rejected. All are listed in {path}; the "
                f"first are:\n  {_describe_first(path)}"
            )
        hint = _describe_mixture(totals.kinds.counts)
        if hint:
            WarnOnce()(hint)
        manifest = replace(_describe(output, listing, totals), rejected=rejected)
        return output.publish(manifest, [entry.name for entry in totals.entries])
    finally:
        sorter.discard()


def check_parts(output: OutputDir, listing: SourceListing) -> None:
    """Compare the shards of all parts, which other machines wrote, with their checksums.

    Raises:
        OutputDirError: one was damaged since.
        OSError: one cannot be read.
    """
    for report in output.reports(plan.number for plan in listing.shards):
        if report is None or report.entry is None:
            continue
        path = output.partial / report.entry.name
        if checksum(path) != report.entry.sha256:
            raise OutputDirError(
                f"{path} was changed or damaged since it was written: its SHA-256 is not that of "
                f"its report. Remove {output.partial / report_name(report.number)}, run the part "
                "that wrote it again, and merge again."
            )


def refuse_unread_archives(survey: Survey, *, max_rejected: float) -> None:
    """Check that every archive in the source could be read: each may hold any number of images.

    Args:
        survey: summary of the source.
        max_rejected: see `finalize_set`; 1 allows such archives.

    Raises:
        TooManyRejectedError: one could not.
    """
    if survey.unread and max_rejected < 1:
        reasons = "\n  ".join(survey.unread)
        name = survey.unread[0].partition(": ")[0]
        raise TooManyRejectedError(
            "archives in the source cannot be read, and the number of images in them is unknown: "
            "repair them, leave them out (--exclude "
            f"'{name}*'), or allow it with --max-rejected 1:\n  {reasons}"
        )


def _describe(output: OutputDir, listing: SourceListing, totals: _Totals) -> Manifest:
    """Return the manifest with shards numbered without gaps, and `rejected` still 0."""
    identity = output.identity()
    assert identity is not None
    options = dict(identity.options)
    if listing.validation_shards:
        options[VALIDATION_SHARDS] = totals.validation_shards
    names = map(shard_name, range(len(totals.entries)))
    return Manifest(
        folder=output.folder,
        shards=tuple(
            replace(entry, name=name, index=index_name(name))
            for entry, name in zip(totals.entries, names, strict=True)
        ),
        classes=listing.survey.classes,
        channels=_channels(options, totals.channels.counts),
        no_data=_no_data(options, totals.no_data.counts),
        notes=dict(sorted(totals.notes.items())),
        skipped=listing.survey.skipped,
        skipped_examples=listing.survey.examples,
        options=options,
        fingerprint=identity.fingerprint,
    )


def _channels(
    options: Mapping[str, Any], found: Mapping[str, tuple[int, str]]
) -> ChannelNames | None:
    """Return the names of the channels of all images; None if they are not known.

    Raises:
        SourceError: the files have different ones; the shards are kept.
    """
    if "channels" in options:
        return read_names(options["channels"])
    named = {tuple(key.split(",")): count for key, count in found.items() if key}
    if named and are_pictures(*named):
        named = {max(named, key=len): (0, "")}  # grey is trained on as colour
    if len(named) > 1:
        listed = "; ".join(
            f"{count_noun(count, 'image')} of {describe(names)}, as {path}"
            for names, (count, path) in named.items()
        )
        raise SourceError(
            f"the files name their channels differently: {listed}. The finished shards are kept: "
            "write each kind as a set of its own (--include, --exclude), which training matches by "
            "name."
        )
    return next(iter(named), None) if "" not in found else None


def _no_data(options: Mapping[str, Any], found: Mapping[str, tuple[int, str]]) -> float | None:
    """Return the no-data value of the set.

    Raises:
        SourceError: the files have different ones; the shards are kept.
    """
    if "no_data" in options:
        return float(options["no_data"])
    if len(found) > 1:
        listed = "; ".join(f"{value}, as {path}" for value, (_, path) in found.items())
        raise SourceError(
            f"the files have different no-data values: {listed}. The finished shards are kept: "
            "write each kind as a set of its own (--include, --exclude)."
        )
    return next(map(float, found), None)


def _write_rejected(path: Path, rows: Iterator[Rejection]) -> int:
    count = 0
    with name_in_errors(path), path.open("w", encoding="ascii") as file:
        for count, rejection in enumerate(rows, start=1):  # noqa: B007 - used below
            values = {"key": rejection.key} if rejection.key is not None else {}
            values |= {"path": rejection.path, "reason": rejection.reason}
            file.write(json.dumps(values) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return count


def _gather(output: OutputDir, listing: SourceListing, sorter: ExternalSort) -> _Totals:
    totals = _Totals()
    missing: list[int] = []
    for file in listing.refused():
        _add(sorter, Rejection(path=file.path, reason=file.problem))
        totals.rejected += 1
        is_duplicate = file.problem.startswith(("a duplicate of ", "a near duplicate of "))
        totals.damaged += not is_duplicate
    reports = output.reports(plan.number for plan in listing.shards)
    for plan, report in zip(listing.shards, reports, strict=True):
        if report is None:
            missing.append(plan.number)
            continue
        if report.listing != plan.digest:
            raise output.mismatch_error()
        for rejection in report.rejected:
            _add(sorter, rejection)
        totals.rejected += len(report.rejected)
        totals.damaged += len(report.rejected)
        totals.notes.update(report.notes)
        totals.kinds.update(report.kinds)
        totals.channels.update(report.channels)
        totals.no_data.update(report.no_data)
        if report.entry is not None:
            totals.entries.append(report.entry)
            is_validation = plan.number >= len(listing.shards) - listing.validation_shards
            totals.validation_shards += is_validation
    if missing:
        some = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise OutputDirError(
            f"{output.folder} lacks {len(missing):,} of {len(listing.shards):,} shards "
            f"({some}): part I of N writes shards I-1, I-1+N, ... Run the missing parts, then "
            "merge again."
        )
    return totals


def _add(sorter: ExternalSort, rejection: Rejection) -> None:
    sorter.add(path_key(rejection.path), json.dumps(asdict(rejection)))


def _rejections(sorter: ExternalSort) -> Iterator[Rejection]:
    for _, line in sorter.merged():
        yield Rejection(**json.loads(line))


def _describe_first(path: Path) -> str:
    with path.open(encoding="ascii") as file:
        first = [json.loads(line) for line in islice(file, _NAMED)]
    return "\n  ".join(f"{row['path']}: {row['reason']}" for row in first)


def _describe_mixture(kinds: Mapping[str, tuple[int, str]]) -> str:
    """Return a hint on images that training cannot take together, or an empty string."""
    if share_batches(kinds):
        return ""
    ordered = sorted(kinds.items(), key=lambda item: (-item[1][0], item[0]))
    shown = "; ".join(
        f"{count:,} {kind if count > 1 else _singular(kind)}, as {path}"
        for kind, (count, path) in ordered[:_NAMED]
    )
    left = len(ordered) - _NAMED
    more = f"; {count_noun(left, 'more kind')}" if left > 0 else ""
    return (
        f"the set holds images of several kinds, of which training takes one: {shown}{more}. If "
        "some do not belong to it, as label maps do not, choose with --include or --exclude and "
        "write it again with --overwrite."
    )


def _singular(kind: str) -> str:
    """Return the name of a kind of images, which is a plural in reports, for one of them."""
    noun, *rest = kind.split(" ", 1)
    return " ".join((noun.removesuffix("s"), *rest))


def _describe_all_rejected(found: int, first: list[Rejection]) -> str:
    images = "the only image cannot" if found == 1 else f"none of the {found:,} images can"
    lines = [f"{images} be used; give other images:"]
    lines += [f"{rejection.path}: {rejection.reason}" for rejection in first]
    if found > len(first):
        lines.append(f"and {found - len(first):,} more")
    return "\n  ".join(lines)
