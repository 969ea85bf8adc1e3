"""Building a set of shards from a source, from listing to manifest."""

import shutil
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.channels import are_pictures, describe
from data_prep.executors.processes import Tick
from data_prep.format.manifest import MANIFEST_NAME, Manifest, read_manifest
from data_prep.format.patterns import is_pattern
from data_prep.format.storage import Location, RemotePath
from data_prep.sources.files import SourceError
from data_prep.sources.image_source import ImageSource, open_source
from data_prep.sources.lists import ListSource
from data_prep.write.classes import find_classes
from data_prep.write.duplicates import make_duplicate_filter
from data_prep.write.finalize import check_parts, finalize_set, refuse_unread_archives
from data_prep.write.listing import (
    SourceListing,
    read_listing,
    survey_source,
    write_listing,
)
from data_prep.write.options import RunOptions, ShardOptions
from data_prep.write.output_dir import (
    Identity,
    OutputDir,
    OutputDirError,
    open_output_dir,
    read_complete_set,
    refuse_inside,
    refuse_other_files,
)
from data_prep.write.plan import ShardPlan
from data_prep.write.progress import PlanSummary, Progress
from data_prep.write.shard import ShardReport, ShardTask, finished_shards, map_shards
from data_prep.write.streaming import StreamedListing, listing_name
from data_prep.write.upload_queue import UploadQueue


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """Result of `build_shards`."""

    manifest: Manifest | None
    """The finished set; None after one part, which is yet to be merged with the others."""
    found: int
    """Number of images found: samples and rejected."""
    was_complete: bool
    """Whether the set was complete before."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    source: Location
    shards: bool
    options: ShardOptions
    run: RunOptions

    def open(self, folder: Path, scratch: Path | None = None) -> ImageSource:
        """Open the source; the output folder must not be inside it."""
        return open_source(
            self.source,
            self.options.selection,
            shards=self.shards,
            ordered=self.options.window is not None,
            without=folder,
            scratch=scratch,
        )

    def identity(self, fingerprint: str) -> Identity:
        options = {"source": self.source.name, **self.options.values()}
        return Identity(options=options, fingerprint=fingerprint)


def build_shards(
    source_path: Location,
    folder: Path,
    options: ShardOptions,
    *,
    store: RemotePath | None = None,
    shards: bool = False,
    run: RunOptions | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BuildResult:
    """Write the images of a folder, an archive, a list or other shards as shards.

    The same input and options give the same bytes, however the work is done. An interrupted run
    leaves its finished shards in `.partial`, and the next call resumes from them.

    Shards for a store are uploaded as they finish: `folder` holds at most 3 per worker, and is
    removed once the set is complete.

    Args:
        source_path: the source.
        folder: output folder.
        store: URL of the set, which then is stored only there; None: it stays in `folder`.
        options: contents of the shards.
        shards: whether the source is a folder of WebDataset tars.
        run: workers, parts and limits of this run.
        overwrite: whether to replace a set written from something else.
        progress: callbacks.

    Raises:
        SourceError: the source is missing, empty, or too few of its images can be used.
        OutputDirError: the folder holds something that must not be overwritten.
        StorageError: the store does not answer, or holds something that must not be overwritten.
        OSError: the folder cannot be written.
    """
    run, progress = run or RunOptions(), progress or Progress()
    folder = folder.resolve()
    if isinstance(source_path, Path):
        source_path = source_path.resolve()
    if run.part and overwrite:
        raise OutputDirError("--overwrite would remove the work of other parts: leave it out.")
    if run.part and store:
        raise OutputDirError("--part writes to a folder that all parts share, not to a URL.")
    if shards:
        options = _with_source_channels(source_path, options)
    job = _Job(source=source_path, shards=shards, options=options, run=run)
    if not shards:  # a folder of shards is read without its subfolders
        refuse_inside(source_path, folder)
    with closing(job.open(folder)) as source:
        refuse_other_files(folder)
        place = store or folder
        if not overwrite and (place / MANIFEST_NAME).exists():
            built = _read_built(place, job, source, progress)
            if store and folder.exists():
                with open_output_dir(folder):
                    shutil.rmtree(folder)
            return built
        part = run.part[0] if run.part else None
        opened = open_output_dir(folder, part=part, store=store, overwrite=overwrite)
        with opened as output:
            if not overwrite and (place / MANIFEST_NAME).exists():  # since the check above
                return _read_built(place, job, source, progress)
            output.check_version(overwrite=overwrite)
            make = _list_and_write if options.streams else _list_then_write
            with closing(job.open(folder, output.partial)) as shared:
                listing = make(output, job, shared, progress, overwrite=overwrite)
            manifest = None
            if run.part is None:
                manifest = finalize_set(output, listing, max_rejected=run.max_rejected)
    return BuildResult(manifest=manifest, found=listing.survey.found, was_complete=False)


def _with_source_channels(source: Location, options: ShardOptions) -> ShardOptions:
    """Return the options with the channel names and no-data value of a set that is rewritten.

    Raises:
        SourceError: other names are given than the set has.
    """
    folder = source.parent if is_pattern(source) else source
    if not (folder / MANIFEST_NAME).exists():
        return options
    manifest = read_manifest(folder)
    names, given = manifest.channels, options.channel_names
    if names is not None and (not are_pictures(names) or "channels" in manifest.options):
        if given not in (None, names):
            raise SourceError(
                f"the set in {folder} has channels {describe(names)}, and --channels names "
                f"{describe(given)}: leave it out; training takes channels by name."
            )
        options = replace(options, channels=",".join(names))
    if manifest.no_data is not None and options.no_data is None:
        options = replace(options, no_data=manifest.no_data)
    return options


def _read_built(place: Location, job: _Job, source: ImageSource, progress: Progress) -> BuildResult:
    """Return a set that is complete already.

    Raises:
        OutputDirError: it was made from something else.
    """
    survey = survey_source(source, job.options, progress.listed)
    complete = read_complete_set(place, job.identity(survey.fingerprint))
    return BuildResult(manifest=complete, found=survey.found, was_complete=True)


def merge_parts(folder: Path, *, max_rejected: float = 1.0) -> Manifest:
    """Combine the parts of a run into a set.

    Raises:
        OutputDirError: a part is still running, or shards are missing.
        SourceError: too few images can be used.
    """
    folder = folder.resolve()
    if not folder.is_dir() or not any(folder.glob(".partial/made-from.json")):
        raise OutputDirError(
            f"{folder} has no parts to merge. Write them: data-prep shard SRC {folder} --part 1/N"
        )
    with open_output_dir(folder) as output:
        output.check_version()
        listing = read_listing(output.partial)
        made_from = output.identity()
        if listing is None or made_from is None or not made_from.fingerprint:
            raise OutputDirError(f"{folder} has no complete part. Run the parts again.")
        check_parts(output, listing)
        return finalize_set(output, listing, max_rejected=max_rejected)


def _reuse_or_write_listing(
    output: OutputDir, job: _Job, source: ImageSource, listed: Tick, *, overwrite: bool
) -> SourceListing:
    """Return the listing of the unfinished work if the source is unchanged, otherwise a new one.

    Raises:
        OutputDirError: the unfinished work was made from something else.
    """
    with output.listing_lock():
        if output.identity() is not None:
            survey = survey_source(source, job.options, listed)
            identity = job.identity(survey.fingerprint)
            if not overwrite:
                output.check_identity(identity)
            listing = read_listing(output.partial)
            if listing is not None and output.identity() == identity:
                return listing
        output.clear()
        try:
            listing = _list(output, job, source, listed)
        except ValueError:
            if job.run.part is None:
                output.abandon()
            raise
        output.begin(job.identity(listing.survey.fingerprint))
        return listing


def _list(output: OutputDir, job: _Job, source: ImageSource, listed: Tick) -> SourceListing:
    filter_duplicates = None
    if job.options.deduplicate or job.options.near_duplicates is not None:
        filter_duplicates = make_duplicate_filter(
            job.source,
            job.options,
            output.partial,
            shards=job.shards,
            workers=job.run.workers,
        )
    return write_listing(source, job.options, output.partial, filter_duplicates, listed)


def _reload_log(output: OutputDir) -> None:
    if output.upload is not None:  # its log may have been removed with the other files
        output.upload.reload_log()


def _list_then_write(
    output: OutputDir, job: _Job, source: ImageSource, progress: Progress, *, overwrite: bool
) -> SourceListing:
    """List the whole source, then write all shards of this run that are not finished."""
    listing = _reuse_or_write_listing(output, job, source, progress.listed, overwrite=overwrite)
    try:
        refuse_unread_archives(listing.survey, max_rejected=job.run.max_rejected)
    except SourceError:
        if job.run.part is None and not finished_shards(output.partial):
            output.abandon()
        raise
    plans = [plan for plan in listing.shards if job.run.writes(plan.number)]
    _reload_log(output)
    reports = output.reports(plan.number for plan in plans)
    done = {report.number: report.found for report in reports if report is not None}
    workers = max(1, min(job.run.workers, len(plans) - len(done)))
    everything = job.run.part is None
    progress.planned(
        PlanSummary(
            found=listing.survey.found if everything else sum(plan.samples for plan in plans),
            done=sum(done.values()),
            classes=len(listing.survey.classes),
            shards=len(plans),
            finished=len(done),
            workers=workers,
            labels=_describe_labels(source, listing.survey.doubts),
        )
    )
    missing = (plan for plan in plans if plan.number not in done)
    job = replace(job, run=replace(job.run, workers=workers))
    _write(output, job, missing, listing.survey.classes, progress, done=done)
    return listing


def _list_and_write(
    output: OutputDir, job: _Job, source: ImageSource, progress: Progress, *, overwrite: bool
) -> SourceListing:
    """Write shards while the source is listed, except those already finished."""
    _begin_streaming(output, job, overwrite=overwrite)
    try:
        listing = _stream(output, job, source, progress, overwrite=overwrite)
    except ValueError:
        if job.run.part is None and not finished_shards(output.partial):
            output.abandon()
        raise
    with output.listing_lock():
        identity = job.identity(listing.survey.fingerprint)
        if not overwrite:
            output.check_identity(identity)
        output.begin(identity)
    return listing


def _stream(
    output: OutputDir, job: _Job, source: ImageSource, progress: Progress, *, overwrite: bool
) -> SourceListing:
    run = job.run
    _reload_log(output)
    done = {
        report.number: report
        for report in output.reports(finished_shards(output.partial))
        if report is not None and run.writes(report.number)
    }
    progress.listed(0)
    classes = find_classes(source, job.options.selection)
    progress.planned(
        PlanSummary(
            found=None,
            done=sum(report.found for report in done.values()),
            classes=len(classes.names),
            shards=None,
            finished=len(done),
            workers=run.workers,
            labels=_describe_labels(source, classes.doubts),
        )
    )
    streamed = StreamedListing(
        source,
        job.options,
        output.partial,
        classes=classes,
        needed=lambda plan: run.writes(plan.number) and not _fits(plan, done),
        name=str(run.part[0] if run.part else 0),
        listed=progress.listed,
    )
    try:
        mine = _select(streamed.plans(), run, progress.counted)
        missing = _unfinished(output, mine, done, overwrite=overwrite)
        _write(output, job, missing, classes.names, progress, done=done)
        return streamed.finish()
    finally:
        streamed.discard()


def _describe_labels(source: ImageSource, doubts: str) -> str:
    lines = [source.describe_columns()] if isinstance(source, ListSource) else []
    if doubts:
        lines.append(
            f"the class of an image is the folder that holds it: {doubts}. A list of paths and "
            "labels sets other classes"
        )
    return "\n".join(lines)


def _begin_streaming(output: OutputDir, job: _Job, *, overwrite: bool) -> None:
    """Resume unfinished work with the same options, or start afresh.

    Raises:
        OutputDirError: the unfinished work was made from something else.
    """
    with output.listing_lock():
        identity, made_from = job.identity(""), output.identity()
        if made_from is not None and not overwrite:
            output.check_identity(identity)
        if made_from is None or not made_from.is_compatible_with(identity):
            output.clear()
            output.begin(identity)


def _select(plans: Iterator[ShardPlan], run: RunOptions, counted: Tick) -> Iterator[ShardPlan]:
    """Yield the plans of the shards of this run, then report the number of their images."""
    samples = 0
    for plan in plans:
        if run.writes(plan.number):
            samples += plan.samples
            yield plan
    counted(samples)


def _unfinished(
    output: OutputDir,
    plans: Iterator[ShardPlan],
    done: dict[int, ShardReport],
    *,
    overwrite: bool,
) -> Iterator[ShardPlan]:
    """Yield the plans of unfinished shards, once all finished ones have proved to match.

    With `overwrite`, finished shards that do not match are first removed from `done`.

    Raises:
        OutputDirError: a finished shard was made from something else and must not be replaced.
    """
    waiting: list[ShardPlan] = []
    left = set(done)
    for plan in plans:
        if not _fits(plan, done):
            if plan.number in done and not overwrite:
                raise output.mismatch_error()
            done.pop(plan.number, None)
            waiting.append(plan)
        left.discard(plan.number)
        if not left:
            yield from waiting
            waiting = []
    if left and not overwrite:
        raise output.mismatch_error()
    for number in left:
        del done[number]
    yield from waiting


def _fits(plan: ShardPlan, done: dict[int, ShardReport]) -> bool:
    """Return whether a shard is finished and was made from the planned files."""
    return plan.number in done and done[plan.number].listing == plan.digest


def _write(
    output: OutputDir,
    job: _Job,
    plans: Iterable[ShardPlan],
    classes: Sequence[str],
    progress: Progress,
    *,
    done: Container[int],
) -> None:
    labels = {name: label for label, name in enumerate(classes)}
    tasks = (
        ShardTask(
            source=job.source,
            shards=job.shards,
            folder=output.partial,
            plan=plan,
            labels=labels,
            options=job.options,
        )
        for plan in plans
    )
    with _open_queue(output, job.run, progress, done) as queue:
        may_start = queue.may_start if queue else lambda _: True
        for report in map_shards(job.run, tasks, progress.tick, may_start):
            (output.partial / listing_name(report.number)).unlink(missing_ok=True)
            progress.finished(report)
            if queue:
                queue.add(report)
        if queue:
            queue.finish()


def _open_queue(
    output: OutputDir, run: RunOptions, progress: Progress, done: Container[int]
) -> AbstractContextManager[UploadQueue | None]:
    if output.upload is None:
        return nullcontext()
    return UploadQueue(
        output.upload,
        output.partial,
        done,
        workers=run.workers,
        uploaded=progress.uploaded,
    )
