"""The listing of a source: a file on disk, of any length, in the order of the shards.

Each line is a file. A listing is collected, sorted and read back in bounded memory; only one offset
per shard is held. Files that must not be used are listed in a second file.
"""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_prep.executors.processes import Tick
from data_prep.format.atomic import atomic_write_bytes, name_in_errors
from data_prep.format.kinds import Examples, count_kind, describe_kinds, is_archive_name
from data_prep.format.manifest import IMAGE_SUFFIXES
from data_prep.format.storage import Location
from data_prep.sources.archives import ArchiveSource
from data_prep.sources.external_sort import ExternalSort
from data_prep.sources.files import Selection, SourceError, SourceFile
from data_prep.sources.folders import VANISHED
from data_prep.sources.image_source import ImageSource
from data_prep.validation import validate
from data_prep.write.classes import ClassNames, FoundClasses
from data_prep.write.options import ShardOptions
from data_prep.write.plan import LISTING_NAME, MIN_SHARDS, Cutter, ShardPlan, order_key, path_key

REFUSED_NAME = "listing-refused.jsonl"
_SUMMARY_NAME = "listing.json"
_encode = json.JSONEncoder(separators=(",", ":")).encode
_DEFAULTS = [SourceFile._field_defaults.get(name, ...) for name in SourceFile._fields]
_FILES_PER_REPORT = 5_000
_MOST_NAMED = 5
WindowedFiles = Iterator[tuple[SourceFile, int]]
"""Files, each with the number of its shuffle window."""
DuplicateFilter = Callable[[WindowedFiles], WindowedFiles]
"""Sets the problem of files that are duplicates of others."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Summary of a pass over a source."""

    found: int
    """Number of selected files."""
    classes: tuple[str, ...]
    """Class names, indexed by label."""
    fingerprint: str
    """Digest of the selected files: paths, sizes, dates, offsets, labels, fields."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Kind of file → number that were met and not selected."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Kind of file that was not selected → the first few paths."""
    unread: Sequence[str] = ()
    """Archives in the archive that could not be read, with the reason: the first few."""
    doubts: str = ""
    """Classes of which the folders may mean something else, as a clause."""


@dataclass(frozen=True, kw_only=True)
class SourceListing:
    """A listing on disk."""

    folder: Path
    """Folder of the listing."""
    survey: Survey
    """Summary of its files."""
    shards: tuple[ShardPlan, ...]
    """Plans of the shards."""
    validation_shards: int
    """Number of shards, at the end, for validation."""

    def files(self, plan: ShardPlan) -> Iterator[SourceFile]:
        """Yield the files of a shard in order."""
        return read_files(self.folder / plan.listing, plan.start, plan.length)

    def refused(self) -> Iterator[SourceFile]:
        """Yield the files that must not be used, in the order of their paths."""
        path = self.folder / REFUSED_NAME
        return read_files(path, 0, path.stat().st_size)

    def write(self) -> None:
        """Write the summary, which marks the listing as complete."""
        values = asdict(self)
        del values["folder"]
        atomic_write_bytes(self.folder / _SUMMARY_NAME, json.dumps(values).encode())


def survey_source(
    source: ImageSource, options: ShardOptions, listed: Tick = lambda _: None
) -> Survey:
    """Return the summary of a source, without writing a listing.

    Args:
        source: the source.
        options: selection and window.
        listed: called regularly with the number of files found so far.

    Raises:
        SourceError: no file is selected.
        TarError: it is a damaged tar.
    """
    surveyor = Surveyor(source, options, listed)
    for _ in surveyor.files():
        pass
    return surveyor.survey()


