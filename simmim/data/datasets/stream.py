"""Third-party WebDataset tars without a manifest, read in sequence by webdataset's pipeline.

A pass reads every tar once, in an order of its own: the tars are cut into parts of equal length,
one for each data worker of each process, and the samples of a part go through a shuffle buffer.
Where a part ends within a tar, each of the two readers takes its fraction of the tar's samples, so
that any number of tars is shared evenly by any number of workers, and no sample is read twice.

webdataset's own opener runs what is not a file (curl, gsutil, commands), and its decoders unpickle.
Neither is used: bytes come from `data_prep.format.storage`, and members are grouped and images
chosen as `data-prep index` does it. Nor is its reader of tars, which takes a damaged header for the
end.
"""

import random
import shlex
import tarfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

from data_prep.bounds import Count, Positive
from data_prep.channels import ChannelNames
from data_prep.format.kinds import describe_kinds
from data_prep.format.patterns import describe_splits, is_pattern, list_tars
from data_prep.format.pipes import PIPE, PipedFile, expand_command
from data_prep.format.samples import SampleReader, TarSample, check_image_key
from data_prep.format.storage import Location, RemotePath, locate
from data_prep.format.stores import StorageError
from data_prep.format.tars import TarError, describe_problem, stream_tar
from data_prep.format.text import count_noun
from simmim.data.datasets.folder import MAX_FILE_BYTES
from simmim.data.datasets.image_set import ShardUnavailableError, read_patiently
from simmim.data.datasets.remote import RemoteReading
from simmim.data.order.parts import WHOLE, Part, Piece, pieces_of
from simmim.data.order.randomness import shuffled, stream_seed
from simmim.data.order.source import DataError
from simmim.environment import print_on_main
from simmim.recipe import settings

MOST_FIRST_TARS = 8
"""Largest number of tars, from the first on, that are looked at for a first image."""
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
    with data.allow_pipe, as in `pipe:gzip -dc DIR/{000..099}.tar.gz`."""
    samples: Count | None = None
    """Samples of an epoch, over all processes: at most those in the tars. An epoch ends early, on
    all processes, where one has no more."""
    image_key: str | None = None
    """Suffix of the images after the key, if it is not an extension alone: `image.png` for
    KEY.image.png, `input.jpeg` for KEY.input.jpeg. null takes KEY.jpg and the other extensions of
    images, as `data-prep index` does."""
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
    """None: only the file itself may have them."""
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
    key: str
    """Empty for the rest of a tar."""
    reason: str
    """Its defect, or the kind of member that it has instead of an image."""


Report = Callable[[LeftOut], object]
"""Takes what was left out."""


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
        """Return the first images of the first tar that has any, for checks and pictures.

        Raises:
            ValueError: none of the first tars has an image.
            DataError: a tar cannot be opened or fetched.
        """
        left_out: list[LeftOut] = []
        looked_at = self.places[:MOST_FIRST_TARS]
        for number in range(len(looked_at)):
            with closing(self._read(Piece(number), left_out.append)) as images:
                if found := list(islice(images, most)):
                    return found
        kinds = Counter(one.reason for one in left_out if one.kind == "no image")
        damage = next((one.reason for one in left_out if one.kind == "skipped"), "")
        other = f"only {describe_kinds(kinds)}" if kinds else "no samples"
        others = len(looked_at) - 1
        more = f" and {count_noun(others, 'tar')} after it" if others else ""
        hint = (
            ""
            if damage
            else " Images are members KEY.jpg, KEY.png and others; name those of "
            "other names by data.stream.image_key, as image.png of KEY.image.png."
        )
        raise ValueError(
            f"data.stream: no image can be read from {looked_at[0]}{more}: "
            f"{(damage or other).rstrip('.')}.{hint}"
        )

    def _read_pieces(self, pieces: Iterable[Piece], report: Report) -> Iterator[StreamedImage]:
        for piece in pieces:
            yield from self._read(piece, report)

    def _read(self, piece: Piece, report: Report) -> Generator[StreamedImage, None, None]:
        place = self.places[piece.tar]
        reader = _PieceReader(piece, place, self.names[piece.tar], report)
        with closing(stream_tar(place, self._blocks(place))) as members:
            yield from reader.images(members, self.settings.image_key)

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


class _PieceReader:
    """Finds the images of a piece of a tar among its members; a tar ends where it is damaged.

    Args:
        piece: the piece.
        place: the tar.
        name: name of the tar.
        report: takes what is left out.
    """

    def __init__(
        self, piece: Piece, place: Location | PipedFile, name: str, report: Report
    ) -> None:
        self.piece, self.place, self.name, self.report = piece, place, name, report
        self._read: Callable[[], bytes] = bytes
        """Returns the bytes of the current member."""
        self._taken: dict[str, bytes] = {}
        """Images of the current sample, by the names of their members."""

    def images(
        self, members: Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]], image_key: str | None
    ) -> Iterator[StreamedImage]:
        """Yield the images, given the members of the tar and functions that read them."""
        key = None if image_key is None else check_image_key(image_key)
        reader = SampleReader(self.place, image_key=key)
        # Labels are not used, so any that is valid will do.
        samples = reader.group(self._until_damaged(members), lambda *_: b"0", self._take)
        try:
            for row, sample in enumerate(samples):
                if self.piece.has(row) and (image := self._image_of(row, sample)) is not None:
                    yield image
                self._taken.clear()
        except TarError as error:
            self._leave_out("", str(error))

    def _until_damaged(
        self, members: Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]
    ) -> Iterator[tarfile.TarInfo]:
        try:
            for member, read in members:
                self._read = read
                yield member
        except TarError as error:  # the sample before the damage is whole
            self._leave_out("", str(error))

    def _take(self, row: int, member: tarfile.TarInfo) -> None:
        """Read an image of the piece when its member is met."""
        if self.piece.has(row) and describe_problem(member) is None and _fits(member):
            self._taken[member.name] = self._read()

    def _image_of(self, row: int, sample: TarSample) -> StreamedImage | None:
        """Return the image of a sample; None if it is left out."""
        if not sample.problem and sample.images:
            ((extension, member),) = sample.images.items()
            if _fits(member):
                return StreamedImage(
                    tar=self.piece.tar,
                    row=row,
                    shard_name=self.name,
                    key=sample.key,
                    extension=extension.rpartition(".")[2],
                    image=self._taken[member.name],
                )
            self._leave_out(sample.key, f"the file has more than {MAX_FILE_BYTES:,} bytes")
        elif sample.problem:
            self._leave_out(sample.key, f"the sample is refused: {sample.problem}")
        else:
            self._leave_out(sample.key, sample.others[0][0], kind="no image")
        return None

    def _leave_out(
        self, key: str, reason: str, kind: Literal["skipped", "no image"] = "skipped"
    ) -> None:
        self.report(LeftOut(kind=kind, shard_name=self.name, key=key, reason=reason.rstrip(".")))


def _fits(member: tarfile.TarInfo) -> bool:
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
