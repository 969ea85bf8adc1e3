"""Lists of paths as sources: text, TSV, CSV, JSON lines or Parquet."""

import json
import math
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.format.kinds import Examples
from data_prep.format.storage import Location, RemotePath, locate
from data_prep.format.stores import StorageError
from data_prep.format.tars import as_local_file
from data_prep.sources.external_sort import ExternalSort
from data_prep.sources.files import Selection, SourceError, SourceFile, normal_path
from data_prep.sources.folders import FolderSource, RemoteFolderSource
from data_prep.sources.json_fields import clean_fields
from data_prep.sources.list_columns import find_column
from data_prep.sources.list_labels import LabelTally, parse_label, text_of
from data_prep.sources.list_paths import PathRules, describe_mistake
from data_prep.sources.list_rows import TEXT_SUFFIXES, Layout, ListRow, find_layout, read_rows

LISTED_AGAIN = "listed again"
"""Kind of rows that are the same as an earlier one."""


@dataclass(frozen=True, kw_only=True)
class _Columns:
    path: str
    label: str | None
    split: str | None


@dataclass(frozen=True, kw_only=True)
class _Overview:
    """What a first reading of a list found."""

    layout: Layout
    columns: _Columns
    tally: LabelTally
    """What the rows that are used have as labels."""
    repeated: set[int] = field(default_factory=set)
    """Numbers of rows that are the same as an earlier one."""
    contradictions: dict[int, str] = field(default_factory=dict)
    """Number of a row whose path has several labels → the problem."""


