"""Anyone's WebDataset tars without a manifest, read in sequence by a pipeline of webdataset.

A pass reads every tar once, in an order of its own: the tars are cut into parts of equal length,
one for each data worker of each process, and the samples of a part go through a shuffle buffer.
Where a part ends within a tar, each of the two readers takes its fraction of the tar's samples, so
that any number of tars is shared evenly by any number of workers, and no sample is read twice.

webdataset's own opener runs what is not a file (curl, gsutil, commands), and its decoders unpickle.
Neither is used: bytes come from `data_prep.format.storage`, and members are grouped and images
chosen as `data-prep index` does it. Nor is its reader of tars, which takes a damaged header for the
end.
"""

import math
import random
import shlex
import tarfile
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from data_prep.bounds import Count, Positive
from data_prep.channels import ChannelNames
from data_prep.format.kinds import describe_kinds
from data_prep.format.patterns import describe_splits, is_pattern, list_tars
from data_prep.format.pipes import PIPE, PipedFile, expand_command
from data_prep.format.samples import SampleReader, TarSample, check_image_key
from data_prep.format.storage import Location, RemotePath, locate
from data_prep.format.stores import StorageError
from data_prep.format.tars import TarError, describe_problem, stream_tar
from simmim.data.datasets.folder import MAX_FILE_BYTES
from simmim.data.datasets.image_set import ShardUnavailableError, read_patiently
from simmim.data.datasets.remote import RemoteReading
from simmim.data.order.randomness import shuffled, stream_seed
from simmim.data.order.source import DataError
from simmim.environment import print_on_main
from simmim.recipe import settings

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
"""Its multiples, modulo 1, are spread evenly over 0 to 1, however many there are."""
MOST_REQUESTS = 128
"""Largest number of tars at URLs whose lengths are asked for; more are taken to be equal."""
_BLOCK = 2**20


