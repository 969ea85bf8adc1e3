"""Where images come from: a folder, an archive, a list or shards, listed and read by position."""

from __future__ import annotations

import zipfile

from data_prep.archives import TarSource, ZipSource
from data_prep.files import Selection, SourceError
from data_prep.folders import FolderSource
from data_prep.lists import LIST_SUFFIXES, ListSource
from data_prep.remote_folder import RemoteFolderSource
from data_prep.shard_source import ShardSource
from data_prep.storage import Location, RemotePath
from data_prep.tars import is_tar, walk_tar

_KINDS = "a folder, a zip, a tar or a list of images"
Source = FolderSource | RemoteFolderSource | ZipSource | TarSource | ListSource | ShardSource


def open_source(
    path: Location,
    selection: Selection | None = None,
    *,
    shards: bool = False,
    ordered: bool = False,
) -> Source:
    """Open a folder, a zip, an uncompressed tar, a list of paths, or a folder of shards.

    Of a store it may be a folder alone, or what a list names.

    Args:
        path: what to open.
        selection: where a list's paths begin, and the column that names a split.
        shards: whether `path` is a folder of WebDataset tars to be read sample by sample.
        ordered: whether a folder must list its files in the same order every time.

    Raises:
        SourceError: there is nothing at `path`, or it is of another kind.
        TarError: it is a compressed tar.
    """
    selection = selection or Selection()
    if isinstance(path, RemotePath):
        return _open_remote(path, shards=shards)
    if path.is_dir():
        return ShardSource(path, selection) if shards else FolderSource(path, ordered=ordered)
    if not path.exists():
        raise SourceError(f"source {path} does not exist. Give {_KINDS}.")
    if not path.is_file() or shards:
        what = "folder of shards" if shards else "file"
        raise SourceError(f"source {path} is not a {what}. Give {_KINDS}.")
    if path.suffix.lower() in LIST_SUFFIXES:
        return ListSource(path, selection)
    if is_tar(path):
        return TarSource(path)
    if zipfile.is_zipfile(path):
        return ZipSource(path)
    if ".tar" in path.name.lower() or path.suffix.lower() in (".tgz", ".txz", ".tbz2"):
        list(walk_tar(path))  # raises, and says whether it is compressed or damaged
    suffixes = ", ".join(LIST_SUFFIXES)
    raise SourceError(
        f"source {path} is neither a folder, a zip nor a tar of images, nor a list ({suffixes})."
    )


def _open_remote(path: RemotePath, *, shards: bool) -> RemoteFolderSource:
    if shards or not path.is_dir():
        what = "shards are" if shards else "no folder is"
        raise SourceError(
            f"{what} at {path}: of a store a folder of images is read, or a list on this machine "
            f"whose --root is a URL. Fetch anything else first, and give its path."
        )
    return RemoteFolderSource(path)
