"""A listing that gives its shards away while it still goes on.

Where files keep their place, or change it only inside a window, a shard can be cut as soon as its
files are listed. Each such shard has a listing of its own, and a digest of that, which its report
repeats: a run that goes on lists the source again, and takes a finished shard only for what it was
made from. Files for validation, which come last, are put aside on disk.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from data_prep.executors.processes import Tick
from data_prep.format.atomic import atomic_write_bytes
from data_prep.sources.external_sort import ExternalSort
from data_prep.sources.files import SourceError, SourceFile
from data_prep.sources.source import Source
from data_prep.write.listing import (
    Listing,
    Surveyor,
    class_name,
    decode_file,
    encode_file,
    write_refused,
)
from data_prep.write.plan import ShardOptions, ShardPlan, cut_stream, order_key, path_key


def listing_name(number: int) -> str:
    """Return the file name of the listing of a shard's own."""
    return f"shard-{number:06d}.listing.jsonl"


class StreamedListing:
    """The listing of a source whose shards are planned as they are found.

    Args:
        source: what to list.
        options: what is wanted, and its order; they must allow for streaming.
        folder: where listings go.
        classes: names of all classes.
        needed: tells of a shard whether its listing is to be written.
        name: sets files apart from those of others who list into the folder.
        listed: told now and then how many files were found.
    """

    def __init__(
        self,
        source: Source,
        options: ShardOptions,
        folder: Path,
        *,
        classes: tuple[str, ...],
        needed: Callable[[ShardPlan], bool],
        name: str,
        listed: Tick,
    ) -> None:
        assert options.streams, options
        self._options, self._folder, self._needed = options, folder, needed
        self._surveyor = Surveyor(source, options, listed)
        self._classes, self._known = classes, frozenset(classes)
        self._window = ExternalSort(folder, f"window-{name}")
        self._held_out = ExternalSort(folder, f"validation-{name}")
        self._refused = ExternalSort(folder, f"refused-{name}")
        self._plans: list[ShardPlan] = []
        self._samples = self._validation_shards = 0

    def plans(self) -> Iterator[ShardPlan]:
        """Yield the shards as they are found.

        Raises:
            SourceError: nothing in the source is wanted, or it changes meanwhile.
            TarError: it is a damaged tar.
            OSError: the folder cannot be written.
        """
        for shard in cut_stream(self._training_files(), self._options):
            yield self._plan(shard)
        held_out = ((line, decode_file(line).size) for _, line in self._held_out.merged())
        for shard in cut_stream(held_out, self._options, min_shards=1):
            self._validation_shards += 1
            yield self._plan(shard)

    def finish(self) -> Listing:
        """Write what the whole listing comes to, once all shards were taken.

        Raises:
            SourceError: nothing in the source is wanted.
        """
        survey = replace(self._surveyor.survey(), classes=self._classes)
        write_refused(self._folder, self._refused)
        listing = Listing(
            folder=self._folder,
            survey=survey,
            shards=tuple(self._plans),
            validation_shards=self._validation_shards,
        )
        listing.write()
        return listing

    def discard(self) -> None:
        """Remove what lies on disk between."""
        for sorter in (self._window, self._held_out, self._refused):
            sorter.discard()

    def _training_files(self) -> Iterator[tuple[str, int]]:
        """Yield lines of the listing, with their images' bytes, in the order of the shards."""
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
                f"{file.path} is of class {name!r}, which was not there when the classes were "
                "listed. Let the source be while it is read, then run the same command again."
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
