"""Shards that lie elsewhere, lent as files of this machine to what reads all or much of them."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data_prep.format.manifest import Location, PipedFile, RemotePath
from data_prep.format.tars import TarError


@contextmanager
def on_this_machine(place: Location | PipedFile) -> Iterator[Path]:
    """Lend a file; one from elsewhere is fetched whole, once, into the folder of temporary files.

    Raises:
        StorageError: it cannot be fetched.
        TarError: what the caller found wrong, with the place of the file for that of its copy.
    """
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="data-prep-") as folder:
        copy = Path(folder, place.name)
        with copy.open("wb") as file:
            file.writelines(place.blocks())
        try:
            yield copy
        except TarError as error:
            raise TarError(str(error).replace(str(copy), str(place))) from None


@contextmanager
def open_for_parts(place: Location | PipedFile) -> Iterator[BinaryIO]:
    """Open a file to read parts of it, by range where it lies elsewhere; else it is fetched."""
    if isinstance(place, RemotePath) and place.gives_ranges():
        with place.open("rb") as file:
            yield file
    else:
        with on_this_machine(place) as path, path.open("rb") as file:
            yield file
