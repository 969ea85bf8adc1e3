"""Runs that write to a store, and their sudden deaths, for the tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.format import storage
from data_prep.format.storage import RemotePath
from data_prep.write import upload
from data_prep.write.build import BuildResult, build_shards
from data_prep.write.options import ShardOptions
from data_prep.write.progress import Progress

EACH = ShardOptions(samples_per_shard=1, shuffle=False)  # streams
SHUFFLED = ShardOptions(samples_per_shard=3)  # lists all before


def held(place: Path | RemotePath) -> dict[str, bytes]:
    """Return what is at a place: name → bytes."""
    if not place.exists():
        return {}
    return {path.name: path.read_bytes() for path in place.glob("*") if path.name != ".partial"}


def local(source: Path, folder: Path, options: ShardOptions) -> dict[str, bytes]:
    """Return what a run that stays on this machine writes."""
    build_shards(source, folder, options)
    return held(folder)


def ship(
    source: Path, store: RemotePath, staging: Path, options: ShardOptions, **rest: Any
) -> BuildResult:
    """Write shards to the store."""
    return build_shards(source, staging, options, store=store, **rest)


def tars(folder: Path) -> int:
    """Count the shards on disk, half written ones too."""
    return sum(".tar" in path.name for path in folder.rglob("*"))


class Killed(BaseException):
    """The process was killed."""


class Death:
    """Ends all work at the n-th change of the store or of the log, just before or after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.after, self.is_dead = 10**9, False, False
        self.sent: list[str] = []
        whole_system, whole_add = storage.file_system, upload._Log.add

        def add(log: upload._Log, name: str, digest: str) -> None:
            self.change(whole_add, log, name, digest)

        monkeypatch.setattr(upload._Log, "add", add)
        monkeypatch.setattr(storage, "file_system", lambda url: Mortal(whole_system(url), self))

    def change(self, action: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Do it, unless dead before."""
        self.left -= 1
        self.is_dead = self.is_dead or (self.left <= 0 and not self.after)
        if self.is_dead:
            raise Killed
        result = action(*arguments, **options)
        self.is_dead = self.left <= 0
        if self.is_dead:
            raise Killed
        return result

    def begin(self, left: int, *, after: bool) -> None:
        """Live until then."""
        self.left, self.after, self.is_dead, self.sent = left, after, False, []


class Mortal:
    """A file system that nothing changes any more after a death."""

    def __init__(self, system: Any, death: Death) -> None:
        self._system, self._death = system, death

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._system, name)
        if name not in ("put_file", "pipe_file", "rm_file", "rm"):
            return method

        def call(*arguments: Any, **options: Any) -> Any:
            if name == "put_file":
                self._death.sent.append(arguments[1].rsplit("/", 1)[-1])
            return self._death.change(method, *arguments, **options)

        return call


def stop_after(shards: int) -> Progress:
    """Return a progress that stops the run when so many shards are written."""
    finished: list[int] = []

    def note(report: Any) -> None:
        finished.append(report.number)
        if len(finished) == shards:
            raise KeyboardInterrupt

    return Progress(finished=note)
