"""Summary of a set of shards from its indexes and image headers, as a table."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data_prep.executors.processes import Tick, map_tasks
from data_prep.format.index import ShardIndex, read_images, read_index
from data_prep.format.kinds import describe_examples, describe_kinds
from data_prep.format.manifest import Manifest, ShardEntry
from data_prep.format.statistics_file import Statistics
from data_prep.format.storage import Location
from data_prep.format.text import count_noun, count_range, format_bytes, printable
from data_prep.images.arrays import read_header
from data_prep.images.opening import KEPT, open_picture
from data_prep.images.settings import MAX_READ_PIXELS
from data_prep.inspect.pixels import stored_form

MAX_HEADERS = 10_000
"""Maximum number of image headers read, evenly spread over the set."""

_SAMPLES_PER_WORKER = 20_000
_MODES = {"1": "grey", "L": "grey", "P": "palette", "LA": "grey with transparency"}
_MODES |= {"RGB": "colour", "RGBA": "colour with transparency", "I;16": "grey of 16 bits"}
_MAX_CLASSES = 20
_MAX_CHANNELS = 16
_PERCENTILES = (0, 5, 50, 95, 100)


@dataclass(kw_only=True)
class SetSummary:
    """Counts over some of the shards of a set."""

    per_class: NDArray[np.int64]
    """Samples per class, shape (classes,); labels beyond the classes are not counted."""
    labelled: int = 0
    """Samples with a label."""
    bytes: int = 0
    """Total length of the image files in bytes."""
    largest: int = 0
    """Length of the largest image file in bytes."""
    extensions: Counter[str] = field(default_factory=Counter)
    """Samples per extension."""
    sizes: list[NDArray[np.int64]] = field(default_factory=list)
    """(width, height) of the images whose headers were read, each of shape (images, 2)."""
    layouts: Counter[str] = field(default_factory=Counter)
    """Images per channel layout, as a phrase."""
    unreadable: int = 0
    """Images whose headers could not be read."""

    def add(self, other: "SetSummary") -> None:
        """Add the counts of other shards of the same set."""
        self.per_class = self.per_class + other.per_class
        self.labelled += other.labelled
        self.bytes += other.bytes
        self.largest = max(self.largest, other.largest)
        self.extensions += other.extensions
        self.sizes += other.sizes
        self.layouts += other.layouts
        self.unreadable += other.unreadable


@dataclass(frozen=True, kw_only=True)
class _SummaryTask:
    folder: Location
    shard: ShardEntry
    classes: int
    rows: NDArray[np.int64]


def summarize_set(
    manifest: Manifest, *, workers: int = 1, tick: Tick = lambda _: None
) -> SetSummary:
    """Return the counts of a set; at most `MAX_HEADERS` image headers are read.

    Raises:
        ManifestError: an index is missing or does not fit.
        OSError: a shard cannot be read.
    """
    rows = spread_rows([shard.samples for shard in manifest.shards], MAX_HEADERS)
    classes = len(manifest.classes)
    tasks = (
        _SummaryTask(folder=manifest.folder, shard=shard, classes=classes, rows=rows[number])
        for number, shard in enumerate(manifest.shards)
    )
    # Starting a process takes as long as thousands of headers.
    workers = max(1, min(workers, len(manifest.shards), manifest.samples // _SAMPLES_PER_WORKER))
    summary = SetSummary(per_class=np.zeros(classes, dtype=np.int64))
    for part in map_tasks(_summarize_shard, tasks, workers=workers, tick=tick):
        summary.add(part)
    return summary


def _summarize_shard(task: _SummaryTask, tick: Tick) -> SetSummary:
    index = read_index(task.folder, task.shard)
    counted = index.labels[(index.labels >= 0) & (index.labels < task.classes)]
    summary = SetSummary(
        per_class=np.bincount(counted, minlength=task.classes).astype(np.int64),
        labelled=int(np.count_nonzero(index.labels >= 0)),
        bytes=int(index.sizes.sum()),
        largest=int(index.sizes.max()),
        extensions=Counter(index.extensions.tolist()),
    )
    _read_headers(
        summary, index, task.rows, read_images(task.shard.location(task.folder), index, task.rows)
    )
    tick(len(index))
    return summary


def _read_headers(
    summary: SetSummary, index: ShardIndex, rows: NDArray[np.int64], images: Iterable[bytes]
) -> None:
    sizes = []
    for row, data in zip(rows, images, strict=True):
        try:
            stored = stored_form(data, str(index.extensions[row]), max_pixels=MAX_READ_PIXELS)
            width, height, layout = _read_header(*stored)
        except MemoryError:
            raise
        # Pillow's readers raise nearly any type when the bytes are hostile.
        except Exception:
            summary.unreadable += 1
        else:
            sizes.append((width, height))
            summary.layouts[layout] += 1
    summary.sizes = [np.array(sizes, dtype=np.int64).reshape(-1, 2)]


def _read_header(data: bytes, extension: str) -> tuple[int, int, str]:
    if extension == "npy":
        header = read_header(data)
        height, width = header.shape[:2]
        channels = count_noun(header.channels, "channel")
        return width, height, f"array of {channels}, {header.dtype.name}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_picture(data, tuple(KEPT)) as image:
            return image.width, image.height, _MODES.get(image.mode, image.mode)


def spread_rows(samples: list[int], most: int) -> list[NDArray[np.int64]]:
    """Return rows per shard of samples evenly spread over all shards.

    Args:
        samples: number of samples per shard.
        most: maximum number of samples to choose.
    """
    total = sum(samples)
    taken = min(most, total)
    # Python integers, since the product of two large numbers may overflow.
    places = np.array([place * total // taken for place in range(taken)], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(samples)])
    cuts = np.searchsorted(places, starts)
    return [
        places[cuts[number] : cuts[number + 1]] - starts[number] for number in range(len(samples))
    ]


def describe_shards(manifest: Manifest, *, workers: int = 1, tick: Tick = lambda _: None) -> str:
    """Return a table of counts, sizes, formats and classes.

    Raises:
        ManifestError: an index is missing or does not fit.
        OSError: a shard cannot be read.
    """
    summary = summarize_set(manifest, workers=workers, tick=tick)
    samples = np.array([shard.samples for shard in manifest.shards])
    lengths = np.array([shard.bytes for shard in manifest.shards])
    rows = [
        ("folder", str(manifest.folder)),
        ("source", str(manifest.options.get("source", "tars written by someone else"))),
        ("samples", f"{manifest.samples:,} ({_describe_counts(summary.extensions)})"),
        ("rejected", f"{manifest.rejected:,}"),
        ("shards", f"{len(samples):,} with {count_range(samples.min(), samples.max())} samples"),
        ("size", f"{format_bytes(lengths.sum())}, {format_bytes(lengths.mean())} per shard"),
        (
            "image file",
            (
                f"{format_bytes(summary.bytes / manifest.samples)} on average, "
                f"{format_bytes(summary.largest)} at most"
            ),
        ),
        *_describe_sizes(summary, manifest.samples),
        *([("names", ", ".join(manifest.channels))] if manifest.channels else []),
        *([] if manifest.no_data is None else [("no data", f"{manifest.no_data:g}")]),
        ("labelled", f"{summary.labelled:,} of {manifest.samples:,}"),
        *(("notes", f"{note}: {count:,}") for note, count in sorted(manifest.notes.items())),
        *([("skipped", describe_kinds(manifest.skipped))] if manifest.skipped else []),
        *(
            ("", f"  {line}")
            for line in describe_examples(manifest.skipped, manifest.skipped_examples)
        ),
        ("classes", f"{len(manifest.classes):,}"),
    ]
    lines = [f"{name:<11} {value}" for name, value in rows]
    per_class = summary.per_class.tolist()
    for name, count in list(zip(manifest.classes, per_class, strict=True))[:_MAX_CLASSES]:
        lines.append(f"  {count:>9,} {printable(name)}")
    if len(manifest.classes) > _MAX_CLASSES:
        lines.append(f"  and {len(manifest.classes) - _MAX_CLASSES:,} more classes")
    return "\n".join(lines)


def describe_statistics(statistics: Sequence[Statistics]) -> str:
    """Return a table of statistics, with mean and std in a form to copy into a recipe."""
    lines = []
    for one in statistics:
        images = count_noun(one.images, "array" if one.is_array else "picture")
        missing = f"; values left out: {one.missing:,}" if one.missing else ""
        channels = count_noun(one.channels, "channel")
        lines.append(f"statistics  {images}, {channels}, {one.scale}{missing}")
        lines += [
            f"  {name:<9} {_describe_numbers(values)}"
            for name, values in (("mean", one.mean), ("std", one.std))
        ]
    return "\n".join(lines)


def _describe_counts(counts: Counter[str]) -> str:
    return ", ".join(
        count_noun(count, name, re.sub(r"\Aarray\b", "arrays", name))
        for name, count in sorted(counts.items())
    )


def _describe_sizes(summary: SetSummary, samples: int) -> list[tuple[str, str]]:
    sizes = np.concatenate(summary.sizes)
    examined = len(sizes) + summary.unreadable
    of = f", of {examined:,} images read" if examined < samples else ""
    rows = [("channels", f"{_describe_counts(summary.layouts)}{of}")]
    if summary.unreadable:
        rows.append(("unreadable", f"{summary.unreadable:,}; see `data-prep verify --deep`"))
    if not len(sizes):
        return rows
    for name, values in (
        ("width", sizes[:, 0]),
        ("height", sizes[:, 1]),
        ("short side", sizes.min(axis=1)),
    ):
        low, few, middle, most, high = np.percentile(
            values, _PERCENTILES, method="nearest"
        ).tolist()
        text = f"{low:,} to {high:,} pixels, median {middle:,}, 90% in {few:,} to {most:,}"
        if low == high:
            text = f"{low:,} pixels"
        rows.append((name, text))
    return rows


def _describe_numbers(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:.6g}" for value in values[:_MAX_CHANNELS])
    more = f", ... {len(values)} in all" if len(values) > _MAX_CHANNELS else ""
    return f"[{shown}{more}]"