def write_listing(
    source: ImageSource,
    options: ShardOptions,
    folder: Path,
    filter_duplicates: DuplicateFilter | None,
    listed: Tick = lambda _: None,
) -> SourceListing:
    """Write the listing of a source.

    Args:
        source: the source.
        options: selection, order and size of shards.
        folder: folder for the listing.
        filter_duplicates: finds duplicates; None keeps them.
        listed: called regularly with the number of files found so far.

    Raises:
        SourceError: no file is selected.
        TarError: the source is a damaged tar.
        OSError: the folder cannot be written.
    """
    surveyor = Surveyor(source, options, listed)
    sorter = _Sorter(folder, options)
    try:
        files = surveyor.files()
        for file, window in files if filter_duplicates is None else filter_duplicates(files):
            sorter.add(file, window)
        survey = surveyor.survey()
        shards, validation_shards = sorter.write()
    finally:
        sorter.discard()
    listing = SourceListing(
        folder=folder, survey=survey, shards=shards, validation_shards=validation_shards
    )
    listing.write()
    return listing


def read_listing(folder: Path) -> SourceListing | None:
    """Return the complete listing in a folder, or None if there is none."""
    try:
        values = json.loads((folder / _SUMMARY_NAME).read_text())
    except FileNotFoundError:
        return None
    return validate(values | {"folder": folder}, SourceListing)


def read_files(path: Path, start: int, length: int) -> Iterator[SourceFile]:
    """Yield the files in a byte range of a listing."""
    with path.open("rb") as lines:
        lines.seek(start)
        left = length
        while left > 0:
            line = lines.readline()
            left -= len(line)
            yield decode_file(line.decode("ascii"))


def encode_file(file: SourceFile) -> str:
    """Return a file as one line of ASCII."""
    length = len(file)
    while file[length - 1] == _DEFAULTS[length - 1]:
        length -= 1
    return _encode(file[:length])


def decode_file(line: str) -> SourceFile:
    """Return the file of a line of `encode_file`."""
    return SourceFile(*json.loads(line))


class Surveyor:
    """Selects the files of a source and collects their summary.

    Args:
        source: the source.
        options: selection and window.
        listed: called regularly with the number of files found so far.
        earlier: what a first pass found; files that are gone since are counted.
    """

    def __init__(
        self,
        source: ImageSource,
        options: ShardOptions,
        listed: Tick,
        earlier: FoundClasses | None = None,
    ) -> None:
        self._source, self._selection = source, options.selection
        self._earlier = earlier
        self._unread: list[str] = []
        self._window = options.window
        self._listed = listed
        self._found = self._sum = 0
        self._skipped: Counter[str] = Counter()
        self._examples = Examples()
        self._classes = ClassNames()

    def files(self) -> WindowedFiles:
        """Yield every selected file with its window, including files with a problem."""
        taken = 0
        for file in self._source.files():
            kind = self._selection.why_not(file, explicit=self._source.is_explicit)
            if kind:
                self._examples.add(count_kind(self._skipped, kind), file.path)
                continue
            checked = _find_problem(file, self._selection)
            window = taken // self._window if self._window else 0
            taken += not checked.problem
            self._count(checked, window)
            yield checked, window

    def survey(self) -> Survey:
        """Return the summary of the files yielded.

        Raises:
            SourceError: there were none.
        """
        counts = self._skipped + self._source.skipped
        if self._earlier is not None:
            gone = max(counts[VANISHED], self._earlier.files - self._found)
            counts[VANISHED] = gone + self._earlier.vanished
        skipped = dict(+counts)
        self._examples.update(self._source.examples)
        if not self._found:
            raise SourceError(_describe_absence(self._source.path, self._selection, skipped))
        return Survey(
            found=self._found,
            classes=self._source.classes or self._classes.sorted(),
            fingerprint=f"{self._sum:064x}",
            skipped=skipped,
            examples=self._examples.paths,
            unread=self._unread,
            doubts=self._classes.describe_doubts(),
        )

    def _count(self, file: SourceFile, window: int) -> None:
        # A sum of digests does not depend on the order in which a folder is read.
        digest = hashlib.sha256(f"{window}{encode_file(file)}".encode("ascii")).digest()
        self._sum = (self._sum + int.from_bytes(digest, "big")) % 2**256
        self._found += 1
        if self._found % _FILES_PER_REPORT == 0:
            self._listed(self._found)
        if not file.problem:
            self._classes.add(file)
        elif isinstance(self._source, ArchiveSource) and is_archive_name(file.path):
            self._unread += [f"{file.path}: {file.problem}"] * (len(self._unread) < _MOST_NAMED)


