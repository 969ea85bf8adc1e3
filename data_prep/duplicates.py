"""Files with the same bytes found among any number of files, in bounded memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from data_prep.external_sort import ExternalSort
from data_prep.files import Selection, SourceFile, UnreadableFileError
from data_prep.listing import Listed, decode_file, encode_file
from data_prep.plan import path_key
from data_prep.sources import open_source
from data_prep.workers import Tick, map_tasks

_FILES_AT_ONCE = 2_000


@dataclass(frozen=True, kw_only=True)
class _DigestTask:
    source: Path
    selection: Selection
    shards: bool
    files: tuple[tuple[SourceFile, int], ...]


def duplicate_dropper(
    source: Path, selection: Selection, folder: Path, *, shards: bool, workers: int
) -> Callable[[Listed], Listed]:
    """Return a function that names duplicates: of equal files the smallest path is kept.

    Args:
        source: what the files are read from.
        selection: how the source is opened.
        folder: where digests are sorted.
        shards: whether the source is a folder of shards.
        workers: processes that read.
    """

    def drop(files: Listed) -> Listed:
        sorter = ExternalSort(folder, "digests")
        tasks = (
            _DigestTask(source=source, selection=selection, shards=shards, files=files)
            for files in _in_groups(files)
        )
        try:
            for rows in map_tasks(_digest_files, tasks, workers=workers, tick=lambda _: None):
                for key, line in rows:
                    sorter.add(key, line)
            yield from _name_duplicates(sorter)
        finally:
            sorter.discard()

    return drop


def _in_groups(files: Listed) -> Iterator[tuple[tuple[SourceFile, int], ...]]:
    group: list[tuple[SourceFile, int]] = []
    for file in files:
        group.append(file)
        if len(group) == _FILES_AT_ONCE:
            yield tuple(group)
            group = []
    if group:
        yield tuple(group)


def _digest_files(task: _DigestTask, tick: Tick) -> list[tuple[str, str]]:
    rows = []
    with closing(open_source(task.source, task.selection, shards=task.shards)) as source:
        for file, window in task.files:
            digest = "-"  # what cannot be read is no duplicate
            if not file.problem:
                try:
                    data = source.read(file)
                    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
                except UnreadableFileError:
                    pass
            line = json.dumps([window, encode_file(file)])
            rows.append((f"{digest}.{path_key(file.path)}", line))
            tick(1)
    return rows


def _name_duplicates(sorter: ExternalSort) -> Listed:
    kept, kept_digest = "", ""
    for key, line in sorter.merged():
        digest = key.partition(".")[0]
        window, text = json.loads(line)
        file = decode_file(text)
        if digest == "-":
            yield file, window
        elif digest == kept_digest:
            yield file._replace(problem=f"a duplicate of {kept}"), window
        else:
            kept, kept_digest = file.path, digest
            yield file, window