@settings
class StreamSettings:
    """Tars without a manifest, read in sequence: neither exact resume nor the same order on other
    numbers of processes."""

    tars: str
    """Pattern of WebDataset tars, `DIR/{000..099}.tar` or `DIR/*.tar`, a folder of them, or the URL
    of either (s3, gs, http or https; web servers need the pattern in braces); or `pipe:COMMAND`
    with data.allow_pipe, as in `pipe:cat DIR/{000..099}.tar`."""
    samples: Count | None = None
    """Samples of an epoch, over all processes: at most those in the tars. An epoch ends early, on
    all processes, where one has no more."""
    image_key: str | None = None
    """What the names of images have after the key, if it is no extension alone: `image.png` of
    KEY.image.png, `input.jpeg` of KEY.input.jpeg. null takes KEY.jpg and others as
    `data-prep index` does."""
    shuffle: Count = 1000
    """Samples in the shuffle buffer of each data worker, encoded; they are held in memory."""
    weight: Positive = 1.0
    """Sampling weight relative to the datasets of data.shards."""

    def __post_init__(self) -> None:
        if self.image_key is not None:
            check_image_key(self.image_key)
        if self.samples is None:
            raise ValueError(
                "samples is missing: state how many samples an epoch has, at most those in the "
                f"tars. `{self.index_command}` counts them."
            )

    @property
    def index_command(self) -> str:
        """The command that makes an indexed set of the tars."""
        command = ["data-prep", "index", self.tars, "--output", "FOLDER"]
        command += [] if self.image_key is None else ["--image-key", self.image_key]
        return shlex.join(command + ["--allow-pipe"] * self.tars.startswith(PIPE))


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamedImage:
    """An encoded image of a stream; see `simmim.data.order.source.EncodedImage`."""

    tar: int
    """Number of its tar."""
    row: int
    """Number of its sample in the tar."""
    shard_name: str
    key: str
    extension: str
    image: bytes
    channels: ChannelNames | None = None
    """None: only the file may tell them."""
    label: None = None
    about: None = None

    @property
    def name(self) -> str:
        """Tar and key: the name in messages, and the random seed."""
        return f"{self.shard_name}/{self.key}"


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What a stream left out: a sample, or the rest of a tar."""

    kind: Literal["skipped", "no image"]
    """`skipped`: it is damaged; `no image`: it has none."""
    shard_name: str
    key: str = ""
    """Empty for the rest of a tar."""
    reason: str
    """Its defect, or the kind of member that it has instead of an image."""


Report = Callable[[LeftOut], object]
"""Takes what was left out."""


class Part(NamedTuple):
    """A part of the tars of a pass, in their order: from and to which fraction of their length."""

    start: Fraction
    stop: Fraction

    def cut(self, count: int) -> list["Part"]:
        """Return equal parts of this part."""
        edges = [self.start + (self.stop - self.start) * n / count for n in range(count + 1)]
        return [Part(*edge) for edge in pairwise(edges)]


WHOLE = Part(Fraction(0), Fraction(1))


class Piece(NamedTuple):
    """A tar, or the samples of one whose places are from `low` to `high`."""

    tar: int
    low: float = 0.0
    high: float = 1.0

    def has(self, row: int) -> bool:
        """Return whether a sample of the tar, counted from 0, belongs to the piece."""
        return self.low <= (row + 1) * GOLDEN_RATIO % 1 < self.high


def pieces_of(part: Part, order: Sequence[int], lengths: Sequence[int]) -> Iterator[Piece]:
    """Yield the pieces of a part.

    Args:
        part: the part.
        order: numbers of all tars in the order of the pass.
        lengths: length of each tar, above 0, by its number.
    """
    edges = [0, *accumulate(lengths[tar] for tar in order)]
    start, stop = part.start * edges[-1], part.stop * edges[-1]
    for place in range(bisect_right(edges, start) - 1, bisect_left(edges, stop)):
        tar, edge = order[place], edges[place]
        low, high = (start - edge) / lengths[tar], (stop - edge) / lengths[tar]
        yield Piece(tar, float(max(low, Fraction(0))), float(min(high, Fraction(1))))


@dataclass(frozen=True, kw_only=True)
class TarStream:
    """The tars of a stream, and how they are read."""

    settings: StreamSettings
    places: tuple[Location | PipedFile, ...]
    names: tuple[str, ...]
    """Name of each tar, unique."""
    lengths: tuple[int, ...]
    """Length of each tar in bytes, by which they are shared; 1 for all where it is not known."""
    attempts: int

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        assert self.settings.samples is not None
        return self.settings.samples

    def images(
        self, *, rank: int, world: int, workers: int, seed: int, began: int, report: Report
    ) -> Iterator[StreamedImage]:
        """Yield this data worker's images of a pass, shuffled.

        Args:
            rank: number of this process.
            world: number of processes.
            workers: data workers of this process; 1 without any.
            seed: seed of the training.
            began: number of samples before the pass, which no other pass has.
            report: takes what is left out.

        Raises:
            DataError: a tar cannot be opened or fetched.
        """
        import webdataset  # noqa: PLC0415 (slow to import, and few trainings use it)

        order = shuffled(len(self.places), "stream tars", seed, began).tolist()
        buffer = random.Random(stream_seed("stream buffer", seed, began, rank))
        pipeline = webdataset.DataPipeline(
            partial(WHOLE.cut, world),
            partial(split_by_node, rank=rank, world=world),
            partial(_cut_for_workers, workers=workers),
            webdataset.split_by_worker,
            partial(_pieces_of_parts, order=order, lengths=self.lengths),
            partial(self._read_pieces, report=report),
            webdataset.shuffle(self.settings.shuffle, rng=buffer),
        )
        return iter(pipeline)

    def first_images(self, most: int) -> list[StreamedImage]:
        """Return the first images of the first tar, for checks and pictures.

        Raises:
            ValueError: it has none.
            DataError: it cannot be opened or fetched.
        """
        left_out: list[LeftOut] = []
        with closing(self._read(Piece(0), left_out.append)) as images:
            found = list(islice(images, most))
        if not found:
            kinds = Counter(one.reason for one in left_out if one.kind == "no image")
            damage = next((one.reason for one in left_out if one.kind == "skipped"), "")
            has = damage or (f"only {describe_kinds(kinds)}" if kinds else "it is empty")
            raise ValueError(
                f"data.stream: {self.places[0]} has no image that can be read: {has.rstrip('.')}. "
                "Images are members KEY.jpg, KEY.png and others; name those of other names by "
                "data.stream.image_key, as image.png of KEY.image.png."
            )
        return found

    def _read_pieces(self, pieces: Iterable[Piece], report: Report) -> Iterator[StreamedImage]:
        for piece in pieces:
            yield from self._read(piece, report)

    def _read(self, piece: Piece, report: Report) -> Generator[StreamedImage, None, None]:
        """Yield the images of a piece; a tar that is damaged ends where the damage is.

        Raises:
            DataError: it cannot be opened or fetched.
        """
        place, name = self.places[piece.tar], self.names[piece.tar]
        image_key = self.settings.image_key
        reader = SampleReader(
            place, image_key=None if image_key is None else check_image_key(image_key)
        )
        read: Callable[[], bytes] = bytes
        taken: dict[str, bytes] = {}
        """Images of the sample whose members are being read, by the names of the members."""

        def members() -> Generator[tarfile.TarInfo, None, None]:
            nonlocal read
            try:
                for member, read in stream_tar(place, self._blocks(place)):  # noqa: B007 - for `take`
                    yield member
            except TarError as error:  # the sample before the damage is whole
                report_damage(error)

        def report_damage(error: TarError) -> None:
            report(LeftOut(kind="skipped", shard_name=name, reason=str(error).rstrip(".")))

        def take(row: int, member: tarfile.TarInfo) -> None:
            if piece.has(row) and describe_problem(member) is None and fits(member):
                taken[member.name] = read()

        try:
            with closing(members()) as found:
                # Labels are not used, so any that is valid will do.
                for row, sample in enumerate(reader.group(found, lambda *_: b"0", take)):
                    if piece.has(row):
                        image = _image_of(sample, taken)
                        if isinstance(image, _Image):
                            yield StreamedImage(
                                tar=piece.tar,
                                row=row,
                                shard_name=name,
                                key=sample.key,
                                extension=image.extension,
                                image=image.image,
                            )
                        else:
                            report(replace(image, shard_name=name))
                    taken.clear()
        except TarError as error:
            report_damage(error)

    def _blocks(self, place: Location | PipedFile) -> Iterator[bytes]:
        """Yield the bytes of a tar.

        Raises:
            DataError: it cannot be opened or fetched.
        """
        try:
            if isinstance(place, Path):
                with read_patiently(partial(_open, place), self.attempts) as file:
                    yield from iter(lambda: file.read(_BLOCK), b"")
            else:
                yield from place.blocks()
        except DataError:
            raise
        except FileNotFoundError:
            raise DataError(f"tar {place} does not exist; restore it.") from None
        except (OSError, StorageError) as error:
            text = str(error).rstrip(".")
            named = text if str(place) in text else f"{place} cannot be read: {text}"
            raise DataError(f"tar {named}.") from None


class _Image(NamedTuple):
    extension: str
    image: bytes


def _image_of(sample: TarSample, taken: Mapping[str, bytes]) -> _Image | LeftOut:
    """Return the image of a sample, or why it has none; the name of its tar is added later."""
    left_out = partial(LeftOut, shard_name="", key=sample.key)
    if sample.problem:
        return left_out(kind="skipped", reason=f"the sample is refused: {sample.problem}")
    for extension, member in sample.images.items():
        if not fits(member):
            return left_out(
                kind="skipped", reason=f"the file has more than {MAX_FILE_BYTES:,} bytes"
            )
        return _Image(extension.rpartition(".")[2], taken[member.name])
    return left_out(kind="no image", reason=sample.others[0][0])


def fits(member: tarfile.TarInfo) -> bool:
    """Return whether a member is small enough to be read into memory."""
    return member.size <= MAX_FILE_BYTES


def split_by_node(parts: Iterable[Part], *, rank: int, world: int) -> Iterator[Part]:
    """Yield the parts of a process, as webdataset's stage of the same name does it.

    That one looks for the rank in environment variables, and then asks torch; this one is told.
    """
    return islice(parts, rank, None, world)


def _cut_for_workers(parts: Iterable[Part], *, workers: int) -> Iterator[Part]:
    for part in parts:
        yield from part.cut(workers)


def _pieces_of_parts(
    parts: Iterable[Part], *, order: Sequence[int], lengths: Sequence[int]
) -> Iterator[Piece]:
    for part in parts:
        yield from pieces_of(part, order, lengths)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        kind = DataError if isinstance(error, PermissionError) else ShardUnavailableError
        raise kind(f"tar {path} cannot be opened ({error.strerror}): restore it") from None


def open_stream(settings: StreamSettings, remote: RemoteReading) -> TarStream:
    """List the tars of a stream.

    Args:
        settings: which tars.
        remote: attempts to read them, and whether commands may run.

    Raises:
        ValueError: there are none, the pattern is malformed, or commands may not run.
    """
    try:
        places = list(_find(settings, remote))
        lengths = _lengths_of(places)
    except (ValueError, OSError) as error:
        raise ValueError(f"data.stream.tars: {error}") from None
    names = [place.name for place in places]
    if len(set(names)) < len(names):  # of several folders
        names = [str(place) for place in places]
    return TarStream(
        settings=settings,
        places=tuple(places),
        names=tuple(names),
        lengths=lengths,
        attempts=remote.attempts,
    )


def _lengths_of(places: Sequence[Location | PipedFile]) -> tuple[int, ...]:
    """Return the lengths of tars; 1 for all if finding out takes commands or many requests."""
    lengths: list[int | None] = []
    for place in places:
        if isinstance(place, PipedFile) or (
            isinstance(place, RemotePath) and len(places) > MOST_REQUESTS
        ):
            return (1,) * len(places)
        try:
            length = place.stat().st_size if isinstance(place, Path) else place.content_length()
        except OSError as error:
            raise ValueError(
                f"{place} cannot be read: {error.strerror or 'it is missing'}."
            ) from None
        lengths.append(length)
    known = [length for length in lengths if length is not None]
    return tuple(max(1, one) for one in known) if len(known) == len(places) else (1,) * len(places)


def _find(settings: StreamSettings, remote: RemoteReading) -> Iterator[Location | PipedFile]:
    if settings.tars.startswith(PIPE):
        if not remote.allow_pipe:
            raise ValueError(
                f"{settings.tars!r} runs a command, which is refused: set data.allow_pipe to true."
            )
        yield from expand_command(PipedFile(settings.tars.removeprefix(PIPE), remote.attempts))
        return
    place = locate(settings.tars)
    for tar in list_tars(place).tars:
        yield replace(tar, attempts=remote.attempts) if isinstance(tar, RemotePath) else tar
    splits = "" if is_pattern(place) else describe_splits(tar.name for tar in list_tars(place).tars)
    if splits:
        print_on_main(
            f"WARNING: the tars in {place} are of several splits, and all are read: {splits}. "
            f"Choose some by a pattern, as in {place}/train-*.tar"
        )
