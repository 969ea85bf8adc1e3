"""Shards brought to a store in their order, as they finish, a few at a time.

A shard's number in the set is known once all before it are finished, since those that came out
empty do not count. Workers are kept from running ahead, so that a bounded number waits on disk.
"""

import threading
from collections.abc import Callable, Container
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

from data_prep.format.manifest import ShardEntry
from data_prep.format.storage import StorageError
from data_prep.write.shard import ShardReport, ShardTask, read_report, shard_exists
from data_prep.write.upload import Upload

Uploaded = Callable[[int, int], object]
"""Called with the shards uploaded by this run so far, and the bytes that went out."""

_AHEAD = 2
"""Shards that each worker may be ahead of the first unfinished one."""
_MAX_AT_ONCE = 4
"""Most uploads at once: libraries of stores hold a shard each in memory."""
_POLL_SECONDS = 0.2


class UploadQueue:
    """Ships shards; use it as a context, which ends when what is under way is there.

    At most 3 shards for each worker are on disk: 2 that are being written or wait for one before
    them, and 1 that is being uploaded. Workers are held back where the store is slower than they.

    Args:
        upload: where to.
        partial: folder that shards are written into.
        done: numbers of the planned shards that were finished before; one that proves wrong may be
            taken out until the first task begins.
        workers: shards that are written at once.
        uploaded: told how far it is.
    """

    def __init__(
        self,
        upload: Upload,
        partial: Path,
        done: Container[int],
        *,
        workers: int,
        uploaded: Uploaded,
    ) -> None:
        self._upload, self._partial, self._done = upload, partial, done
        self._ahead, self._at_once = _AHEAD * workers, min(workers, _MAX_AT_ONCE)
        self._uploaded = uploaded
        self._pool = ThreadPoolExecutor(self._at_once, thread_name_prefix="upload")
        self._under_way: set[Future[None]] = set()
        self._finished: dict[int, ShardEntry | None] = {}  # those that wait for one before them
        self._next = 0  # number, among the planned, of the first shard that is not finished
        self._position = 0  # its position among those that are not empty
        self._shards = self._bytes = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "UploadQueue":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def may_start(self, task: ShardTask) -> bool:
        """Tell whether a shard may be written already."""
        self._advance()
        return task.plan.number < self._next + self._ahead

    def add(self, report: ShardReport) -> None:
        """Take a shard that was written, and wait until as many as may be are under way at most.

        Raises:
            StorageError: the store does not answer, or belongs to another run by now.
        """
        self._finished[report.number] = report.entry
        self._advance()

    def finish(self) -> None:
        """Wait until all shards are there.

        Raises:
            StorageError: the store does not answer, or belongs to another run by now.
        """
        self._advance()
        self._wait(0)

    def _advance(self) -> None:
        while (is_new := self._next in self._finished) or self._next in self._done:
            if is_new:
                entry = self._finished.pop(self._next)
            else:
                report = read_report(self._partial, self._next)
                assert report is not None, self._next
                entry = report.entry
            if entry is not None:
                self._enqueue(entry, waits=is_new or shard_exists(self._partial, entry))
                self._position += 1
            self._next += 1

    def _enqueue(self, entry: ShardEntry, *, waits: bool) -> None:
        if waits:
            self._upload.claim()
            self._wait(self._at_once - 1)
            put = self._pool.submit(self._upload.put, entry, self._position, self._count)
            self._under_way.add(put)
        elif not self._upload.has_shard(entry, self._position):
            raise StorageError(
                f"{self._upload.place} has {entry.name} under a number that it no longer has, "
                "since another one came out empty. Run the same command again, which writes anew "
                "what comes after it."
            )

    def _count(self, sent: int) -> None:
        with self._lock:
            self._bytes += sent

    def _wait(self, most: int) -> None:
        """Wait until at most so many are under way."""
        while True:
            for put in [put for put in self._under_way if put.done()]:
                self._under_way.remove(put)
                put.result()
                self._shards += 1
            self._uploaded(self._shards, self._bytes)
            if len(self._under_way) <= most:
                return
            wait(self._under_way, _POLL_SECONDS, FIRST_COMPLETED)
