"""Lists of paths as sources: text, CSV or Parquet files, read a few rows at a time."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.format.storage import Location, RemotePath, StorageError, locate
from data_prep.format.tars import as_local_file, describe_path_problem
from data_prep.sources.files import Selection, SourceError, SourceFile
from data_prep.sources.folders import FolderSource, RemoteFolderSource

LIST_SUFFIXES = (".txt", ".tsv", ".csv", ".parquet")
"""File name suffixes of lists."""


class ListSource:
    """A list of paths in a folder, optionally with labels, splits and other fields.

    A text list has one path per line, optionally followed by a tab and a label. CSV and Parquet
    have a column `path`, optionally `label` and a split; other columns become JSON fields.
    """

    is_explicit = True
    classes: tuple[str, ...] | None = None

    def __init__(self, path: Location, selection: Selection) -> None:
        self.path = path
        self.skipped: Counter[str] = Counter()
        self._split_column = selection.split_column
        root = locate(selection.root) if selection.root else path.parent
        self._folder = (
            RemoteFolderSource(root) if isinstance(root, RemotePath) else FolderSource(root)
        )

    def files(self) -> Iterator[SourceFile]:
        """Yield every file in the list, in its order.

        Raises:
            SourceError: the list is damaged, is not UTF-8 or has no column `path`.
        """
        for file in self.unmeasured_files():
            yield self._measure(file)

    def unmeasured_files(self) -> Iterator[SourceFile]:
        """Yield every file in the list without size and stamp; the files are not accessed.

        Raises:
            SourceError: the list is damaged, is not UTF-8 or has no column `path`.
        """
        with as_local_file(self.path) as path:
            match path.suffix.lower():
                case ".csv":
                    rows = _read_csv(path)
                case ".parquet":
                    rows = _read_parquet(path)
                case _:
                    rows = _read_text(path)
            for row in rows:
                yield self._describe(row)

    def read(self, file: SourceFile) -> bytes:
        """Return the bytes of a file.

        Raises:
            UnreadableFileError: it is missing or may not be read.
        """
        return self._folder.read(file)

    def close(self) -> None:
        """Nothing is held open."""

    def _describe(self, row: Mapping[str, Any]) -> SourceFile:
        rest = dict(row)
        path, label = _text(rest.pop("path")), rest.pop("label", None)
        split = rest.get(self._split_column)
        file = SourceFile(
            path=path,
            size=0,
            stamp=0,
            label=None if label is None or label == "" else _text(label),
            split="" if split is None else _text(split),
            fields=_describe_fields(rest),
        )
        problem = describe_path_problem(path) if path else "its row has no path"
        return file._replace(problem=problem) if problem else file

    def _measure(self, file: SourceFile) -> SourceFile:
        if file.problem:
            return file
        try:
            size, stamp = self._folder.size_and_stamp(file.path)
        except StorageError:
            raise
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "its name is impossible"
            return file._replace(problem=f"it cannot be read: {reason or 'it is not there'}")
        return file._replace(size=size, stamp=stamp)


def _text(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _describe_fields(fields: Mapping[str, Any]) -> str:
    given = {name: value for name, value in fields.items() if value is not None and name}
    return json.dumps(given, default=str) if given else ""


def _read_text(path: Path) -> Iterator[dict[str, Any]]:
    # Surrogate escapes keep names that are not UTF-8.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for line in file:
            name, _, label = line.rstrip("\r\n").partition("\t")
            if name.strip():
                yield {"path": name, "label": label.strip()}


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, restkey="", restval="")
        try:
            if "path" not in (rows.fieldnames or ()):
                raise SourceError(
                    f"{path} has no column `path`: its first line must name the columns, but is "
                    f"{','.join(rows.fieldnames or ())[:100]!r}."
                )
            for row in rows:
                if "" in row:
                    row["path"] = ""  # more values than columns, so it is unclear which is which
                yield row
        except csv.Error as error:
            raise SourceError(f"{path} is a damaged CSV, line {rows.line_num}: {error}.") from None


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow  # noqa: PLC0415
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError:
        raise SourceError(
            f"{path} needs pyarrow, which is not installed: pip install 'simmim[parquet]'."
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "path" not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise SourceError(f"{path} has no column `path`, only {names}.")
            for batch in file.iter_batches(batch_size=4096):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(f"{path} is a damaged Parquet file ({error}).") from None
