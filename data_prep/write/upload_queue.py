"""Queue that uploads finished shards in order, a few at a time.

The final number of a shard is known once all earlier ones are finished, since empty ones do not
count. Workers are kept from running ahead, so that a bounded number of shards waits on disk.
"""

import threading
from collections.abc import Callable, Container
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

from data_prep.format.manifest import ShardEntry
from data_prep.format.stores import StorageError
from data_prep.write.shard import ShardReport, ShardTask, read_report, shard_exists
from data_prep.write.upload import Upload

Uploaded = Callable[[int, int], object]
"""Called with the number of shards uploaded by this run so far, and the bytes sent."""

_AHEAD = 2
"""Number of shards per worker that may be started from the first unfinished one on."""
_MAX_UPLOADS = 4
"""Maximum number of parallel uploads: store libraries hold a shard each in memory."""
_POLL_SECONDS = 0.2


class UploadQueue:
    """Uploads finished shards; a context manager that waits for running uploads on exit.

    At most 3 shards per worker are on disk: 2 that are being written or wait for an earlier one,
    and 1 that is being uploaded. Workers wait if the store is slower than they are.

    Args:
        upload: the upload of the set.
        partial: folder that shards are written into.
        done: numbers of planned shards that were finished before; wrong ones may be removed until
            the first task starts.
        workers: number of shards written in parallel.
        uploaded: progress callback.
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
        self._ahead, self._max_uploads = _AHEAD * workers, min(workers, _MAX_UPLOADS)
        self._uploaded = uploaded
        self._pool = ThreadPoolExecutor(self._max_uploads, thread_name_prefix="upload")
        self._running: set[Future[None]] = set()
        self._finished: dict[int, ShardEntry | None] = {}  # waiting for an earlier shard
        self._next = 0  # number, among the planned, of the first unfinished shard
        self._position = 0  # its position among the non-empty shards
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
        """Return whether a shard may be written already."""
        self._advance()
        return task.plan.number < self._next + self._ahead

    def add(self, report: ShardReport) -> None:
        """Add a written shard; wait while too many uploads are running.

        Raises:
            StorageError: the store does not answer, or the URL now belongs to another run.
        """
        self._finished[report.number] = report.entry
        self._advance()

    def finish(self) -> None:
        """Wait until all shards are uploaded.

        Raises:
            StorageError: the store does not answer, or the URL now belongs to another run.
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
            self._wait(self._max_uploads - 1)
            upload = self._upload.upload_shard
            self._running.add(self._pool.submit(upload, entry, self._position, self._count))
        elif not self._upload.has_shard(entry, self._position):
            raise StorageError(
                f"{self._upload.place} has {entry.name} under an outdated number, since another "
                "shard turned out empty. Run the same command again, which writes the following "
                "shards again."
            )

    def _count(self, sent: int) -> None:
        with self._lock:
            self._bytes += sent

    def _wait(self, most: int) -> None:
        """Wait until at most `most` uploads are running."""
        while True:
            for done in [future for future in self._running if future.done()]:
                self._running.remove(done)
                done.result()
                self._shards += 1
            self._uploaded(self._shards, self._bytes)
            if len(self._running) <= most:
                return
            wait(self._running, _POLL_SECONDS, FIRST_COMPLETED)
