"""The commands of `data-prep`: shard, reshard, merge, index, verify and info."""

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

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
from data_prep.format.statistics_file import STATISTICS_NAME, write_statistics
from data_prep.format.storage import Location, RemotePath, locate
from data_prep.format.text import count_noun, format_bytes
from data_prep.images.checking import MOVED, UNSURE
from data_prep.images.settings import Encoding
from data_prep.inspect.contact_sheet import draw_contact_sheet
from data_prep.inspect.index_existing import IndexingOptions, index_existing
from data_prep.inspect.info import describe_shards, describe_statistics
from data_prep.inspect.statistics import measure_set
from data_prep.inspect.verify import MAX_PROBLEMS, verify_shards
from data_prep.sources.files import Selection
from data_prep.write.build import BuildResult, build_shards, merge_parts
from data_prep.write.options import RunOptions, ShardOptions
from data_prep.write.output_dir import REJECTED_NAME, refuse_inside
from data_prep.write.progress import PlanSummary, Progress
from data_prep.write.shard import ShardReport


def run_command(arguments: argparse.Namespace, interruption: Interruption) -> int:
    """Run a command of `data-prep` and return its exit code; see `data_prep.cli.main`."""
    match arguments.command:
        case "shard" | "reshard":
            return _shard(arguments, interruption)
        case "merge":
            manifest = merge_parts(Path(arguments.folder), max_rejected=arguments.max_rejected)
            print(_describe_set(manifest, "complete"))
            return 0
        case "index":
            return _index(arguments, interruption)
        case "verify":
            return _verify(arguments, interruption)
        case command:
            assert command == "info", command
            return _info(arguments, interruption)


def _shard(arguments: argparse.Namespace, interruption: Interruption) -> int:
    source, destination = locate(arguments.source), locate(arguments.folder)
    if arguments.command == "shard":
        refuse_inside(source, destination)
    store = destination if isinstance(destination, RemotePath) else None
    folder = _staging(store, arguments) if store else Path(arguments.folder)
    with _bar() as bar:
        shown = _ProgressDisplay(bar, arguments.source)

        built = build_shards(
            source,
            folder,
            _shard_options(arguments),
            store=store,
            shards=arguments.command == "reshard",
            run=_run_options(arguments),
            overwrite=arguments.overwrite,
            progress=Progress(
                listed=interruption.watch(shown.listed),
                planned=shown.planned,
                counted=shown.counted,
                tick=interruption.watch(bar.update),
                finished=shown.finished,
                uploaded=shown.uploaded,
            ),
        )
    print(_describe_built(built, arguments.folder))
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


