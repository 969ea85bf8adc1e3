"""What a set of shards holds, as a table for a person."""

from __future__ import annotations

import numpy as np

from data_prep.manifest import Manifest, read_index

_MOST_CLASSES = 20


def describe_shards(manifest: Manifest) -> str:
    """Return a table of counts, sizes and classes.

    Raises:
        ManifestError: an index is missing or does not fit.
    """
    samples = np.array([shard.samples for shard in manifest.shards])
    lengths = np.array([shard.bytes for shard in manifest.shards])
    indexes = [read_index(manifest.folder, shard) for shard in manifest.shards]
    images = np.concatenate([index.sizes for index in indexes])
    labels = np.concatenate([index.labels for index in indexes])
    extensions, counts = np.unique(
        np.concatenate([index.extensions for index in indexes]), return_counts=True
    )
    formats = ", ".join(f"{count:,} {name}" for name, count in zip(extensions, counts, strict=True))
    rows = [
        ("folder", str(manifest.folder)),
        ("source", str(manifest.options.get("source", "tars written by someone else"))),
        ("samples", f"{manifest.samples:,} ({formats})"),
        ("rejected", f"{manifest.rejected:,}"),
        ("shards", f"{len(samples):,} of {samples.min():,} to {samples.max():,} samples"),
        ("size", f"{describe_bytes(lengths.sum())}, {describe_bytes(lengths.mean())} a shard"),
        (
            "image file",
            f"{describe_bytes(images.mean())} on average, {describe_bytes(images.max())} at most",
        ),
        ("labelled", f"{np.count_nonzero(labels >= 0):,} of {len(labels):,}"),
        ("classes", f"{len(manifest.classes):,}"),
    ]
    lines = [f"{name:<11} {value}" for name, value in rows]
    per_class = np.bincount(labels[labels >= 0], minlength=len(manifest.classes))
    for name, count in list(zip(manifest.classes, per_class, strict=False))[:_MOST_CLASSES]:
        # A folder's name need not be text, and must not break the table.
        shown = name.encode("utf-8", "backslashreplace").decode()
        lines.append(f"  {count:>9,} {shown}")
    if len(manifest.classes) > _MOST_CLASSES:
        lines.append(f"  and {len(manifest.classes) - _MOST_CLASSES:,} more classes")
    return "\n".join(lines)


def describe_bytes(length: float) -> str:
    """Return a length in bytes with a unit that suits it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if length < 1024:
            return f"{length:.0f} {unit}" if unit == "B" else f"{length:.1f} {unit}"
        length /= 1024
    return f"{length:.1f} TiB"
