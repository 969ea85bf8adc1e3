"""WebDataset tars as sources, for resharding."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any, NoReturn

from data_prep.format.index import read_index
from data_prep.format.kinds import Examples
from data_prep.format.manifest import (
    MANIFEST_NAME,
    REMEDY,
    Manifest,
    ManifestError,
    ShardEntry,
    read_manifest,
)
from data_prep.format.patterns import (
    PatternError,
    TarListing,
    describe_names,
    describe_prefixes,
    describe_splits,
    is_pattern,
    list_tars,
)
from data_prep.format.samples import SampleReader, TarSample
from data_prep.format.storage import ByteReader, Location
from data_prep.format.text import WarnOnce
from data_prep.sources.files import Selection, SourceError, SourceFile, UnreadableFileError
from data_prep.sources.json_fields import (
    LEFT_OUT,
    MAX_JSON_BYTES,
    TOO_LONG,
    JsonFields,
    parse_fields,
)
from data_prep.sources.list_columns import find_named
from data_prep.sources.list_labels import text_of

_NOT_IN_MANIFEST = "tars not in the manifest"


class ShardSource:
    """WebDataset tars, read by sample with its label, JSON fields and key.

    Tars of a set with a manifest must be those of the manifest: none missing, none replaced.

    Args:
        path: folder of the tars, a pattern of tars in one folder, or one tar.
        selection: column with the split, and how tars may end.
        notice: a warning when the tars are listed, or empty.

    Attributes:
        skipped: kind → number of members and archives that belong to no sample.
    """

    is_explicit = True

    def __init__(self, path: Location, selection: Selection, *, notice: str = "") -> None:
        self.path = path
        self._notice = notice
        self._selection = selection
        self._is_pattern = is_pattern(path)
        self._folder = path.parent if self._is_pattern else path
        self._open: tuple[str, ByteReader] | None = None
        self._say = WarnOnce()
        self.skipped: Counter[str] = Counter()
        self.examples = Examples()
        self.classes: tuple[str, ...] | None = None
        self._manifest: Manifest | None = None
        if (self._folder / MANIFEST_NAME).exists():
            self._manifest = read_manifest(self._folder)
            self.classes = self._manifest.classes or None

    def files(self) -> Iterator[SourceFile]:
        """Yield the image of every sample; those that cannot be used have a problem.

        Raises:
            SourceError: there are no tars, or they are of several splits.
            TarError: a tar is damaged or cut.
            ManifestError: the tars are not those of their manifest.
        """
        if self._notice:
            self._say(self._notice)
        listed = self._list_tars()
        self.skipped = listed.skipped.copy()
        entries = self._match_entries([tar.name for tar in listed.tars])
        for tar in listed.tars:
            if tar.name in entries:
                yield from self._samples(tar.name, entries[tar.name])
            else:
                self.skipped[_NOT_IN_MANIFEST] += 1
                self.examples.add(_NOT_IN_MANIFEST, tar.name)

    def unmeasured_files(self) -> Iterator[SourceFile]:
        """Yield the image of every sample; labels are in the tars, so these are read anyway."""
        return self.files()

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of an image.

        Raises:
            UnreadableFileError: the tar is missing or truncated.
        """
        try:
            data = self._reader(file.container).read(file.offset, file.size)
        except OSError as error:
            raise UnreadableFileError(f"cannot be read: {error.strerror or error}") from None
        if len(data) != file.size:
            raise UnreadableFileError("the tar is truncated")
        return data

    def close(self) -> None:
        """Close the tar read last."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _list_tars(self) -> TarListing:
        try:
            listed = list_tars(self.path)
        except PatternError as error:
            raise SourceError(self._describe_elsewhere() or str(error)) from None
        names = [tar.name for tar in listed.tars]
        if len({str(tar.parent) for tar in listed.tars}) > 1:
            raise SourceError(
                f"{self.path} stands for tars in several folders. Give those of one folder."
            )
        splits = describe_splits(names)
        if splits and not self._is_pattern:
            raise SourceError(
                f"the tars in {self.path} are of several splits: {splits}. Give one of them, as in "
                f"'{self.path}/train-*.tar', or all of them as '{self.path}/*.tar'."
            )
        if prefixes := describe_prefixes(names):
            self._say(f"{self.path}: names with several beginnings, all in one set: {prefixes}")
        return listed

    def _describe_elsewhere(self) -> str:
        """Return where the tars of a set are that was indexed in another folder, or nothing."""
        entries = self._manifest.shards if self._manifest is not None else ()
        folders = sorted({entry.place.rpartition("/")[0] for entry in entries if entry.place})
        if not folders or self._is_pattern:
            return ""
        return (
            f"{self.path} is an index of tars elsewhere, in {describe_names(folders)}. Reshard "
            f"those, if need be by a pattern: '{folders[0]}/*.tar'."
        )

    def _match_entries(self, names: list[str]) -> dict[str, ShardEntry | None]:
        """Return the tars to read, each with its entry in the manifest, if there is one.

        Raises:
            ManifestError: a tar is missing, or none that data-prep wrote.
        """
        if self._manifest is None:
            return dict.fromkeys(names)
        entries = {entry.name: entry for entry in self._manifest.shards if not entry.place}
        missing = sorted(entries.keys() - names)
        if missing and not self._is_pattern:
            raise ManifestError(
                f"{self._folder} lacks {describe_names(missing)} of its manifest. Restore what is "
                f"missing, or choose among the others: '{self._folder / '*.tar'}'."
            )
        strays = [name for name in names if name not in entries]
        if strays and ("source" in self._manifest.options or len(strays) == len(names)):
            raise ManifestError(
                f"{self._folder} has tars that are not in its manifest: {describe_names(strays)}. "
                f"Move them elsewhere, or the {MANIFEST_NAME} to take all tars as they are."
            )
        return {name: entries[name] for name in names if name in entries}

    def _reader(self, name: str) -> ByteReader:
        if self._open is None or self._open[0] != name:
            self.close()
            self._open = (name, ByteReader(self._folder / name))
        return self._open[1]

    def _samples(self, name: str, entry: ShardEntry | None) -> Iterator[SourceFile]:
        path = self._folder / name
        promised = None if entry is None else _Promise(self._folder, entry)
        reader = SampleReader(
            path,
            image_key=None if self._manifest is None else self._manifest.image_key,
            missing_end=self._say if self._may_lack_end() else None,
        )
        with closing(ByteReader(path)) as tar:
            for sample in reader.samples():
                if promised is not None:
                    promised.check(sample)
                yield from self._files_of(sample, name, tar)
        if promised is not None:
            promised.check_end()
        self.skipped += reader.skipped
        for kind, members in reader.examples.paths.items():
            for member in members:
                self.examples.add(kind, f"{name}/{member}")

    def _may_lack_end(self) -> bool:
        indexed_so = self._manifest is not None and self._manifest.allows_missing_end
        return self._selection.allow_missing_end or indexed_so

    def _files_of(self, sample: TarSample, name: str, tar: ByteReader) -> Iterator[SourceFile]:
        """Yield the image of a sample; all of its images if it has a problem."""
        if not sample.images:
            problem = sample.problem or "its sample has no image"
            yield SourceFile(f"{name}/{sample.key}", 0, 0, problem=problem)
            return
        for member in sample.images.values():
            file = SourceFile(
                path=f"{name}/{member.name}",
                size=member.size,
                stamp=int(member.mtime),
                offset=member.offset_data,
                problem=sample.problem,
                container=name,
                label="",
            )
            yield file if sample.problem else self._describe(file, sample, tar)

    def _describe(self, file: SourceFile, sample: TarSample, tar: ByteReader) -> SourceFile:
        """Return a file with the label, path, split and fields of its sample."""
        if sample.label >= 0:
            file = self._name_class(file, sample.label)
        found = _read_fields(sample, tar)
        fields = found.values
        path, split = fields.pop("path", None), self._split(fields)
        if isinstance(path, str) and path:
            file = file._replace(path=path)
        if self._selection.only_split is not None and LEFT_OUT & {*found.notes}:
            # Without its split nobody knows whether it is wanted.
            file = file._replace(problem="its JSON is damaged", split=self._selection.only_split)
            split = self._selection.only_split
        return file._replace(
            split=split,
            fields=json.dumps({**fields, "key": sample.key}),
            notes="; ".join(found.notes),
        )

    def _split(self, fields: Mapping[str, Any]) -> str:
        """Return the split in the fields of a sample, whose name is found as a column of a list."""
        name = find_named(tuple(fields), self._selection.split_column)
        value = None if name is None else fields[name]
        return "" if isinstance(value, list | dict) else text_of(value)

    def _name_class(self, file: SourceFile, label: int) -> SourceFile:
        if self.classes is None:
            return file._replace(label=str(label))
        if label < len(self.classes):
            return file._replace(label=self.classes[label])
        return file._replace(problem=f"its label {str(label)!r} is no class of the manifest")


class _Promise:
    """The index of a tar, against which its samples are checked in their order."""

    def __init__(self, folder: Location, entry: ShardEntry) -> None:
        self._index, self._entry = read_index(folder, entry), entry
        self._place = folder / entry.name
        self._known = frozenset(self._index.extensions.tolist())
        self._row = 0

    def check(self, sample: TarSample) -> None:
        """Compare a sample with the next row of the index.

        Raises:
            ManifestError: it is another one.
        """
        row, index = self._row, self._index
        for member in sample.images.values() if row < len(index) else ():
            found = (sample.key, member.offset_data, member.size, sample.label)
            if found == (index.keys[row], index.offsets[row], index.sizes[row], index.labels[row]):
                self._row += 1
                return
        # Sets indexed when fewer kinds of images were known leave the others out.
        if not sample.problem and self._known.intersection(sample.images):
            self._refuse()

    def check_end(self) -> None:
        """Check that all rows were found.

        Raises:
            ManifestError: some were not.
        """
        if self._row < len(self._index):
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise ManifestError(
            f"{self._place} does not hold the samples of its index {self._entry.index}: it was "
            f"replaced or changed. {REMEDY}"
        )


def _read_fields(sample: TarSample, tar: ByteReader) -> JsonFields:
    if sample.json is None:
        return JsonFields()
    if sample.json.size > MAX_JSON_BYTES:
        return JsonFields(notes=(TOO_LONG,))
    return parse_fields(tar.read(sample.json.offset_data, sample.json.size))
