"""Where images come from: a folder, an archive, a list or shards, listed and read by position."""

import zipfile
from pathlib import Path

from data_prep.format.storage import Location, RemotePath
from data_prep.format.tars import is_tar, walk_tar
from data_prep.sources.archives import TarSource, ZipSource
from data_prep.sources.files import Selection, SourceError
from data_prep.sources.folders import FolderSource, RemoteFolderSource
from data_prep.sources.lists import LIST_SUFFIXES, ListSource
from data_prep.sources.shards import ShardSource

_KINDS = "a folder, a zip, a tar or a list of images"
Source = FolderSource | RemoteFolderSource | ZipSource | TarSource | ListSource | ShardSource


def open_source(
    path: Location,
    selection: Selection | None = None,
    *,
    shards: bool = False,
    ordered: bool = False,
    without: Path | None = None,
) -> Source:
    """Open a folder, a zip, an uncompressed tar, a list of paths, or a folder of shards.

    Archives in a store are read by range, lists are copied for the time they are read.

    Args:
        path: what to open.
        selection: where a list's paths begin, and the column that names a split.
        shards: whether `path` is a folder of WebDataset tars to be read sample by sample.
        ordered: whether a folder must list its files in the same order every time.
        without: a folder that must not lie in a folder of files, however it is linked.

    Raises:
        SourceError: there is nothing at `path`, or it is of another kind.
        TarError: it is a compressed tar.
    """
    selection = selection or Selection()
    if isinstance(path, RemotePath):
        return _open_remote(path, selection, shards=shards)
    if path.is_dir():
        if shards:
            return ShardSource(path, selection)
        return FolderSource(path, ordered=ordered, without=without)
    if not path.exists():
        raise SourceError(f"source {path} does not exist. Give {_KINDS}.")
    if not path.is_file() or shards:
        what = "folder of shards" if shards else "file"
        raise SourceError(f"source {path} is not a {what}. Give {_KINDS}.")
    return _open_file(path, selection)


def _open_remote(path: RemotePath, selection: Selection, *, shards: bool) -> Source:
    if shards:
        return ShardSource(path, selection)
    if not _is_named_as_file(path) and path.is_dir():
        return RemoteFolderSource(path)
    if not path.exists():
        raise SourceError(f"there is nothing at {path}. Give the URL of {_KINDS}.")
    return _open_file(path, selection)


def _open_file(path: Location, selection: Selection) -> Source:
    if path.name.lower().endswith(LIST_SUFFIXES):
        return ListSource(path, selection)
    if is_tar(path):
        return TarSource(path)
    with path.open("rb") as file:
        if zipfile.is_zipfile(file):
            return ZipSource(path)
    if ".tar" in path.name.lower() or path.name.lower().endswith((".tgz", ".txz", ".tbz2")):
        list(walk_tar(path))  # raises, and says whether it is compressed or damaged
    suffixes = ", ".join(LIST_SUFFIXES)
    raise SourceError(
        f"source {path} is neither a folder, a zip nor a tar of images, nor a list ({suffixes})."
    )


def _is_named_as_file(path: Location) -> bool:
    name = path.name.lower()
    return ".tar" in name or name.endswith((".tgz", ".txz", ".tbz2", ".zip", *LIST_SUFFIXES))
