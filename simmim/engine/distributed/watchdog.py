"""Watchdog over ranks: a rank that hangs or is lost is named, and the job ends.

A collective operation waits for every rank. A rank that is stopped, hangs or has ended would make
the others wait until the process group's timeout, or forever, and the error would not name it. Here
each rank posts its status to the store, and a thread in each rank reads the status of all.

torch's `monitored_barrier` names late ranks for gloo only, and only where all call it; its own
watchdog ends a collective after the timeout, without a word on who was missing.
"""

import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from types import TracebackType

import torch.distributed
from torch.distributed.distributed_c10d import PrefixStore

from simmim.compat import default_store
from simmim.data.loader.lost_workers import lost_worker
from simmim.engine.exit_codes import LOST, RankLostError

LONGEST_JOIN = 5.0
"""Longest wait for a thread of the watchdog to end, in seconds."""

LONGEST_SILENCE = 45.0
"""Seconds without a heartbeat after which a rank is lost. A thread sends them, so a rank that
computes, compiles, waits or writes goes on; one that was killed, or whose node is gone, is noticed
within a minute, although NCCL lets the others wait for it."""

LONGEST_INTERVAL = 2.0
"""Longest time between two heartbeats of a rank, in seconds."""

FAULT_GRACE = 60.0
"""Seconds that the other ranks have to notice the failure of one themselves."""

INTERVALS_TO_IDENTIFY = 10
"""Intervals that a rank which lost a connection waits, at most, to learn which rank is lost."""

WAITING_FOR_DATA = "waiting for data"
"""Activity in which data workers or a file system may hang."""

STORE_HOST = "rank 0, or the launcher that hosts the store,"

_COMMUNICATION_ERRORS = ("gloo", "nccl", "connection", "socket", "store", "broken pipe")
_numbers = itertools.count()  # every training in this process has its own keys in the store


def group_timeout(rank_timeout: float) -> timedelta:
    """Return the timeout of process groups: longer than the watchdog's, whose error says more."""
    return timedelta(seconds=1.25 * rank_timeout + 30)


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """Status that a rank posts to the others."""

    rank: int
    host: str
    process: int
    beat: int = 0
    """Number of heartbeats."""
    moves: int = 0
    """Number of activities begun; all ranks begin the same ones in the same order."""
    step: int = 0
    activity: str = "starting"
    fault: str = ""
    """Error with which the rank failed."""
    finished: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"

    @property
    def place(self) -> str:
        """Activity and step."""
        return f"{self.activity}, step {self.step}"


@dataclass
class ObservedRank:
    """Last known status of a rank, and for how many seconds it has not changed."""

    status: RankStatus
    silent: float = 0.0
    """Seconds without a heartbeat."""
    stuck: float = 0.0
    """Seconds in the same activity."""
    failed: float = 0.0
    """Seconds since its fault was read."""


@dataclass
class RankTable:
    """Status of all ranks as one rank knows it, timed by its own clock."""

    timeout: float
    """Longest time without progress, in seconds."""
    silence: float = LONGEST_SILENCE
    """Longest time without a heartbeat, in seconds."""
    ranks: dict[int, ObservedRank] = field(default_factory=dict)

    def update(self, status: RankStatus, passed: float) -> None:
        """Record the status of a rank, `passed` seconds after the previous one."""
        known = self.ranks.get(status.rank)
        if known is None:
            self.ranks[status.rank] = ObservedRank(status)
            return
        before, known.status = known.status, status
        known.silent = 0.0 if status.beat != before.beat else known.silent + passed
        known.stuck = 0.0 if status.moves != before.moves else known.stuck + passed
        known.failed = known.failed + passed if status.fault else 0.0

    def verdict(self) -> str | None:
        """Return a description of the failure and the ranks that caused it; None if all is well."""
        working = [known for known in self.ranks.values() if not known.status.finished]
        for known in working:
            if known.status.fault and known.failed >= FAULT_GRACE:
                return f"{known.status} failed: {known.status.fault}"
        working = [known for known in working if not known.status.fault]
        silent = [known for known in working if known.silent > self.silence]
        if silent:
            return self._listed(silent, "sent no heartbeat for {:.0f} s, last seen {}", "silent")
        if not any(known.stuck > self.timeout for known in working):
            return None
        behind = min(known.status.moves for known in working)
        lagging = [known for known in working if known.status.moves == behind]
        text = self._listed(lagging, "made no progress for {:.0f} s: {}", "stuck")
        others = [known for known in working if known.status.moves > behind]
        if others:
            return f"{text}. The other ranks wait for it: {others[0].status.place}"
        return f"{text}. All ranks are stuck here; stack trace below"

    def _listed(self, ranks: list[ObservedRank], text: str, age: str) -> str:
        shown = [
            f"{known.status} {text.format(getattr(known, age), known.status.place)}"
            for known in ranks[:8]
        ]
        more = [f"{len(ranks) - 8} more"] if len(ranks) > 8 else []
        return "; ".join(shown + more)