class _Sorter:
    """Sorts files on disk and cuts them into shards."""

    def __init__(self, folder: Path, options: ShardOptions) -> None:
        self._folder, self._options = folder, options
        self._good = ExternalSort(folder, "listing")
        self._refused = ExternalSort(folder, "refused")
        self._counts = {"0": 0, "1": 0}
        self._bytes = {"0": 0, "1": 0}

    def add(self, file: SourceFile, window: int) -> None:
        if file.problem:
            self._refused.add(path_key(file.path), encode_file(file))
            return
        key = order_key(file, self._options, window)
        self._counts[key[0]] += 1
        self._bytes[key[0]] += file.size
        self._good.add(key, encode_file(file))

    def write(self) -> tuple[tuple[ShardPlan, ...], int]:
        write_refused(self._folder, self._refused)
        starts: list[tuple[int, int]] = []  # (samples, bytes of the listing) before each shard
        cutters = {
            group: Cutter(
                count=self._counts[group],
                total_bytes=self._bytes[group],
                options=self._options,
                min_shards=MIN_SHARDS if group == "0" else 1,
            )
            for group in self._counts
        }
        place, validation_shards = 0, 0
        sized = self._options.bytes_per_shard is not None
        path = self._folder / LISTING_NAME
        with name_in_errors(path), path.open("w", encoding="ascii", newline="\n") as file:
            for position, (key, line) in enumerate(self._good.merged()):
                if cutters[key[0]].starts_shard(decode_file(line).size if sized else 0):
                    starts.append((position, place))
                    validation_shards += key[0] == "1"
                file.write(line + "\n")
                place += len(line) + 1
        starts.append((sum(self._counts.values()), place))
        return _plan(starts), validation_shards

    def discard(self) -> None:
        self._good.discard()
        self._refused.discard()


def write_refused(folder: Path, sorter: ExternalSort) -> None:
    """Write the list of files that must not be used."""
    path = folder / f".{REFUSED_NAME}.partial-{os.getpid()}"
    with name_in_errors(path), path.open("w", encoding="ascii", newline="\n") as file:
        file.writelines(line + "\n" for _, line in sorter.merged())
    path.replace(folder / REFUSED_NAME)


def _plan(starts: list[tuple[int, int]]) -> tuple[ShardPlan, ...]:
    pairs = enumerate(itertools.pairwise(starts))
    return tuple(
        ShardPlan(
            number=number,
            first=first[0],
            samples=after[0] - first[0],
            start=first[1],
            length=after[1] - first[1],
        )
        for number, (first, after) in pairs
    )


def _find_problem(file: SourceFile, selection: Selection) -> SourceFile:
    if file.problem:
        return file
    if file.size == 0:
        return file._replace(problem="it is empty")
    if file.size > selection.max_bytes:
        limit = f"more than --max-bytes {selection.max_bytes:,}"
        return file._replace(problem=f"it declares {file.size:,} bytes, {limit}")
    return file


def _describe_absence(path: Location, selection: Selection, skipped: dict[str, int]) -> str:
    if not skipped:
        return f"{path} is empty. Give a folder, a zip, a tar or a list of images."
    wanted = f"files that match {', '.join(selection.include)}" if selection.include else "images"
    if selection.only_split is not None:
        wanted += f" of split {selection.only_split!r}"
    if ".tar" in skipped and not selection.include:
        return (
            f"{path} has no {wanted} but tars: {describe_kinds(skipped)}. `data-prep reshard` "
            "reads folders of WebDataset tars, and `data-prep index` uses them as they are; give "
            "`shard` a single tar of images."
        )
    if selection.include:
        return (
            f"{path} has no {wanted}; other files: {describe_kinds(skipped)}. A pattern is that of "
            "a whole path, case matters, and braces are not expanded: repeat --include for each."
        )
    return (
        f"{path} has no {wanted}; other files: {describe_kinds(skipped)}. Image suffixes are "
        f"{' '.join(sorted(IMAGE_SUFFIXES))}; select others with --include."
    )
