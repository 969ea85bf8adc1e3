"""What a set of shards holds, as a table for a person."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from data_prep.format.index import Tick
from data_prep.format.manifest import Manifest
from data_prep.format.statistics_file import Statistics
from data_prep.inspect.survey import Survey, survey_set

_MOST_CLASSES = 20
_MOST_CHANNELS = 16
_PERCENTILES = (0, 5, 50, 95, 100)


def describe_shards(manifest: Manifest, *, workers: int = 1, tick: Tick = lambda _: None) -> str:
    """Return a table of counts, sizes, formats and classes.

    Raises:
        ManifestError: an index is missing or does not fit.
        OSError: a shard cannot be read.
    """
    survey = survey_set(manifest, workers=workers, tick=tick)
    samples = np.array([shard.samples for shard in manifest.shards])
    lengths = np.array([shard.bytes for shard in manifest.shards])
    rows = [
        ("folder", str(manifest.folder)),
        ("source", str(manifest.options.get("source", "tars written by someone else"))),
        ("samples", f"{manifest.samples:,} ({_describe_counts(survey.extensions)})"),
        ("rejected", f"{manifest.rejected:,}"),
        ("shards", f"{len(samples):,} of {samples.min():,} to {samples.max():,} samples"),
        ("size", f"{describe_bytes(lengths.sum())}, {describe_bytes(lengths.mean())} a shard"),
        (
            "image file",
            (
                f"{describe_bytes(survey.bytes / manifest.samples)} on average, "
                f"{describe_bytes(survey.largest)} at most"
            ),
        ),
        *_describe_sizes(survey, manifest.samples),
        ("labelled", f"{survey.labelled:,} of {manifest.samples:,}"),
        *(("notes", f"{note}: {count:,}") for note, count in sorted(manifest.notes.items())),
        ("classes", f"{len(manifest.classes):,}"),
    ]
    lines = [f"{name:<11} {value}" for name, value in rows]
    per_class = survey.per_class.tolist()
    for name, count in list(zip(manifest.classes, per_class, strict=True))[:_MOST_CLASSES]:
        lines.append(f"  {count:>9,} {printable(name)}")
    if len(manifest.classes) > _MOST_CLASSES:
        lines.append(f"  and {len(manifest.classes) - _MOST_CLASSES:,} more classes")
    return "\n".join(lines)


def describe_statistics(statistics: Sequence[Statistics]) -> str:
    """Return a table of what was measured, with the settings to copy into a recipe."""
    lines = []
    for one in statistics:
        kind = "arrays" if one.is_array else "pictures"
        missing = f"; {one.missing:,} values are NaN and left out" if one.missing else ""
        channels = f"channels: {one.channels:,}"
        lines.append(f"statistics  {one.images:,} {kind}, {channels}, {one.scale}{missing}")
        lines += [
            f"  {name:<9} {_describe_numbers(values)}"
            for name, values in (("mean", one.mean), ("std", one.std))
        ]
    return "\n".join(lines)


def describe_bytes(length: float) -> str:
    """Return a length in bytes with a unit that suits it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if length < 1024:
            return f"{length:.0f} {unit}" if unit == "B" else f"{length:.1f} {unit}"
        length /= 1024
    return f"{length:.1f} TiB"


def printable(name: str) -> str:
    """Return a class's name as text of one line: a folder's name need not be that."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def _describe_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))


def _describe_sizes(survey: Survey, samples: int) -> list[tuple[str, str]]:
    sizes = np.concatenate(survey.sizes)
    looked = len(sizes) + survey.unreadable
    of = f", of {looked:,} looked at" if looked < samples else ""
    rows = [("channels", f"{_describe_counts(survey.layouts)}{of}")]
    if survey.unreadable:
        rows.append(("unreadable", f"{survey.unreadable:,}; see `data-prep verify --deep`"))
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
        rows.append((name, text))
    return rows


def _describe_numbers(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:.6g}" for value in values[:_MOST_CHANNELS])
    more = f", ... {len(values)} in all" if len(values) > _MOST_CHANNELS else ""
    return f"[{shown}{more}]"