def _staging(destination: RemotePath, arguments: argparse.Namespace) -> Path:
    """Return the local folder of shards before their upload, the same for every run."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parent = arguments.staging or caches / "data-prep"
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Path(parent, hashlib.sha256(destination.url.encode()).hexdigest()[:16])


def _index(arguments: argparse.Namespace, interruption: Interruption) -> int:
    with _bar() as bar:
        indexed = index_existing(
            _tars(arguments),
            output=arguments.output,
            options=IndexingOptions(
                names=Names(include=tuple(arguments.include), exclude=tuple(arguments.exclude)),
                allow_missing_end=arguments.allow_missing_end,
            ),
            overwrite=arguments.overwrite,
            workers=arguments.workers,
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


def _tars(arguments: argparse.Namespace) -> Location | PipedFile:
    """Return the tars for `index`; commands only if they may run."""
    if arguments.folder.startswith(PIPE) and arguments.allow_pipe:
        return PipedFile(arguments.folder.removeprefix(PIPE))
    return locate(arguments.folder)


def _verify(arguments: argparse.Namespace, interruption: Interruption) -> int:
    manifest = read_manifest(arguments.folder, allow_pipe=arguments.allow_pipe)
    with _bar(manifest.samples) as bar:
        tick = interruption.watch(bar.update)
        found = verify_shards(
            manifest,
            decode=arguments.deep,
            allow_missing_end=arguments.allow_missing_end,
            workers=arguments.workers,
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
    checked = "checksums, indexes and images" if arguments.deep else "checksums and indexes"
    print(f"{_count_samples(manifest)}: {checked} are correct")
    if not arguments.deep and manifest.options.get("check") is not True:
        print("the images of this set were never decoded; use --deep to decode them")
    return 0


def _info(arguments: argparse.Namespace, interruption: Interruption) -> int:
    bands = _bands(arguments)
    manifest = read_manifest(arguments.folder, allow_pipe=arguments.allow_pipe)
    with _bar(manifest.samples) as bar:
        tick = interruption.watch(bar.update)
        text = describe_shards(manifest, workers=arguments.workers, tick=tick)
    print(text)
    if arguments.contact_sheet is not None:
        channels = draw_contact_sheet(manifest, arguments.contact_sheet, bands)
        print(f"contact sheet in {arguments.contact_sheet}{_describe_bands(bands, channels)}")
    if not arguments.statistics:
        return 0
    with _bar(manifest.samples) as bar:
        tick = interruption.watch(bar.update)
        measured = measure_set(manifest, workers=arguments.workers, tick=tick)
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


def _bands(arguments: argparse.Namespace) -> tuple[int, ...] | None:
    """Return the bands to draw, None for the first ones.

    Raises:
        ValueError: they cannot be drawn, or there is no contact sheet to draw them in.
    """
    if arguments.bands is None:
        return None
    if arguments.contact_sheet is None:
        raise ValueError("--bands chooses those of --contact-sheet PNG: give that too.")
    if len(arguments.bands) not in (1, 3) or min(arguments.bands) < 0:
        given = " ".join(map(str, arguments.bands))
        raise ValueError(f"--bands must be one or three numbers of at least 0, got {given}.")
    return tuple(arguments.bands)


def _describe_bands(bands: Sequence[int] | None, channels: int) -> str:
    """Return which bands were drawn, unless all are seen: the largest image has `channels`."""
    if bands is None and channels in (0, 1, 3):  # 0: none could be decoded
        return ""
    shown = bands or ((0, 1, 2) if channels > 3 else (0,))
    numbers = ", ".join(map(str, shown))
    drawn = f"bands {numbers} as red, green, blue" if len(shown) == 3 else f"band {numbers} in grey"
    return f": {drawn}" + ("" if bands else "; --bands chooses others")


def _shard_options(arguments: argparse.Namespace) -> ShardOptions:
    """Return the options that determine the contents of the shards."""
    return ShardOptions(
        samples_per_shard=arguments.samples_per_shard,
        bytes_per_shard=arguments.bytes_per_shard,
        selection=Selection(
            include=tuple(arguments.include),
            exclude=tuple(arguments.exclude),
            max_bytes=arguments.max_bytes,
            split_column=arguments.split_column,
            only_split=arguments.only_split,
            path_column=arguments.path_column,
            label_column=arguments.label_column,
            root=arguments.root,
            allow_missing_end=arguments.allow_missing_end,
        ),
        seed=arguments.seed,
        shuffle=not arguments.no_shuffle,
        shuffle_window=arguments.shuffle_window,
        validation_fraction=arguments.validation_fraction,
        deduplicate=arguments.deduplicate,
        near_duplicates=arguments.near_duplicates,
        check=not arguments.no_check,
        max_pixels=arguments.max_pixels,
        channel_axis=arguments.channel_axis,
        encoding=Encoding(
            max_side=arguments.max_side,
            short_side=arguments.short_side,
            format=arguments.format,
            quality=arguments.quality,
        ),
    )


def _run_options(arguments: argparse.Namespace) -> RunOptions:
    """Return the options for how the work is done."""
    return RunOptions(
        workers=arguments.workers,
        ray=arguments.executor == "ray",
        address=arguments.address,
        part=arguments.part,
        max_rejected=arguments.max_rejected,
    )


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
            "not its image, so write tars of names with one dot"
        )
    if ".cls" in skipped and not rewriting:
        hint += (
            "; labels in .cls are read from uncompressed WebDataset tars alone, by `data-prep "
            "reshard` and `index`"
        )
    lines = [f"\nskipped: {describe_kinds(skipped)}{hint}"]
    return "\n  ".join([*lines, *describe_examples(skipped, manifest.examples)])


def _count_samples(manifest: Manifest) -> str:
    return (
        f"{count_noun(manifest.samples, 'sample')} in {count_noun(len(manifest.shards), 'shard')}"
    )