class ListSource:
    """A list of paths in a folder, optionally with labels, splits and other fields.

    A text has one path per line, optionally followed by a tab and a label, or a first line that
    names the columns, as CSV has. Columns of paths and labels are found by their names; columns
    without a role become JSON fields. Where there are labels, a row without one is unlabelled.
    """

    is_explicit = True
    classes: tuple[str, ...] | None = None

    def __init__(self, path: Location, selection: Selection) -> None:
        self.path = path
        self.skipped: Counter[str] = Counter()
        self.examples = Examples()
        self._selection = selection
        self._overview: _Overview | None = None
        root = locate(selection.root) if selection.root else path.parent
        self._folder = (
            RemoteFolderSource(root) if isinstance(root, RemotePath) else FolderSource(root)
        )
        self._rules = PathRules(root)

    def files(self) -> Iterator[SourceFile]:
        """Yield every file in the list, in its order.

        Raises:
            SourceError: the list is damaged, is not UTF-8 or has no column of paths.
        """
        for file in self.unmeasured_files():
            yield self._measure(file)

    def unmeasured_files(self) -> Iterator[SourceFile]:
        """Yield every file in the list without size and stamp; the files are not accessed.

        Raises:
            SourceError: the list is damaged, is not UTF-8 or has no column of paths.
        """
        self.skipped.clear()
        with as_local_file(self.path) as path:
            overview = self._read_over(path)
            for number, row in enumerate(read_rows(path, overview.layout)):
                if number in overview.repeated:
                    self.skipped[LISTED_AGAIN] += 1
                    place = self._place(row, overview.columns)[0]
                    self.examples.add(LISTED_AGAIN, f"{place} in {row.place}")
                    continue
                file = self._describe(row, overview.columns)
                problem = overview.contradictions.get(number)
                yield file._replace(problem=problem) if problem else file

    def describe_columns(self) -> str:
        """Return where paths and labels come from, for the user.

        Raises:
            SourceError: the list is damaged, is not UTF-8 or has no column of paths.
        """
        overview = self._overview
        if overview is None:
            with as_local_file(self.path) as path:
                overview = self._read_over(path)
        columns = overview.columns
        if columns.label is None:
            names = ", ".join(overview.layout.names)
            return (
                f"no column of one label per image among {names}: classes are names of folders; "
                "--label-column chooses one"
            )
        counts = overview.tally.describe(len(overview.repeated))
        if not overview.layout.has_header and overview.layout.delimiter:
            return f"labels from the list{counts}"
        return f"paths from column {columns.path!r}, labels from column {columns.label!r}{counts}"

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of a file.

        Raises:
            UnreadableFileError: it is missing or may not be read.
        """
        return self._folder.read(file)

    def close(self) -> None:
        """Nothing is held open."""

    def _read_over(self, path: Path) -> _Overview:
        """Find the columns, check the labels, and find rows that repeat or contradict others."""
        if self._overview is None:
            layout = find_layout(path, self._selection.path_column)
            overview = _Overview(
                layout=layout, columns=self._find_columns(layout), tally=LabelTally(self.path)
            )
            repeated = self._read_first(path, overview)
            overview.tally.check()
            if repeated:
                self._compare_rows(path, overview, repeated)
            self._overview = overview
        return self._overview

    def _read_first(self, path: Path, overview: _Overview) -> frozenset[int]:
        """Count labels, and return the hashes of paths in several rows; all take 8 bytes each."""
        hashes = array("q")
        columns = overview.columns
        for row in read_rows(path, overview.layout):
            place, problem = self._place(row, columns)
            hashes.append(hash(normal_path(place)))
            if columns.label is None:
                continue
            file = SourceFile(place, 0, 0, split=self._split(row, columns))
            if not self._selection.wants(file, explicit=True):
                continue
            if problem or row.problem:
                overview.tally.unusable += 1
            else:
                value = row.cells.get(columns.label)
                label = self._parse(row, columns.label, value, parse_label)
                overview.tally.add(row.place, value, label)
        ordered = np.sort(np.frombuffer(hashes, dtype=np.int64))
        return frozenset(ordered[1:][ordered[1:] == ordered[:-1]].tolist())

    def _compare_rows(self, path: Path, overview: _Overview, repeated: frozenset[int]) -> None:
        """Compare the rows of repeated paths, sorted on disk."""
        with tempfile.TemporaryDirectory(prefix="data-prep-") as folder:
            sorter = ExternalSort(Path(folder), "rows")
            for number, row in enumerate(read_rows(path, overview.layout)):
                place = normal_path(self._place(row, overview.columns)[0])
                if hash(place) not in repeated:
                    continue
                file = self._describe(row, overview.columns)
                if not file.problem and self._selection.wants(file, explicit=True):
                    key = place.encode("utf-8", "surrogateescape").hex()
                    values = [row.place, file.label, file.split, file.fields]
                    sorter.add(key, f"{number:018d}{json.dumps(values)}")
            rows = ((key, int(line[:18]), json.loads(line[18:])) for key, line in sorter.merged())
            for _, same in groupby(rows, key=lambda row: row[0]):
                _compare(list(same), overview)

    def _find_columns(self, layout: Layout) -> _Columns:
        asked, names = self._selection, layout.names
        if not names:
            raise SourceError(f"{self.path} has no rows. Give a list with an image in each.")
        path = find_column(names, "path", asked.path_column, self.path)
        label = find_column(names, "label", asked.label_column, self.path)
        split = asked.split_column if asked.split_column in names else None
        if split is None and (asked.only_split or asked.split_column != Selection.split_column):
            split = find_column(names, "split", asked.split_column, self.path)
        for option, wanted, found in (
            ("path", asked.path_column or "path", path),
            ("label", asked.label_column, label),
            ("split", asked.only_split and asked.split_column, split),
        ):
            if wanted and found is None:
                raise SourceError(
                    f"{self.path} has no column `{wanted}`, only {', '.join(names) or 'no rows'}. "
                    f"Name the column with --{option}-column."
                )
        assert path is not None
        return _Columns(path=path, label=label if label != path else None, split=split)

    def _describe(self, row: ListRow, columns: _Columns) -> SourceFile:
        rest = dict(row.cells)
        rest.pop(columns.path, None)
        label = None
        if columns.label is not None:
            label = self._parse(row, columns.label, rest.pop(columns.label, None), parse_label)
        path, problem = self._place(row, columns)
        fields, notes = self._describe_fields(row, rest)
        return SourceFile(
            path=path,
            size=0,
            stamp=0,
            problem=row.problem or problem,
            label=label,
            split=self._split(row, columns),
            fields=fields,
            notes="; ".join(notes),
        )

    def _place(self, row: ListRow, columns: _Columns) -> tuple[str, str]:
        """Return the path of a row below the root, and its problem."""
        given = row.cells.get(columns.path)
        try:
            path, problem = self._rules.place(None if _is_missing(given) else given)
        except ValueError as error:
            raise SourceError(
                f"{self.path}, {row.place}: {columns.path} {error}. Name the column of the paths "
                "with --path-column."
            ) from None
        return path, problem if path else f"{row.place} has no path"

    def _split(self, row: ListRow, columns: _Columns) -> str:
        value = row.cells.get(columns.split) if columns.split is not None else None
        return "" if value is None else self._parse(row, columns.split or "", value, text_of)

    def _parse(self, row: ListRow, column: str, value: object, parse: Any) -> str:
        try:
            return str(parse(value))
        except ValueError as error:
            raise SourceError(
                f"{self.path}, {row.place}: {column} {_cut(value)} {error}."
            ) from None

    def _describe_fields(self, row: ListRow, fields: Mapping[str, Any]) -> tuple[str, list[str]]:
        """Return the fields of a row as JSON, and notes on what was replaced in them."""
        given = {name: value for name, value in fields.items() if name and not _is_missing(value)}
        if self.path.name.lower().endswith(TEXT_SUFFIXES):
            for name, value in given.items():
                if not value.isascii():  # bytes in another encoding are kept for paths alone
                    self._parse(row, name, value, text_of)
        try:
            cleaned = clean_fields(given)
        except ValueError as error:
            raise SourceError(f"{self.path}, {row.place} {error}.") from None
        text = json.dumps(cleaned.values) if given else ""
        return text, sorted({*cleaned.notes, *row.notes})

    def _measure(self, file: SourceFile) -> SourceFile:
        if file.problem:
            return file
        try:
            size, stamp = self._folder.size_and_stamp(file.path)
        except StorageError:
            raise
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "its name is impossible"
            reason = f"it cannot be read: {reason or 'it is not there'}"
            return file._replace(problem=reason + describe_mistake(file.path))
        return file._replace(size=size, stamp=stamp)


def _compare(rows: list[tuple[str, int, list[Any]]], overview: _Overview) -> None:
    """Note which rows of one path repeat or contradict others; `rows` are in their order."""
    places: dict[str, str] = {}
    for _, _, (place, label, *_) in rows:
        places.setdefault(label, place)
    if len(places) > 1:
        named = [f"{label or 'none'!r} in {place}" for label, place in list(places.items())[:3]]
        problem = f"it is listed with different labels: {', '.join(named)}"
        overview.contradictions.update((number, problem) for _, number, _ in rows)
        return
    seen: set[str] = set()
    for _, number, (_, *rest) in rows:
        content = json.dumps(rest)
        if content in seen:
            overview.repeated.add(number)
        seen.add(content)


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