class Watchdog:
    """Context that ends this process if a rank makes no progress.

    All ranks must enter it together. A single process is watched only while it waits for data.

    Args:
        timeout: longest time without progress, in seconds.
        silence: longest time without a heartbeat, in seconds; no longer than `timeout`.
        end: ends this process with an exit code, whatever its main thread is waiting for.
    """

    def __init__(
        self,
        timeout: float,
        *,
        silence: float = LONGEST_SILENCE,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self.timeout = timeout
        self.silence = min(silence, timeout)
        self.interval = min(LONGEST_INTERVAL, self.silence / 10)
        self._end = end
        self._table = RankTable(timeout, self.silence)
        self._beat = 0
        self._answered = 0.0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._world = 1
        if torch.distributed.is_initialized():
            self._world = torch.distributed.get_world_size()
        rank = torch.distributed.get_rank() if self._world > 1 else 0
        self._own = RankStatus(rank=rank, host=socket.gethostname(), process=os.getpid())

    def __enter__(self) -> "Watchdog":
        if self._world == 1:
            self._start(self._judge_alone)
            return self
        # Separate connections: the main thread may wait on its own for a long time.
        store = default_store()
        prefix = f"watchdog/{next(_numbers)}"
        self._posting, self._reading = (PrefixStore(prefix, store.clone()) for _ in range(2))
        self._posting.set_timeout(timedelta(seconds=self.timeout))
        self._reading.set_timeout(timedelta(seconds=self.timeout))
        self._post()
        torch.distributed.barrier()
        for work in (self._heartbeat, self._listen, self._judge):
            self._start(work)
        return self

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=f"watchdog {work.__name__}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Post how this rank ended.

        Raises:
            RankLostError: it ended because another rank did.
        """
        lost = None
        if self._world > 1:
            lost = self._lost_ranks(error) if error is not None else None
            if error is None:
                self._post_end(finished=True)
            else:
                self._post_end(fault=lost or str(error) or type(error).__name__)
        self._stop.set()
        for thread in self._threads:  # one still waiting for the store as Python ends would abort
            thread.join(LONGEST_JOIN)
        if lost is not None:
            raise RankLostError(lost) from error

    def at(self, step: int, activity: str) -> None:
        """Record the activity that this rank begins; all ranks call this in the same order."""
        with self._lock:
            moves = self._own.moves + 1
            self._own = replace(self._own, moves=moves, step=step, activity=activity)

    def _post_end(self, *, fault: str = "", finished: bool = False) -> None:
        with self._lock:
            self._own = replace(self._own, fault=fault, finished=finished)
        try:
            self._post()
        except RuntimeError:  # the store's host has already ended
            return

    def _post(self) -> None:
        with self._lock:
            self._beat += 1
            status = replace(self._own, beat=self._beat)
        self._posting.set(str(status.rank), json.dumps(asdict(status)))

    def _heartbeat(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self._post()
            except RuntimeError:
                continue  # _judge notices that the store does not answer

    def _listen(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(self.interval):
            try:
                answers = self._reading.multi_get([str(rank) for rank in range(self._world)])
            except RuntimeError:
                continue
            now = time.monotonic()
            # Capped: this process, and perhaps the others, may have been stopped for a while.
            passed, before = min(now - before, 3 * self.interval), now
            for answer in answers:
                self._table.update(RankStatus(**json.loads(answer)), passed)
            self._answered = 0.0

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            self._answered += min(now - before, 3 * self.interval)
            before = now
            verdict = self._table.verdict()
            if verdict is None and self._answered > self.silence:
                verdict = f"{STORE_HOST} did not answer for {self._answered:.0f} s"
            if verdict is not None and not self._stop.is_set():
                self._give_up(verdict)
                return

    def _judge_alone(self) -> None:
        seen, before = ObservedRank(self._own), time.monotonic()
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            passed, before = min(now - before, 3 * self.interval), now
            own = self._own
            moved = own.moves != seen.status.moves or own.activity != WAITING_FOR_DATA
            seen = ObservedRank(own, stuck=0.0 if moved else seen.stuck + passed)
            if seen.stuck > self.timeout:
                self._give_up(f"{own} made no progress for {seen.stuck:.0f} s: {own.place}")
                return

    def _give_up(self, verdict: str) -> None:
        sys.stderr.write(
            f"\nsimmim: {verdict}.\nThe limit is {self.silence:g} s without a sign of life and"
            f" {self.timeout:g} s, training.rank_timeout, without progress. Rank {self._own.rank}"
            f" ({self._own.place}) exits with code {LOST}. Resume from the last checkpoint with"
            " --resume auto.\n"
        )
        main = threading.main_thread().ident
        traceback.print_stack(sys._current_frames().get(main or 0), file=sys.stderr)
        sys.stderr.flush()
        self._end(LOST)

    def _lost_ranks(self, error: BaseException) -> str | None:
        """Return a message that names the lost ranks if they caused `error`, else None."""
        text = f"{type(error).__name__} {error}".lower()
        if (
            not isinstance(error, RuntimeError)
            or lost_worker(error)
            or not any(word in text for word in _COMMUNICATION_ERRORS)
        ):
            return None
        first: list[ObservedRank] = []
        for _ in range(INTERVALS_TO_IDENTIFY):
            time.sleep(self.interval)
            gone = [known for known in list(self._table.ranks.values()) if self._is_gone(known)]
            # Those that went silent, or failed for a reason of their own, are the cause.
            first = [known for known in gone if "lost" not in known.status.fault]
            if first:
                break
        else:
            first = gone
        reasons = [
            f"{known.status} {_ending(known.status)}, at {known.status.place}"
            for known in first[:8]
        ]
        found = "; ".join(reasons) or f"{STORE_HOST} perhaps"
        return f"a rank was lost, and training needs all: {found}"

    def _is_gone(self, known: ObservedRank) -> bool:
        """Return whether another rank has failed, or is silent for longer than a live one is."""
        if known.status.rank == self._own.rank or known.status.finished:
            return False
        return bool(known.status.fault) or known.silent > 2.5 * self.interval


def _ending(status: RankStatus) -> str:
    return f"failed: {status.fault}" if status.fault else "is gone"
