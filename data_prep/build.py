"""A source made into a set of shards, from listing to manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from data_prep.destination import Destination, Identity, find_complete, open_destination
from data_prep.manifest import Manifest
from data_prep.plan import ShardOptions, class_names, count_shards, plan_shards
from data_prep.shard import Rejection, ShardReport, ShardTask, read_report, write_shard
from data_prep.sources import Listing, SourceError, list_source, open_source
from data_prep.workers import Tick, map_tasks


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is about to be done, for a person to see."""

    found: int
    """Images found."""
    done: int
    """Images that an interrupted run has done."""
    classes: int
    """Classes among them."""
    shards: int
    """Shards to be written, those already finished included."""
    finished: int
    """Shards that an interrupted run finished."""
    workers: int
    """Processes that write."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Who is told how far the work is; the defaults tell nobody."""

    planned: Callable[[Plan], None] = lambda _: None
    """Called once before anything is written."""
    tick: Tick = lambda _: None
    """Called with the number of samples done since the last call."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A finished set."""

    manifest: Manifest
    """What was made."""
    found: int
    """Images found: samples and rejected together."""
    was_complete: bool
    """Whether it was all there already."""


@dataclass(frozen=True)
class _Job:
    source: Path
    listing: Listing
    options: ShardOptions
    classes: tuple[str, ...]


def build_shards(
    source_path: Path,
    folder: Path,
    options: ShardOptions,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Built:
    """Write the images of a folder, zip or tar as shards.

    The same input and options give the same bytes, with any number of workers. An interrupted run
    leaves its finished shards in `.partial`, and the next call goes on from them.

    Raises:
        SourceError: the source is missing, empty, or none of its images can be used.
        DestinationError: the folder holds something that must not be written over.
        OSError: the folder cannot be written.
    """
    progress = progress or Progress()
    source_path, folder = source_path.resolve(), folder.resolve()
    with closing(open_source(source_path)) as source:
        listing = list_source(source, options.selection)
    identity = Identity(
        options={"source": source_path.name, **options.values()}, fingerprint=listing.fingerprint()
    )
    complete = None if overwrite else find_complete(folder, identity)
    if complete is not None:
        return Built(manifest=complete, found=listing.found, was_complete=True)
    with open_destination(folder, identity, overwrite=overwrite) as destination:
        job = _Job(source_path, listing, options, class_names(listing.files))
        manifest = _build(destination, job, workers=workers, progress=progress)
    return Built(manifest=manifest, found=listing.found, was_complete=False)


def _build(destination: Destination, job: _Job, *, workers: int, progress: Progress) -> Manifest:
    shards = count_shards(job.listing.files, job.options)
    found = [read_report(destination.partial, number) for number in range(shards)]
    reports = {report.number: report for report in found if report is not None}
    workers = max(1, min(workers, shards - len(reports)))
    plan = Plan(
        found=job.listing.found,
        done=sum(report.found for report in reports.values()),
        classes=len(job.classes),
        shards=shards,
        finished=len(reports),
        workers=workers,
    )
    progress.planned(plan)
    labels = {name: label for label, name in enumerate(job.classes)}
    tasks = (
        ShardTask(
            source=job.source,
            folder=destination.partial,
            plan=plan,
            labels=labels,
            options=job.options,
        )
        for plan in plan_shards(job.listing.files, job.options)
        if plan.number not in reports
    )
    for report in map_tasks(write_shard, tasks, workers=workers, tick=progress.tick):
        reports[report.number] = report
    return _publish(destination, job, [reports[number] for number in range(shards)])


def _publish(destination: Destination, job: _Job, reports: Sequence[ShardReport]) -> Manifest:
    rejected = [Rejection(path=file.path, reason=file.problem) for file in job.listing.rejected]
    rejected += [rejection for report in reports for rejection in report.rejected]
    rejected.sort(key=lambda rejection: rejection.path)
    if len(rejected) == job.listing.found:
        destination.abandon()
        raise SourceError(_describe_uselessness(job.source, rejected))
    return destination.publish(reports, job.classes, rejected)


def _describe_uselessness(source: Path, rejected: Sequence[Rejection]) -> str:
    lines = [f"none of the {len(rejected):,} images of {source} can be used; give other images:"]
    lines += [f"{rejection.path}: {rejection.reason}" for rejection in rejected[:5]]
    if len(rejected) > 5:
        lines.append(f"and {len(rejected) - 5:,} more")
    return "\n  ".join(lines)
