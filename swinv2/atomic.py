"""Atomic writes of folders.

A folder is filled under a hidden name next to its destination, synced to disk, and renamed into
place, so that readers never see, and crashes never leave, a partial result.
"""

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class OccupiedError(ValueError):
    """The destination holds something that must not be replaced."""


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str], *, may_replace: Callable[[Path], bool] = lambda _: False
) -> Iterator[Path]:
    """Yield an empty folder to fill, which is renamed to `path` when the block ends.

    If the block raises, the folder is removed and `path` stays as it was. An empty folder at `path`
    is always replaced, a filled one only if `may_replace(path)` is true. Files in it get the
    permissions of the umask. What a killed process has left is removed by the next call: a folder
    `.NAME.partial-PID`, or, between the two renames of a replacement, the earlier folder as
    `.NAME.replaced-PID`, which returns to `path` if nothing is there.

    Raises:
        OccupiedError: `path` is a file, or a filled folder that must not be replaced.
    """
    destination = _resolved(path)
    _clean_up(destination)
    _check_replaceable(destination, may_replace)
    made = _make_parents(destination.parent)
    partial = _sibling(destination, "partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        yield partial
        _apply_umask(partial)
        _fsync_tree(partial)
        _check_replaceable(destination, may_replace)
        _swap(partial, destination, may_replace)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(made)
        raise


def _swap(partial: Path, destination: Path, may_replace: Callable[[Path], bool]) -> None:
    if not destination.exists():
        partial.rename(destination)  # fails if something has appeared there meanwhile
        _fsync(destination.parent)
        return
    replaced = _sibling(destination, "replaced")
    destination.rename(replaced)
    try:
        # What was moved away is checked, since the destination may change until that moment.
        _check_replaceable(replaced, may_replace, name=destination)
        partial.rename(destination)
    except BaseException:
        replaced.rename(destination)
        raise
    _fsync(destination.parent)
    shutil.rmtree(replaced)


def _check_replaceable(
    found: Path, may_replace: Callable[[Path], bool], *, name: Path | None = None
) -> None:
    """Check that what is found may be replaced; messages call it `name`."""
    name = name or found
    if not found.exists():
        return
    if not found.is_dir():
        raise OccupiedError(
            f"{name} is a file, not a folder: choose another destination, or move the file away."
        )
    if any(found.iterdir()) and not may_replace(found):
        raise OccupiedError(
            f"{name} holds other files and is not replaced: "
            "choose an empty or new destination, or remove that folder first."
        )


def _make_parents(folder: Path) -> list[Path]:
    """Create `folder` and its ancestors; return those that did not exist, the deepest first."""
    absent = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OccupiedError(
            f"{folder} cannot be created, since a part of that path is a file: choose another "
            "destination."
        ) from error
    return absent


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # another writer may have written something there
        for folder in folders:
            folder.rmdir()


def _resolved(path: str | os.PathLike[str]) -> Path:
    # Replace the target of a symbolic link, not the link itself.
    return Path(os.path.realpath(path))


def _sibling(destination: Path, role: str) -> Path:
    return destination.with_name(f".{destination.name}.{role}-{os.getpid()}")


def _clean_up(destination: Path) -> None:
    """Remove or restore what processes that are gone have left next to the destination."""
    if not destination.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(destination.name)}\.(partial|replaced)-(\d{{1,9}})")
    for path in list(destination.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or _is_running(int(match[2])):
            continue
        if match[1] == "replaced" and not destination.exists():
            path.rename(destination)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    """Return whether another process has this number.

    What this one finds under its own number is older: in containers, numbers are the same again.
    """
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _apply_umask(folder: Path) -> None:
    """Give all files the permissions that new files have; some libraries write private ones."""
    probe = folder / ".permissions"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    wanted = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    probe.unlink()
    for place, _, names in os.walk(folder):
        for name in names:
            mode = stat.S_IMODE(Path(place, name).stat().st_mode)
            if mode | wanted != mode:
                Path(place, name).chmod(mode | wanted)


def _fsync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            _fsync(Path(place, name))
        _fsync(Path(place))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
