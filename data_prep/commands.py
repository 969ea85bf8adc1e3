"""The commands of `data-prep`: shard, reshard, merge, index, verify and info."""

import hashlib
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from data_prep.channels import RGB, describe, read_name, read_names
from data_prep.executors.processes import Interruption
from data_prep.format.kinds import (
    SECOND_DOT,
    UNCLEAR,
    WITH_QUERY,
    describe_examples,
    describe_kinds,
)
from data_prep.format.manifest import Manifest, read_manifest
from data_prep.format.patterns import Names
from data_prep.format.pipes import PIPE, PipedFile
from data_prep.format.samples import check_image_key
from data_prep.format.statistics_file import STATISTICS_NAME, write_statistics
from data_prep.format.storage import Location, RemotePath, locate
from data_prep.format.text import count_noun, format_bytes
from data_prep.images.checking import MOVED, UNSURE
from data_prep.inspect.contact_sheet import draw_contact_sheet
from data_prep.inspect.index_existing import IndexingOptions, index_existing
from data_prep.inspect.info import describe_shards, describe_statistics
from data_prep.inspect.statistics import measure_set
from data_prep.inspect.verify import MAX_PROBLEMS, verify_shards
from data_prep.write.build import BuildResult, build_shards, merge_parts
from data_prep.write.options import RunOptions, ShardOptions
from data_prep.write.output_dir import REJECTED_NAME, refuse_inside
from data_prep.write.progress import PlanSummary, Progress
from data_prep.write.shard import ShardReport


def write_shards(
    source: str,
    folder: str,
    options: ShardOptions,
    run: RunOptions,
    *,
    from_shards: bool = False,
    staging: Path | None,
    overwrite: bool,
    interruption: Interruption,
) -> int:
    """Run `data-prep shard`, or `reshard` with `from_shards`; return the exit code."""
    origin, destination = locate(source), locate(folder)
    if not from_shards:
        refuse_inside(origin, destination)
    store = destination if isinstance(destination, RemotePath) else None
    with _bar() as bar:
        shown = _ProgressDisplay(bar, source)

        built = build_shards(
            origin,
            _staging(store, staging) if store else Path(folder),
            options,
            store=store,
            shards=from_shards,
            run=run,
            overwrite=overwrite,
            progress=Progress(
                listed=interruption.watch(shown.listed),
                planned=shown.planned,
                counted=shown.counted,
                tick=interruption.watch(bar.update),
                finished=shown.finished,
                uploaded=shown.uploaded,
            ),
        )
    print(_describe_built(built, folder))
    return 0


def merge_set(folder: str, *, max_rejected: float) -> int:
    """Run `data-prep merge` and return its exit code."""
    print(_describe_set(merge_parts(Path(folder), max_rejected=max_rejected), "complete"))
    return 0


class _ProgressDisplay:
    """Progress bar with listing progress, MB/s, rejected images and uploads."""

    def __init__(self, bar: "tqdm[NoReturn]", source: str) -> None:
        self._bar, self._source = bar, source
        self._bytes = self._rejected = 0
        self._sent = ""
        self._started = time.monotonic()

    def listed(self, found: int) -> None:
        self._bar.set_description_str(f"listing, {found:,} found so far" if found else "listing")

    def planned(self, plan: PlanSummary) -> None:
        if plan.labels:
            print(plan.labels)
        print(_describe_plan(plan, self._source))
        self._bar.set_description_str("")
        self._bar.total, self._bar.initial, self._bar.n = plan.found, plan.done, plan.done
        self._bar.refresh()

    def counted(self, found: int) -> None:
        """Set the total, now that all images are listed."""
        self._bar.set_description_str("")
        self._bar.total = found

    def finished(self, report: ShardReport) -> None:
        """Count a finished shard."""
        self._bytes += report.entry.bytes if report.entry else 0
        self._rejected += len(report.rejected)
        self._show()

    def uploaded(self, shards: int, sent: int) -> None:
        """Show the progress of uploads."""
        self._sent = f", uploaded {count_noun(shards, 'shard')}, sent {format_bytes(sent)}"
        self._show()

    def _show(self) -> None:
        seconds = max(1e-3, time.monotonic() - self._started)
        speed = f"{self._bytes / seconds / 1e6:.1f} MB/s"
        self._bar.set_postfix_str(f"{speed}, rejected {self._rejected:,}{self._sent}")


