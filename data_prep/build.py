"""A source made into a set of shards, from listing to manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.destination import (
    Destination,
    DestinationError,
    Identity,
    find_complete,
    open_destination,
    refuse_foreign,
)
from data_prep.duplicates import duplicate_dropper
from data_prep.listing import Listing, read_listing, survey_source, write_listing
from data_prep.manifest import MANIFEST_NAME, Manifest
from data_prep.plan import ShardOptions
from data_prep.publish import publish
from data_prep.ray_executor import map_on_ray
from data_prep.shard import ShardReport, ShardTask, read_report, write_shard
from data_prep.sources import Source, open_source
from data_prep.storage import Location
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
    """Shards to be written here, those already finished included."""
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
    finished: Callable[[ShardReport], None] = lambda _: None
    """Called with every shard that is finished."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the work is done; what is written does not depend on it."""

    workers: int = 1
    """Processes that write, on this machine or, at most, on the cluster."""
    ray: bool = False
    """Whether shards are written on a Ray cluster."""
    address: str | None = None
    """Address of the Ray cluster; None starts one on this machine."""
    part: tuple[int, int] | None = None
    """Which part of how many is written here, counted from 1; None writes all."""
    max_rejected: float = 1.0
    """Largest share of images that may be rejected."""

    def __post_init__(self) -> None:
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise ValueError(f"--part must be from 1/n to n/n, got {self.part[0]}/{self.part[1]}.")
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"--max-rejected must be from 0 to 1, got {self.max_rejected}.")


@dataclass(frozen=True, kw_only=True)
class Built:
    """A finished set."""

    manifest: Manifest | None
    """What was made; None where a part of it was, which waits for the others to be merged."""
    found: int
    """Images found: samples and rejected together."""
    was_complete: bool
    """Whether it was all there already."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    source: Location
    shards: bool
    options: ShardOptions
    execution: Execution

    def open(self) -> Source:
        ordered = self.options.shuffle_window is not None
        selection = self.options.selection
        return open_source(self.source, selection, shards=self.shards, ordered=ordered)

    def identity(self, fingerprint: str) -> Identity:
        options = {"source": self.source.name, **self.options.values()}
        return Identity(options=options, fingerprint=fingerprint)


def build_shards(
    source_path: Location,
    folder: Path,
    options: ShardOptions,
    *,
    shards: bool = False,
    execution: Execution | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Built:
    """Write the images of a folder, an archive, a list or other shards as shards.

    The same input and options give the same bytes, however the work is done. An interrupted run
    leaves its finished shards in `.partial`, and the next call goes on from them.

    Args:
        source_path: what to read.
        folder: where to write.
        options: what decides what is written.
        shards: whether the source is a folder of WebDataset tars.
        execution: how the work is done.
        overwrite: whether a set made from something else is replaced.
        progress: who is told.

    Raises:
        SourceError: the source is missing, empty, or too few of its images can be used.
        DestinationError: the folder holds something that must not be written over.
        OSError: the folder cannot be written.
    """
    execution, progress = execution or Execution(), progress or Progress()
    folder = folder.resolve()
    if isinstance(source_path, Path):
        source_path = source_path.resolve()
    if execution.part and overwrite:
        raise DestinationError("--overwrite would clear the work of other parts: leave it out.")
    job = _Job(source=source_path, shards=shards, options=options, execution=execution)
    with closing(job.open()) as source:
        refuse_foreign(folder)
        if not overwrite and (folder / MANIFEST_NAME).exists():
            survey = survey_source(source, options)
            complete = find_complete(folder, job.identity(survey.fingerprint))
            return Built(manifest=complete, found=survey.found, was_complete=True)
        part = execution.part[0] if execution.part else None
        with open_destination(folder, part=part) as destination:
            listing = _take_listing(destination, job, source, overwrite=overwrite)
            _write(destination, job, listing, progress)
            manifest = None
            if execution.part is None:
                manifest = publish(destination, listing, max_rejected=execution.max_rejected)
    return Built(manifest=manifest, found=listing.survey.found, was_complete=False)


def merge_parts(folder: Path, *, max_rejected: float = 1.0) -> Manifest:
    """Make a set of what all parts of a run have written.

    Raises:
        DestinationError: a part is still at work, or shards are missing.
        SourceError: too few images can be used.
    """
    folder = folder.resolve()
    if not folder.is_dir() or not any(folder.glob(".partial/listing.json")):
        raise DestinationError(
            f"{folder} holds no parts to merge. Write them: data-prep shard SRC {folder} --part 1/n"
        )
    with open_destination(folder) as destination:
        listing = read_listing(destination.partial)
        if listing is None or destination.identity() is None:
            raise DestinationError(f"{folder} holds no complete part. Run the parts again.")
        return publish(destination, listing, max_rejected=max_rejected)


def _take_listing(
    destination: Destination, job: _Job, source: Source, *, overwrite: bool
) -> Listing:
    """Return the listing that unfinished work has, if the source still is the same, or a new one.

    Raises:
        DestinationError: the unfinished work is of another kind.
    """
    with destination.listing_lock():
        if destination.identity() is not None:
            survey = survey_source(source, job.options)
            identity = job.identity(survey.fingerprint)
            if not overwrite:
                destination.refuse_other(identity)
            listing = read_listing(destination.partial)
            if listing is not None and destination.identity() == identity:
                return listing
        destination.clear()
        try:
            listing = _list(destination, job, source)
        except ValueError:
            if job.execution.part is None:
                destination.abandon()
            raise
        destination.begin(job.identity(listing.survey.fingerprint))
        return listing


def _list(destination: Destination, job: _Job, source: Source) -> Listing:
    dropper = None
    if job.options.deduplicate or job.options.near_duplicates is not None:
        dropper = duplicate_dropper(
            job.source,
            job.options,
            destination.partial,
            shards=job.shards,
            workers=job.execution.workers,
        )
    return write_listing(source, job.options, destination.partial, dropper)


def _write(destination: Destination, job: _Job, listing: Listing, progress: Progress) -> None:
    """Write all shards that this run is to write and that are not there yet."""
    part, parts = job.execution.part or (1, 1)
    plans = listing.shards[part - 1 :: parts]
    reports = (read_report(destination.partial, plan.number) for plan in plans)
    done = {report.number: report.found for report in reports if report is not None}
    workers = max(1, min(job.execution.workers, len(plans) - len(done)))
    found = listing.survey.found if parts == 1 else sum(plan.samples for plan in plans)
    progress.planned(
        Plan(
            found=found,
            done=sum(done.values()),
            classes=len(listing.survey.classes),
            shards=len(plans),
            finished=len(done),
            workers=workers,
        )
    )
    labels = {name: label for label, name in enumerate(listing.survey.classes)}
    tasks = (
        ShardTask(
            source=job.source,
            shards=job.shards,
            folder=destination.partial,
            plan=plan,
            labels=labels,
            options=job.options,
        )
        for plan in plans
        if plan.number not in done
    )
    execution = replace(job.execution, workers=workers)
    for report in _map(execution, tasks, progress.tick):
        progress.finished(report)


def _map(execution: Execution, tasks: Iterator[ShardTask], tick: Tick) -> Iterator[ShardReport]:
    if execution.ray:
        return map_on_ray(
            write_shard, tasks, address=execution.address, at_once=execution.workers, tick=tick
        )
    return map_tasks(write_shard, tasks, workers=execution.workers, tick=tick)
