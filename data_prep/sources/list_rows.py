"""Rows of lists: text, TSV, CSV, JSON lines and Parquet, read a few at a time.

Damage that could hide rows (a quote that is not closed, a line that is not JSON) ends the reading
with the number of its line.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from data_prep.format.kinds import suffix_of
from data_prep.format.manifest import IMAGE_SUFFIXES
from data_prep.sources.files import SourceError
from data_prep.sources.json_fields import decode_json
from data_prep.sources.list_columns import find_column, looks_like_header
from data_prep.sources.list_paths import describe_mistake

TEXT_SUFFIXES = (".txt", ".tsv", ".csv")
"""File name suffixes of lists whose cells are text alone."""
LIST_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".ndjson", ".parquet")
"""File name suffixes of lists."""

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_DELIMITERS = ",;\t|"
_WITHOUT_HEADER = ("path", "label")


class ListRow(NamedTuple):
    """One row of a list."""

    place: str
    """Its place for messages: `line 7`, or `row 7` of a Parquet file, counted from 1."""
    cells: Mapping[str, Any]
    """Column → value."""
    problem: str = ""
    """Why the row cannot be used, or empty."""
    notes: frozenset[str] = frozenset()
    """What of its JSON was replaced."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the rows of a list are to be read."""

    names: tuple[str, ...]
    """Names of its columns, without blanks around them."""
    delimiter: str = ""
    """Character between the cells of a text; empty for other lists."""
    has_header: bool = False
    """Whether the first line of a text names the columns."""


def find_layout(path: Path, path_column: str | None) -> Layout:
    """Return the columns of a list, from its first line, schema, or keys.

    Args:
        path: the list.
        path_column: name of the column with the paths; None: it is found by its name.

    Raises:
        SourceError: the list is damaged, not UTF-8, or its columns are unclear.
    """
    match path.suffix.lower():
        case ".parquet":
            return Layout(names=_parquet_names(path))
        case ".jsonl" | ".ndjson":
            names = dict.fromkeys(name for row in _read_json(path) for name in row.cells)
            return Layout(names=tuple(names))
        case ".csv":
            return _find_csv_layout(path, path_column)
        case suffix:
            return _find_text_layout(path, path_column, quoted=suffix == ".tsv")


def read_rows(path: Path, layout: Layout) -> Iterator[ListRow]:
    """Yield the rows of a list, without empty lines.

    Raises:
        SourceError: the list is damaged or not UTF-8.
    """
    match path.suffix.lower():
        case ".parquet":
            yield from _read_parquet(path)
        case ".jsonl" | ".ndjson":
            yield from _read_json(path)
        case suffix:
            lines = _read_cells(path, layout.delimiter, quoted=suffix != ".txt")
            if layout.has_header:
                next(lines, None)
            for number, cells in lines:
                yield _name_cells(number, cells, layout.names)


def _name_cells(number: int, cells: list[str], names: tuple[str, ...]) -> ListRow:
    while len(cells) > len(names) and not cells[-1].strip():
        cells.pop()
    problem = ""
    if len(cells) > len(names):  # it is unclear which value belongs to which column
        columns = f"{len(names)} column{'s' * (len(names) > 1)}"
        problem = f"line {number} has {len(cells)} values for {columns}"
    # Missing cells at the end are empty.
    named = dict(zip(names, cells + [""] * (len(names) - len(cells)), strict=False))
    return ListRow(place=f"line {number}", cells=named, problem=problem)


def _find_csv_layout(path: Path, path_column: str | None) -> Layout:
    for delimiter in _DELIMITERS:
        names = _first_cells(path, delimiter, quoted=True)
        if (
            _names_columns(names, path_column)
            and find_column(names, "path", path_column, path) is not None
        ):
            return Layout(names=names, delimiter=delimiter, has_header=True)
    for delimiter in _DELIMITERS:
        cells = _first_cells(path, delimiter, quoted=True)
        is_path = cells and suffix_of(cells[0]) in IMAGE_SUFFIXES
        if is_path and len(cells) <= len(_WITHOUT_HEADER) and path_column is None:
            return Layout(names=_WITHOUT_HEADER[: len(cells)], delimiter=delimiter)
    raise _no_path_column(path, _first_cells(path, ",", quoted=True), path_column)


def _find_text_layout(path: Path, path_column: str | None, *, quoted: bool) -> Layout:
    first = _first_cells(path, "\t", quoted=quoted)
    is_header = _names_columns(first, path_column)
    if is_header and find_column(first, "path", path_column, path) is not None:
        return Layout(names=first, delimiter="\t", has_header=True)
    if path_column is not None or looks_like_header(first):
        raise _no_path_column(path, first, path_column)
    if len(first) > len(_WITHOUT_HEADER):
        raise SourceError(
            f"{path}, line 1 has {len(first)} values: without a first line that names the columns "
            "a list has a path and, after a tab, a label on each line."
        )
    with path.open("rb") as file:  # without any tab there is no column of labels
        count = 2 if any(b"\t" in line for line in file) else 1
    return Layout(names=_WITHOUT_HEADER[:count], delimiter="\t")


