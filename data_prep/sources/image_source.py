"""Opening a source of images: a folder, a zip, a tar, a list of paths, or a folder of shards."""

import zipfile
from pathlib import Path

from data_prep.format.manifest import ManifestError, read_manifest
from data_prep.format.patterns import is_pattern
from data_prep.format.samples import has_labelled_samples
from data_prep.format.storage import Location, RemotePath
from data_prep.format.tars import is_tar, walk_tar
from data_prep.format.text import WarnOnce
from data_prep.sources.archives import ArchiveSource
from data_prep.sources.files import Selection, SourceError
from data_prep.sources.folders import FolderSource, RemoteFolderSource
from data_prep.sources.list_rows import LIST_SUFFIXES
from data_prep.sources.lists import ListSource
from data_prep.sources.shard_source import ShardSource
from data_prep.sources.unpacking import HEAD_BYTES, UnpackError, is_compressed

_KINDS = "a folder, a zip, a tar or a list of images"
ImageSource = FolderSource | RemoteFolderSource | ArchiveSource | ListSource | ShardSource


def open_source(
    path: Location,
    selection: Selection | None = None,
    *,
    shards: bool = False,
    ordered: bool = False,
    without: Path | None = None,
    scratch: Path | None = None,
) -> ImageSource:
    """Open a folder, a zip, a tar (also compressed), a list of paths, or a folder of shards.

    Remote archives are read by byte range; remote lists are downloaded while they are read.

    Args:
        path: path or URL.
        selection: root folder of a list's paths, and the column with the split.
        shards: whether `path` is a folder or pattern of WebDataset tars to read sample by sample.
        ordered: whether a folder must list its files in the same order every time.
        without: a folder that must not be inside a source folder, even through links.
        scratch: folder for archives that must be unpacked, shared by all processes; None: a
            temporary one.

    Raises:
        SourceError: `path` does not exist, it is not a supported source, or options of lists are
            given for another one.
        TarError: it is a damaged tar.
    """
    selection = selection or Selection()
    source = _open(path, selection, scratch, shards=shards, ordered=ordered, without=without)
    if not isinstance(source, ListSource):
        given = {
            "--root": selection.root,
            "--path-column": selection.path_column,
            "--label-column": selection.label_column,
        }
        unused = [option for option, value in given.items() if value is not None]
        if unused:
            source.close()
            raise SourceError(
                f"source {path} is not a list: {', '.join(unused)} would have no effect. Leave out "
                "what is for lists, or give a list."
            )
    return source


def _open(
    path: Location,
    selection: Selection,
    scratch: Path | None,
    *,
    shards: bool,
    ordered: bool,
    without: Path | None,
) -> ImageSource:
    if isinstance(path, RemotePath):
        return _open_remote(path, selection, scratch, shards=shards)
    if shards and (path.is_dir() or is_pattern(path)):
        return ShardSource(path, selection)
    if path.is_dir():
        _refuse_finished_set(path)
        return FolderSource(path, ordered=ordered, without=without)
    if not path.exists():
        if is_pattern(path):
            raise SourceError(
                f"source {path} is a pattern of tars, which `data-prep reshard` reads, sample by "
                f"sample, and `data-prep index`. Give `shard` {_KINDS}."
            )
        raise SourceError(f"source {path} does not exist. Give {_KINDS}.")
    if not path.is_file() or shards:
        what = "folder of shards" if shards else "file"
        raise SourceError(f"source {path} is not a {what}. Give {_KINDS}.")
    return _open_file(path, selection, scratch)


def _open_remote(
    path: RemotePath, selection: Selection, scratch: Path | None, *, shards: bool
) -> ImageSource:
    if shards:
        return ShardSource(path, selection)
    if not _is_named_as_file(path) and path.is_dir():
        _refuse_finished_set(path)
        return RemoteFolderSource(path)
    try:
        path.content_length()
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist. Give the URL of {_KINDS}.") from None
    return _open_file(path, selection, scratch)


def _open_file(path: Location, selection: Selection, scratch: Path | None) -> ImageSource:
    if path.name.lower().endswith(LIST_SUFFIXES):
        return ListSource(path, selection)
    if path.name.lower().endswith(".tar") and has_labelled_samples(path):
        notice = f"{path} is a WebDataset tar: labels are read from its cls members, as by reshard"
        return ShardSource(path, selection, notice=notice)
    _refuse_other_tables(path)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        if is_tar(path) or _is_compressed(head, path):
            warn = WarnOnce() if selection.allow_missing_end else None
            return ArchiveSource(path, is_zip=False, scratch=scratch, missing_end=warn)
        if zipfile.is_zipfile(file):
            return ArchiveSource(path, is_zip=True, scratch=scratch)
    if ".tar" in path.name.lower() or path.name.lower().endswith((".tgz", ".txz", ".tbz2")):
        list(walk_tar(path))  # raises an error that says whether it is compressed or damaged
    if not head:
        raise SourceError(f"source {path} is empty: it has 0 bytes. Fetch or write it again.")
    if head.startswith(b"PK\x03\x04") or path.name.lower().endswith(".zip"):
        raise SourceError(
            f"source {path} is a cut or damaged zip: the table of its members, at its end, is "
            "missing. Fetch it again."
        )
    suffixes = ", ".join(LIST_SUFFIXES)
    raise SourceError(
        f"source {path} is not a folder, a zip or a tar of images, nor a list ({suffixes}). "
        f"Give {_KINDS}."
    )


def _refuse_finished_set(folder: Location) -> None:
    """Refuse a folder that data-prep has written: its indexes (.npy) would be taken for images."""
    try:
        read_manifest(folder, allow_pipe=True)
    except ManifestError:
        return  # none, or a file of another program that is called so
    raise SourceError(
        f"source {folder} is a finished set of shards already: train on it with data.shards. To "
        f"write its samples anew: `data-prep reshard {folder} DST`."
    )


def _refuse_other_tables(path: Location) -> None:
    """Refuse lists in forms that are not read, with their remedy."""
    stem, _, suffix = path.name.lower().rpartition(".")
    if stem.endswith(LIST_SUFFIXES) and suffix in ("gz", "bz2", "xz", "zst"):
        raise SourceError(f"source {path} is a compressed list. Decompress it first.")
    if suffix in ("xls", "xlsx", "ods"):
        raise SourceError(f"source {path} is a spreadsheet. Save it as CSV (UTF-8).")


def _is_compressed(head: bytes, path: Location) -> bool:
    try:
        return is_compressed(head)
    except UnpackError as error:
        raise SourceError(f"source {path} cannot be used: {error}.") from None


def _is_named_as_file(path: Location) -> bool:
    name = path.name.lower()
    return ".tar" in name or name.endswith((".tgz", ".txz", ".tbz2", ".zip", *LIST_SUFFIXES))
