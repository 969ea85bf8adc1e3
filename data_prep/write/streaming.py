"""Streamed listing: shards are planned while the source is still being listed.

If files keep their order, or move only within a window, a shard can be cut as soon as its files are
listed. Each such shard has its own listing, whose digest its report repeats: a resumed run lists
the source again and accepts a finished shard only if the digests agree. Files for validation, which
come last, are kept on disk.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from data_prep.executors.processes import Tick
from data_prep.format.atomic import atomic_write_bytes
from data_prep.sources.external_sort import ExternalSort
from data_prep.sources.files import SourceError, SourceFile
from data_prep.sources.image_source import ImageSource
from data_prep.write.classes import FoundClasses, class_name
from data_prep.write.listing import (
    SourceListing,
    Surveyor,
    decode_file,
    encode_file,
    write_refused,
)
from data_prep.write.options import ShardOptions
from data_prep.write.plan import ShardPlan, cut_stream, order_key, path_key


def listing_name(number: int) -> str:
    """Return the file name of a shard's own listing."""
    return f"shard-{number:06d}.listing.jsonl"


class StreamedListing:
    """The listing of a source, with shards planned during listing.

    Args:
        source: the source.
        options: selection, order and size of shards; `options.streams` must be True.
        folder: folder for listings.
        classes: all classes.
        needed: whether to write the listing of a shard.
        name: distinguishes its files from those of other processes that list into the folder.
        listed: called regularly with the number of files found so far.
    """

    def __init__(
        self,
        source: ImageSource,
        options: ShardOptions,
        folder: Path,
        *,
        classes: FoundClasses,
        needed: Callable[[ShardPlan], bool],
        name: str,
        listed: Tick,
    ) -> None:
        assert options.streams, options
        self._options, self._folder, self._needed = options, folder, needed
        self._surveyor = Surveyor(source, options, listed, classes)
        self._classes, self._known = classes.names, frozenset(classes.names)
        self._window = ExternalSort(folder, f"window-{name}")
        self._held_out = ExternalSort(folder, f"validation-{name}")
        self._refused = ExternalSort(folder, f"refused-{name}")
        self._plans: list[ShardPlan] = []
        self._samples = self._validation_shards = 0

    def plans(self) -> Iterator[ShardPlan]:
        """Yield the plans of shards as their files are listed.

        Raises:
            SourceError: no file is selected, or the source changes meanwhile.
            TarError: it is a damaged tar.
            OSError: the folder cannot be written.
        """
        for shard in cut_stream(self._training_files(), self._options):
            yield self._plan(shard)
        held_out = ((line, decode_file(line).size) for _, line in self._held_out.merged())
        for shard in cut_stream(held_out, self._options, min_shards=1):
            self._validation_shards += 1
            yield self._plan(shard)

    def finish(self) -> SourceListing:
        """Write the summary of the listing after all plans were yielded, and return it.

        Raises:
            SourceError: no file is selected.
        """
        survey = replace(self._surveyor.survey(), classes=self._classes)
        write_refused(self._folder, self._refused)
        listing = SourceListing(
            folder=self._folder,
            survey=survey,
            shards=tuple(self._plans),
            validation_shards=self._validation_shards,
        )
        listing.write()
        return listing

    def discard(self) -> None:
        """Remove temporary files."""
        for sorter in (self._window, self._held_out, self._refused):
            sorter.discard()

    def _training_files(self) -> Iterator[tuple[str, int]]:
        """Yield (line, length of the image in bytes) of training files, in order."""
        at = 0
        for file, window in self._surveyor.files():
            if file.problem:
                self._refused.add(path_key(file.path), encode_file(file))
                continue
            self._check_class(file)
            key, line = order_key(file, self._options, window), encode_file(file)
            if key[0] == "1":
                self._held_out.add(key, line)
            elif self._options.window == 1:
                yield line, file.size
            else:
                if window != at:
                    yield from self._shuffled()
                at = window
                self._window.add(key, line)
        yield from self._shuffled()

    def _shuffled(self) -> Iterator[tuple[str, int]]:
        for _, line in self._window.merged():
            yield line, decode_file(line).size

    def _check_class(self, file: SourceFile) -> None:
        name = class_name(file)
        if name is not None and name not in self._known:
            raise SourceError(
                f"{file.path} has class {name!r}, which did not exist when the classes were "
                "listed. Do not change the source while it is read; run the same command again."
            )

    def _plan(self, lines: list[str]) -> ShardPlan:
        number = len(self._plans)
        data = "".join(f"{line}\n" for line in lines).encode("ascii")
        plan = ShardPlan(
            number=number,
            first=self._samples,
            samples=len(lines),
            start=0,
            length=len(data),
            listing=listing_name(number),
            digest=hashlib.sha256(data).hexdigest(),
        )
        if self._needed(plan):
            atomic_write_bytes(self._folder / plan.listing, data)
        self._plans.append(plan)
        self._samples += len(lines)
        return plan