def _staging(destination: RemotePath, parent: Path | None) -> Path:
    """Return the local folder of shards before their upload, the same for every run."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parent = parent or caches / "data-prep"
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Path(parent, hashlib.sha256(destination.url.encode()).hexdigest()[:16])


def index_tars(
    folder: str,
    *,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    image_key: str | None,
    channels: str | None,
    no_data: float | None,
    output: Path | None,
    overwrite: bool,
    allow_missing_end: bool,
    allow_pipe: bool,
    workers: int,
    interruption: Interruption,
) -> int:
    """Run `data-prep index` and return its exit code."""
    with _bar() as bar:
        indexed = index_existing(
            _tars(folder, allow_pipe=allow_pipe),
            output=output,
            options=IndexingOptions(
                names=Names(include=include, exclude=exclude),
                image_key=None if image_key is None else check_image_key(image_key),
                channels=None if channels is None else read_names(channels),
                no_data=no_data,
                allow_missing_end=allow_missing_end,
            ),
            overwrite=overwrite,
            workers=workers,
            tick=interruption.watch(bar.update),
        )
    manifest = indexed.manifest
    print(
        f"{_count_samples(manifest)}, {count_noun(len(manifest.classes), 'class', 'classes')}, "
        f"in {manifest.folder}{_describe_skipped(manifest, rewriting=True)}"
    )
    if indexed.without_image:
        print(f"left out: {count_noun(indexed.without_image, 'sample')} without an image")
    if indexed.empty:
        print(f"left out: tars without any image: {', '.join(indexed.empty)}")
    _warn(indexed.remarks)
    return 0


def _warn(remarks: Iterable[str]) -> None:
    for remark in remarks:
        print(f"WARNING: {remark}", file=sys.stderr)


def _tars(folder: str, *, allow_pipe: bool) -> Location | PipedFile:
    """Return the tars for `index`; commands only if they may run."""
    if folder.startswith(PIPE) and allow_pipe:
        return PipedFile(folder.removeprefix(PIPE))
    return locate(folder)


def verify_set(
    folder: str,
    *,
    deep: bool,
    allow_missing_end: bool,
    allow_pipe: bool,
    workers: int,
    interruption: Interruption,
) -> int:
    """Run `data-prep verify` and return its exit code."""
    manifest = read_manifest(folder, allow_pipe=allow_pipe)
    with _bar(manifest.samples) as bar:
        tick = interruption.watch(bar.update)
        found = verify_shards(
            manifest,
            decode=deep,
            allow_missing_end=allow_missing_end,
            workers=workers,
            tick=tick,
        )
    _warn(found.remarks)
    for note, count in sorted(found.notes.items()):
        print(f"{note}: {count:,}")
    if found.count:
        number = count_noun(found.count, "problem")
        lines = [f"data-prep: {manifest.folder} has {number}; write the shards again:"]
        lines += found.problems
        if found.count > len(found.problems):
            lines.append(f"and {found.count - len(found.problems):,} more")
        print("\n  ".join(lines), file=sys.stderr)
        return 2
    checked = "checksums, indexes and images" if deep else "checksums and indexes"
    print(f"{_count_samples(manifest)}: {checked} are correct")
    if not deep and manifest.options.get("check") is not True:
        print("the images of this set were never decoded; use --deep to decode them")
    return 0


def describe_set(
    folder: str,
    *,
    statistics: bool,
    contact_sheet: Path | None,
    bands: tuple[str, ...] | None,
    allow_pipe: bool,
    workers: int,
    interruption: Interruption,
) -> int:
    """Run `data-prep info` and return its exit code."""
    manifest = read_manifest(folder, allow_pipe=allow_pipe)
    chosen = _find_bands(bands, contact_sheet, manifest)
    with _bar(manifest.samples) as bar:
        tick = interruption.watch(bar.update)
        text = describe_shards(manifest, workers=workers, tick=tick)
    print(text)
    if contact_sheet is not None:
        channels = draw_contact_sheet(manifest, contact_sheet, chosen)
        shown = _describe_bands(chosen, channels, manifest.channels, asked=bands is not None)
        print(f"contact sheet in {contact_sheet}{shown}")
    if not statistics:
        return 0
    with _bar(manifest.samples) as bar:
        tick = interruption.watch(bar.update)
        measured = measure_set(manifest, workers=workers, tick=tick)
    if measured.unreadable:
        number = count_noun(len(measured.unreadable), "image")
        lines = [f"data-prep: no {STATISTICS_NAME} written, since {number} cannot be decoded:"]
        lines += measured.unreadable[:MAX_PROBLEMS]
        print("\n  ".join(lines), file=sys.stderr)
        return 2
    write_statistics(manifest, measured.statistics)
    print(describe_statistics(measured.statistics))
    print(f"written to {manifest.folder / STATISTICS_NAME}")
    return 0


def _find_bands(
    bands: Sequence[str] | None, contact_sheet: Path | None, manifest: Manifest
) -> tuple[int, ...] | None:
    """Return the numbers of the bands to draw; None: the first three, or the first of fewer.

    Raises:
        ValueError: they cannot be drawn, or there is no contact sheet for them.
    """
    names = manifest.channels or ()
    if bands is None:
        has_colours = len(names) > len(RGB) and set(RGB) <= set(names)
        return tuple(map(names.index, RGB)) if has_colours else None
    if contact_sheet is None:
        raise ValueError("--bands chooses those of --contact-sheet PNG: give that too.")
    given = " ".join(bands) or "none"
    try:
        found = tuple(
            int(band) if band.lstrip("-").isdigit() else names.index(read_name(band))
            for band in bands
        )
    except ValueError:
        known = f"has {describe(names)}" if names else "has no names for its channels"
        raise ValueError(
            f"--bands: {manifest.folder} {known}; got {given}. Bands are also counted from 0."
        ) from None
    if len(found) not in (1, 3) or min(found) < 0:
        raise ValueError(f"--bands must be one or three of at least 0, or names, got {given}.")
    return found


def _describe_bands(
    bands: Sequence[int] | None, channels: int, names: Sequence[str] | None, *, asked: bool
) -> str:
    """Return which bands were drawn, unless all are seen: the largest image has `channels`."""
    if bands is None and channels in (0, 1, 3):  # 0: none could be decoded
        return ""
    shown = bands or ((0, 1, 2) if channels > 3 else (0,))
    listed = ", ".join(f"{band} ({names[band]})" if names else str(band) for band in shown)
    drawn = f"bands {listed} as red, green, blue" if len(shown) == 3 else f"band {listed} in grey"
    return f": {drawn}" + ("" if asked else "; --bands chooses others")


def _bar(total: int | None = None) -> "tqdm[NoReturn]":
    # disable=None: drawn only on a terminal.
    return tqdm(total=total, unit=" images", unit_scale=True, disable=None, dynamic_ncols=True)


def _describe_plan(plan: PlanSummary, source: str) -> str:
    if plan.found is None or plan.shards is None:
        text = f"found {count_noun(plan.classes, 'class', 'classes')} in {source}"
        if plan.finished:
            text += f"; {count_noun(plan.finished, 'shard')} already finished"
        return f"{text}; writing shards while images are listed, {plan.workers} at a time"
    classes = count_noun(plan.classes, "class", "classes")
    text = f"found {count_noun(plan.found, 'image')} and {classes} in {source}"
    if plan.finished:
        text += f"; {plan.finished:,} of {count_noun(plan.shards, 'shard')} already finished"
    remaining = count_noun(plan.shards - plan.finished, "shard")
    return f"{text}; writing {remaining}, {plan.workers} at a time"


def _describe_built(built: BuildResult, folder: str) -> str:
    if built.manifest is None:
        return f"this part is complete; when all parts are, run: data-prep merge {folder}"
    verb = "already complete" if built.was_complete else "complete"
    return _describe_set(built.manifest, verb)


def _describe_set(manifest: Manifest, verb: str) -> str:
    length = format_bytes(sum(shard.bytes for shard in manifest.shards))
    found = manifest.samples + manifest.rejected
    counts = f"accepted {manifest.samples:,} + rejected {manifest.rejected:,} = {found:,} found"
    if manifest.rejected:
        counts += f"; see {manifest.folder / REJECTED_NAME}"
    for note, count in sorted(manifest.notes.items()):
        counts += f"\n{note}: {count:,}"
    if UNSURE in manifest.notes and MOVED in manifest.notes:
        counts += (
            "\nwarning: arrays of this set have different numbers of channels, since their axis "
            "was guessed from the shape: give --channels-first or --channels-last"
        )
    counts += _describe_skipped(manifest)
    shards = count_noun(len(manifest.shards), "shard")
    return f"{counts}\n{verb}: {shards}, {length}, in {manifest.folder}"


def _describe_skipped(manifest: Manifest, *, rewriting: bool = False) -> str:
    """Return lines on the files that were met and not taken, or an empty string.

    With `rewriting`, taking them needs other shards: tars that are only indexed keep their names.
    """
    skipped = manifest.skipped
    if not skipped:
        return ""
    unclear = any(kind in UNCLEAR or kind.endswith(WITH_QUERY) for kind in skipped)
    option = "`data-prep shard TAR DST --include GLOB`" if rewriting else "--include GLOB"
    hint = f"; {option} takes files whatever their suffix" if unclear else ""
    if any(kind.endswith(SECOND_DOT) for kind in skipped):
        hint += (
            "; the key of a sample ends at the first dot of a name: KEY.b.jpg is a member b.jpg, "
            "not its image, so "
        )
        hint += "name it by --image-key b.jpg, or " if rewriting else ""
        hint += "write tars of names with one dot"
    if ".cls" in skipped and not rewriting:
        hint += (
            "; labels in .cls are read from uncompressed WebDataset tars alone, by `data-prep "
            "reshard` and `index`"
        )
    lines = [f"\nskipped: {describe_kinds(skipped)}{hint}"]
    return "\n  ".join([*lines, *describe_examples(skipped, manifest.skipped_examples)])


def _count_samples(manifest: Manifest) -> str:
    return (
        f"{count_noun(manifest.samples, 'sample')} in {count_noun(len(manifest.shards), 'shard')}"
    )