def _names_columns(cells: tuple[str, ...], path_column: str | None) -> bool:
    """Return whether a first line may name columns: that of an image is a row, whatever else."""
    return path_column is not None or all(suffix_of(cell) not in IMAGE_SUFFIXES for cell in cells)


def _no_path_column(path: Path, names: tuple[str, ...], asked: str | None) -> SourceError:
    found = f"has {', '.join(names)[:200]!r}" if names else "is empty"
    mistake = describe_mistake(names[0]) if names else ""
    wanted = f"no column {asked!r}" if asked else "no column `path`"
    return SourceError(
        f"{path} has {wanted}: its first line must name the columns, but {found}. Name the column "
        f"of the paths with --path-column, or add a first line such as path,label{mistake}."
    )


def _first_cells(path: Path, delimiter: str, *, quoted: bool) -> tuple[str, ...]:
    for _, cells in _read_cells(path, delimiter, quoted=quoted):
        return tuple(cell.strip() for cell in cells)
    return ()


def _read_cells(path: Path, delimiter: str, *, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of every line that is not empty."""
    with _open_text(path) as file:
        if quoted:
            yield from _read_quoted(path, file, delimiter)
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n").split(delimiter)


def _read_quoted(path: Path, file: IO[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    rows = csv.reader(file, delimiter=delimiter, skipinitialspace=delimiter != "\t", strict=True)
    while True:
        start = rows.line_num + 1
        try:
            cells = next(rows, None)
        except csv.Error as error:
            raise _damaged(path, f"line {start}", str(error)) from None
        if cells is None:
            return
        if rows.line_num > start:
            _refuse_swallowed_rows(path, start, cells, delimiter)
        if any(cell.strip() for cell in cells) or len(cells) > 1:
            yield start, cells


def _refuse_swallowed_rows(path: Path, start: int, cells: list[str], delimiter: str) -> None:
    """Refuse a cell of several lines, one of which is a row of the list itself."""
    for cell in cells:
        for line in cell.splitlines()[1:]:
            inner = (part.strip(' "') for part in line.split(delimiter))
            if any(suffix_of(part) in IMAGE_SUFFIXES for part in inner):
                raise _damaged(path, f"line {start}", f"it holds another row, {line[:80]!r}")


def _damaged(path: Path, place: str, reason: str) -> SourceError:
    kind = path.suffix.lstrip(".").upper()
    return SourceError(
        f"{path} is a damaged {kind}, {place}: {reason}. A value that begins with a quote must end "
        "with one; a quote inside is doubled."
    )


@contextmanager
def _open_text(path: Path) -> Iterator[IO[str]]:
    """Open a text; bytes of names that are not UTF-8 are kept by surrogate escapes."""
    with path.open("rb") as raw:
        head = raw.read(4)
    if head.startswith(_UTF16) or b"\0" in head:
        raise SourceError(f"{path} is UTF-16 or UTF-32: save it as UTF-8.")
    # Line ends are translated where nothing is quoted, and left to the reader where it is.
    newline = None if path.suffix.lower() == ".txt" else ""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
        yield file


def _read_json(path: Path) -> Iterator[ListRow]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            notes: set[str] = set()
            try:
                line.encode()
                values = decode_json(line, notes.add)
            except (ValueError, RecursionError) as error:
                reason = "not UTF-8" if isinstance(error, UnicodeEncodeError) else "not JSON"
                what = str(error)
                if isinstance(error, json.JSONDecodeError):  # it counts lines from this one
                    what = f"{error.msg}, character {error.pos + 1}"
                raise SourceError(f"{path}, line {number} is {reason} ({what}).") from None
            if not isinstance(values, dict):
                raise SourceError(f"{path}, line {number} is not a JSON object: {line[:80]!r}.")
            yield ListRow(place=f"line {number}", cells=values, notes=frozenset(notes))


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow  # noqa: PLC0415
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError:
        raise SourceError(
            f"{path} needs pyarrow, which is not installed: pip install 'simmim[parquet]'."
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(f"{path} is a damaged Parquet file ({error}).") from None


def _parquet_names(path: Path) -> tuple[str, ...]:
    with _open_parquet(path) as file:
        return tuple(file.schema_arrow.names)


def _read_parquet(path: Path) -> Iterator[ListRow]:
    number = 0
    with _open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=4096):
            for cells in batch.to_pylist():
                number += 1
                yield ListRow(place=f"row {number}", cells=cells)
