"""The samples of a WebDataset tar: consecutive members of one key, and what is wrong with them.

One grouping for all that reads foreign tars, so that `index` and `reshard` find the same images
and labels, and refuse the same samples.
"""

import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice

from data_prep.format.kinds import SECOND_DOT, Examples, count_kind, kind_of, suffix_of
from data_prep.format.labels import MAX_LABEL_BYTES, LabelError, parse_label
from data_prep.format.manifest import IMAGE_EXTENSIONS, IMAGE_SUFFIXES, READ_EXTENSIONS
from data_prep.format.pipes import PipedFile
from data_prep.format.storage import ByteReader, Location
from data_prep.format.tars import TarError, Warn, describe_problem, walk_tar

# Key and extension, and metadata members, as webdataset itself parses them.
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_COMPANIONS = {"cls", "json", "txt"}
_DOUBLE = re.compile(r"[a-z][a-z0-9_-]{0,11}\.[a-z][a-z0-9_-]{0,11}")
_PEEKED = 1_000

ReadMember = Callable[[tarfile.TarInfo, int], bytes]
"""Returns at most the given number of bytes from the start of a member."""


@dataclass(kw_only=True)
class TarSample:
    """A run of members with the same key: the path up to the first dot of the file name."""

    key: str
    images: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    """Image members by their extension in lower case; one, unless the sample has a problem."""
    label: int = -1
    """Integer in the `cls` member, -1 if there is none."""
    json: tarfile.TarInfo | None = None
    """The `json` member."""
    extensions: list[str] = field(default_factory=list)
    """Extensions of all members, in lower case."""
    repeated: set[str] = field(default_factory=set)
    """Extensions of images that occur more than once."""
    problem: str = ""
    """Why the sample must not be used, as a clause; empty if it may be."""

    @property
    def others(self) -> list[tuple[str, str]]:
        """Kind (see `data_prep.format.kinds`) and name of what it holds instead of an image.

        They are all images that are not meant, as `a.1.jpg` and `a.2.jpg` of the key `a` and the
        extensions `1.jpg` and `2.jpg`, or else one member.
        """
        members = [f"{self.key}.{extension}" for extension in self.extensions]
        pairs = list(zip(self.extensions, members, strict=True))
        images = [pair for pair in pairs if suffix_of(pair[1]) in IMAGE_SUFFIXES]
        if images:
            return [
                (suffix_of(name) + (SECOND_DOT if "." in extension else ""), name)
                for extension, name in images
            ]
        main = [name for extension, name in pairs if extension not in _COMPANIONS] or members
        return [(kind_of(main[0]), main[0])]


def has_labelled_samples(path: Location) -> bool:
    """Return whether one of the first members of a tar is a `cls` next to the image of its key."""
    images, labels = set[str](), set[str]()
    with suppress(TarError), closing(walk_tar(path)) as members:
        for member in islice(members, _PEEKED):
            if match := _KEY.fullmatch(member.name):
                key, extension = match.group(1), match.group(2).lower()
                if extension in READ_EXTENSIONS:
                    images.add(key)
                elif extension == "cls":
                    labels.add(key)
    return not images.isdisjoint(labels)


def check_image_key(name: str) -> str:
    """Return what the names of images have after their key, in lower case: `image.png`.

    Raises:
        ValueError: no image has such a name.
    """
    image_key = name.removeprefix(".").lower()
    if "/" in image_key or image_key.rpartition(".")[2] not in READ_EXTENSIONS:
        raise ValueError(
            f"the image key is {name!r}; give what follows the key and a dot in the names of the "
            f"images, as image.png of KEY.image.png, ending in one of {', '.join(READ_EXTENSIONS)}."
        )
    return image_key


def choose_images(names: Sequence[str]) -> list[str]:
    """Return those of the extensions of a sample's images that may be meant.

    Next to a picture that shards may hold, an array or a picture of another format is something
    else: depth, a mask.
    """
    pictures = [name for name in names if name in IMAGE_EXTENSIONS and name != "npy"]
    arrays = [name for name in names if name == "npy"]
    return pictures or arrays or list(names)


