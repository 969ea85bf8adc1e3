"""What a set of shards holds, counted from its indexes and from the headers of its images."""

import io
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.executors.processes import map_tasks
from data_prep.format.index import Tick
from data_prep.format.manifest import Location, Manifest, ShardEntry, ShardIndex, read_index
from data_prep.images.arrays import read_header
from data_prep.images.pixels import read_images, spread_rows

MOST_HEADERS = 10_000
"""Images whose headers are read, evenly spread over the set; all where there are no more."""

_FEW_SAMPLES = 20_000
_PICTURES = ("JPEG", "PNG", "WEBP")
_MODES = {"1": "grey", "L": "grey", "P": "palette", "LA": "grey with transparency"}
_MODES |= {"RGB": "colour", "RGBA": "colour with transparency", "I;16": "grey of 16 bits"}


@dataclass(kw_only=True)
class Survey:
    """Counts over some of the shards, to be added up."""

    per_class: NDArray[np.int64]
    """Samples of each class, (classes,); labels beyond the classes are not counted."""
    labelled: int = 0
    """Samples with a label."""
    bytes: int = 0
    """Length of all image files."""
    largest: int = 0
    """Length of the largest image file, in bytes."""
    extensions: Counter[str] = field(default_factory=Counter)
    """Samples of each extension."""
    sizes: list[NDArray[np.int64]] = field(default_factory=list)
    """(width, height) of the images whose headers were read, each (images, 2)."""
    layouts: Counter[str] = field(default_factory=Counter)
    """Channels of these, in words."""
    unreadable: int = 0
    """Images whose headers could not be read."""

    def add(self, other: "Survey") -> None:
        """Add another part of the same set."""
        self.per_class = self.per_class + other.per_class
        self.labelled += other.labelled
        self.bytes += other.bytes
        self.largest = max(self.largest, other.largest)
        self.extensions += other.extensions
        self.sizes += other.sizes
        self.layouts += other.layouts
        self.unreadable += other.unreadable


@dataclass(frozen=True, kw_only=True)
class _Task:
    folder: Location
    shard: ShardEntry
    classes: int
    rows: NDArray[np.int64]


def survey_set(manifest: Manifest, *, workers: int = 1, tick: Tick = lambda _: None) -> Survey:
    """Count what a set holds; at most `MOST_HEADERS` image headers are read.

    Raises:
        ManifestError: an index is missing or does not fit.
        OSError: a shard cannot be read.
    """
    rows = spread_rows([shard.samples for shard in manifest.shards], MOST_HEADERS)
    classes = len(manifest.classes)
    tasks = (
        _Task(folder=manifest.folder, shard=shard, classes=classes, rows=rows[number])
        for number, shard in enumerate(manifest.shards)
    )
    # Starting a process takes as long as thousands of headers.
    workers = max(1, min(workers, len(manifest.shards), manifest.samples // _FEW_SAMPLES))
    survey = Survey(per_class=np.zeros(classes, dtype=np.int64))
    for part in map_tasks(_survey_shard, tasks, workers=workers, tick=tick):
        survey.add(part)
    return survey


def _survey_shard(task: _Task, tick: Tick) -> Survey:
    index = read_index(task.folder, task.shard)
    counted = index.labels[(index.labels >= 0) & (index.labels < task.classes)]
    survey = Survey(
        per_class=np.bincount(counted, minlength=task.classes).astype(np.int64),
        labelled=int(np.count_nonzero(index.labels >= 0)),
        bytes=int(index.sizes.sum()),
        largest=int(index.sizes.max()),
        extensions=Counter(index.extensions.tolist()),
    )
    _read_headers(
        survey, index, task.rows, read_images(task.shard.location(task.folder), index, task.rows)
    )
    tick(len(index))
    return survey


def _read_headers(
    survey: Survey, index: ShardIndex, rows: NDArray[np.int64], images: Iterable[bytes]
) -> None:
    sizes = []
    for row, data in zip(rows, images, strict=True):
        try:
            width, height, layout = _read_header(data, str(index.extensions[row]))
        except MemoryError:
            raise
        # Pillow's readers raise nearly any type when the bytes are hostile.
        except Exception:
            survey.unreadable += 1
        else:
            sizes.append((width, height))
            survey.layouts[layout] += 1
    survey.sizes = [np.array(sizes, dtype=np.int64).reshape(-1, 2)]


def _read_header(data: bytes, extension: str) -> tuple[int, int, str]:
    if extension == "npy":
        header = read_header(data)
        height, width = header.shape[:2]
        return width, height, f"array of {header.channels} channels, {header.dtype.name}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=_PICTURES) as image:
            return image.width, image.height, _MODES.get(image.mode, image.mode)