class SampleReader:
    """Groups the members of a tar into samples.

    Args:
        path: the tar.
        extensions: extensions of images, in lower case.
        image_key: the one name of images after their key, as `check_image_key` returns it; None:
            one of `extensions`.
        missing_end: see `walk_tar`.

    Attributes:
        skipped: kind → number of members that belong to no sample, or are beside the image, label
            and JSON of one.
        examples: first of these members by kind.
    """

    def __init__(
        self,
        path: Location | PipedFile,
        *,
        extensions: tuple[str, ...] = READ_EXTENSIONS,
        image_key: str | None = None,
        missing_end: Warn | None = None,
    ) -> None:
        self._path, self._missing_end = path, missing_end
        self._extensions = extensions if image_key is None else (image_key,)
        self.skipped: Counter[str] = Counter()
        self.examples = Examples()

    def samples(self) -> Iterator[TarSample]:
        """Yield every sample, those without an image too.

        Raises:
            TarError: the tar is damaged (see `walk_tar`), or the members of a sample are apart.
            OSError: it cannot be read.
        """
        assert not isinstance(self._path, PipedFile)
        with closing(ByteReader(self._path)) as tar:
            members = walk_tar(self._path, missing_end=self._missing_end)
            yield from self.group(
                members, lambda member, most: tar.read(member.offset_data, min(member.size, most))
            )

    def group(
        self,
        members: Iterable[tarfile.TarInfo],
        read: ReadMember,
        take: Callable[[int, tarfile.TarInfo], object] = lambda _row, _member: None,
    ) -> Iterator[TarSample]:
        """Yield every sample of members that are met in order.

        Args:
            members: the members.
            read: returns the first bytes of a member.
            take: called with the number of the sample and the member when an image is met.

        Raises:
            TarError: the members of a sample are apart.
        """
        seen: set[str] = set()
        sample: TarSample | None = None
        for member in members:
            match = None if member.isdir() else self._key(member)
            if match is None:
                continue
            key, extension = match.group(1), match.group(2).lower()
            if sample is None or sample.key != key:
                if sample is not None:
                    yield self._finish(sample)
                if key in seen:
                    raise TarError(
                        f"{self._path}: the members of sample {key!r} are not contiguous, so "
                        "that no reader finds them together. Sort them."
                    )
                seen.add(key)
                sample = TarSample(key=key, problem=_describe_key(key))
            self._add(sample, member, extension, read)
            if sample.images.get(extension) is member:
                take(len(seen) - 1, member)
        if sample is not None:
            yield self._finish(sample)

    def _key(self, member: tarfile.TarInfo) -> "re.Match[str] | None":
        if _META.match(member.name):
            return None
        match = _KEY.fullmatch(member.name)
        if match is None:
            self._skip(kind_of(member.name), member.name)
        return match

    def _add(
        self, sample: TarSample, member: tarfile.TarInfo, extension: str, read: ReadMember
    ) -> None:
        sample.extensions.append(extension)
        is_image = extension in self._extensions
        problem = describe_problem(member)
        if problem and not is_image:
            problem = f"its member {member.name!r} must not be read: {problem}"
        if is_image:
            if extension in sample.images:
                sample.repeated.add(extension)
            sample.images[extension] = member
        elif extension == "json" and not problem:
            sample.json = member
        elif extension == "cls" and sample.extensions.count("cls") > 1:
            problem = problem or f"its sample {sample.key!r} has two labels (cls)"
        elif extension == "cls" and not problem:
            try:
                sample.label = parse_label(read(member, MAX_LABEL_BYTES + 1))
            except LabelError as error:
                problem = str(error)
        sample.problem = sample.problem or problem or ""

    def _skip(self, kind: str, member: str) -> None:
        self.examples.add(count_kind(self.skipped, kind), member)

    def _finish(self, sample: TarSample) -> TarSample:
        sample.images = {name: sample.images[name] for name in choose_images(list(sample.images))}
        sample.problem = sample.problem or _describe_images(sample)
        if sample.images and not sample.problem and len(sample.extensions) > 1:
            used = {*sample.images, "cls", "json"}
            for extension in sample.extensions:
                if extension not in used:
                    kind = _kind_of_member(sample.key, extension)
                    self._skip(kind, f"{sample.key}.{extension}")
                used.discard(extension)  # of several JSONs one is read
        return sample


def _kind_of_member(key: str, extension: str) -> str:
    """Return the kind of a member beside an image: `.txt`, `.mask.png`."""
    return f".{extension}" if _DOUBLE.fullmatch(extension) else kind_of(f"{key}.{extension}")


def _describe_images(sample: TarSample) -> str:
    names = sorted(sample.images)
    if len(names) > 1:
        return f"its sample {sample.key!r} has two images, {' and '.join(names)}"
    for name, member in sample.images.items():
        if name in sample.repeated:
            return f"its image {member.name!r} occurs twice"
        if member.size == 0:
            return "it is empty"
    return ""


def _describe_key(key: str) -> str:
    try:
        key.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    return ""
