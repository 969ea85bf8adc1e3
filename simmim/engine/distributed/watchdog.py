"""The watch over ranks: one that hangs or is lost ends the job, and is named.

A collective operation waits for every rank. One that is stopped, hangs in its own code or is gone
would be waited for until a process group's timeout, or for ever, and then the message names nobody.
Here each rank says where it stands, and a thread in each looks at what all the others say.
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
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed
from torch.distributed import distributed_c10d

from simmim.engine.exit_codes import LOST, RankLostError

LONGEST_GOODBYE = 5.0
"""Most seconds to wait for a thread of the watch to end."""

LONGEST_INTERVAL = 2.0
"""Most seconds between two signs of life of a rank."""

FAULT_GRACE = 60.0
"""Seconds that a rank may take to notice by itself that another one has failed."""

INTERVALS_TO_TELL = 10
"""How long a rank that lost a connection waits, at most, to learn which other one is gone."""

WAITING_FOR_DATA = "waiting for data"
"""What a rank does where its data workers, or a file system, may hang."""

KEEPER = "rank 0, or the launcher that keeps the ranks' store,"

_SIGNS_OF_COMMUNICATION = ("gloo", "nccl", "connection", "socket", "store", "broken pipe")
_numbers = itertools.count()  # each of a process's trainings has keys of its own


def group_timeout(rank_timeout: float) -> timedelta:
    """Return the limit of process groups: above that of the watch, which knows more to tell."""
    return timedelta(seconds=1.25 * rank_timeout + 30)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a rank says of itself."""

    rank: int
    host: str
    process: int
    beat: int = 0
    """Counts signs of life."""
    moves: int = 0
    """Counts what the rank began to do; all ranks do the same in the same order."""
    step: int = 0
    doing: str = "starting"
    fault: str = ""
    """What the rank failed with."""
    finished: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"

    @property
    def place(self) -> str:
        """Where it stands, for a person."""
        return f"{self.doing}, step {self.step}"


@dataclass
class Seen:
    """What is known of a rank, and for how many seconds nothing new."""

    standing: Standing
    silent: float = 0.0
    """Without a sign of life."""
    still: float = 0.0
    """Without a move."""
    failed: float = 0.0
    """Since its fault was read."""


@dataclass
class Ranks:
    """What one rank knows of all, judged by its own clock."""

    timeout: float
    seen: dict[int, Seen] = field(default_factory=dict)

    def learn(self, standing: Standing, passed: float) -> None:
        """Take in what a rank says now, `passed` seconds after the last time."""
        known = self.seen.get(standing.rank)
        if known is None:
            self.seen[standing.rank] = Seen(standing)
            return
        before, known.standing = known.standing, standing
        known.silent = 0.0 if standing.beat != before.beat else known.silent + passed
        known.still = 0.0 if standing.moves != before.moves else known.still + passed
        known.failed = known.failed + passed if standing.fault else 0.0

    def verdict(self) -> str | None:
        """Return what is wrong and who is to blame; None while all is well."""
        at_work = [known for known in self.seen.values() if not known.standing.finished]
        for known in at_work:
            if known.standing.fault and known.failed >= FAULT_GRACE:
                return f"{known.standing} failed: {known.standing.fault}"
        at_work = [known for known in at_work if not known.standing.fault]
        silent = [known for known in at_work if known.silent > self.timeout]
        if silent:
            return self._listed(silent, "gave no sign of life for {:.0f} s, last seen {}", "silent")
        if not any(known.still > self.timeout for known in at_work):
            return None
        behind = min(known.standing.moves for known in at_work)
        lagging = [known for known in at_work if known.standing.moves == behind]
        text = self._listed(lagging, "made no progress for {:.0f} s: {}", "still")
        others = [known for known in at_work if known.standing.moves > behind]
        if others:
            return f"{text}. The others wait for it: {others[0].standing.place}"
        return f"{text}. All ranks stand there; see where in the code below"

    def _listed(self, ranks: list[Seen], text: str, age: str) -> str:
        shown = [
            f"{known.standing} {text.format(getattr(known, age), known.standing.place)}"
            for known in ranks[:8]
        ]
        more = [f"{len(ranks) - 8} more"] if len(ranks) > 8 else []
        return "; ".join(shown + more)


def _ending(standing: Standing) -> str:
    return f"failed: {standing.fault}" if standing.fault else "is gone"


class Watchdog:
    """Ends this process, within this context, where a rank makes no progress.

    Of several processes all must enter it together. A single one is watched while it waits for
    data.

    Args:
        timeout: seconds without progress, or without a sign of life, that a rank is granted.
        end: ends this process with an exit code, whatever its main thread waits for.
    """

    def __init__(self, timeout: float, *, end: Callable[[int], None] = os._exit) -> None:
        self.timeout = timeout
        self.interval = min(LONGEST_INTERVAL, timeout / 10)
        self._end = end
        self._ranks = Ranks(timeout)
        self._beat = 0
        self._answered = 0.0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._world = 1
        if torch.distributed.is_initialized():
            self._world = torch.distributed.get_world_size()
        rank = torch.distributed.get_rank() if self._world > 1 else 0
        self._own = Standing(rank=rank, host=socket.gethostname(), process=os.getpid())

    def __enter__(self) -> "Watchdog":
        if self._world == 1:
            self._start(self._judge_alone)
            return self
        # Connections of their own: the main thread may wait on its for a long time.
        store: Any = distributed_c10d._get_default_store()
        prefix = f"watchdog/{next(_numbers)}"
        self._posting, self._reading = (
            distributed_c10d.PrefixStore(prefix, store.clone()) for _ in range(2)
        )
        self._posting.set_timeout(timedelta(seconds=self.timeout))
        self._reading.set_timeout(timedelta(seconds=self.timeout))
        self._post()
        torch.distributed.barrier()
        for work in (self._tell, self._listen, self._judge):
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
        """Tell the others how this rank ended.

        Raises:
            RankLostError: it ended because another one did.
        """
        lost = None
        if self._world > 1:
            lost = self._who_is_lost(error) if error is not None else None
            if error is None:
                self._say(finished=True)
            else:
                self._say(fault=lost or str(error) or type(error).__name__)
        self._stop.set()
        for thread in self._threads:  # Python aborts where one still waits for the store as it ends
            thread.join(LONGEST_GOODBYE)
        if lost is not None:
            raise RankLostError(lost) from error

    def at(self, step: int, doing: str) -> None:
        """Note what this rank begins to do; every rank says the same in the same order."""
        with self._lock:
            moved = {"moves": self._own.moves + 1, "step": step, "doing": doing}
            self._own = Standing(**(asdict(self._own) | moved))

    def _say(self, *, fault: str = "", finished: bool = False) -> None:
        with self._lock:
            ending = {"fault": fault, "finished": finished}
            self._own = Standing(**(asdict(self._own) | ending))
        try:
            self._post()
        except RuntimeError:  # the store's host has ended before
            return

    def _post(self) -> None:
        with self._lock:
            self._beat += 1
            standing = Standing(**(asdict(self._own) | {"beat": self._beat}))
        self._posting.set(str(standing.rank), json.dumps(asdict(standing)))

    def _tell(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self._post()
            except RuntimeError:
                continue  # the judge notices that nothing is answered

    def _listen(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(self.interval):
            try:
                answers = self._reading.multi_get([str(rank) for rank in range(self._world)])
            except RuntimeError:
                continue
            now = time.monotonic()
            # Time in which this process was stopped, and the others perhaps too, counts little.
            passed, before = min(now - before, 3 * self.interval), now
            for answer in answers:
                self._ranks.learn(Standing(**json.loads(answer)), passed)
            self._answered = 0.0

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            self._answered += min(now - before, 3 * self.interval)
            before = now
            verdict = self._ranks.verdict()
            if verdict is None and self._answered > self.timeout:
                verdict = f"{KEEPER} did not answer for {self._answered:.0f} s"
            if verdict is not None and not self._stop.is_set():
                self._give_up(verdict)
                return

    def _judge_alone(self) -> None:
        seen, before = Seen(self._own), time.monotonic()
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            passed, before = min(now - before, 3 * self.interval), now
            own = self._own
            moved = own.moves != seen.standing.moves or own.doing != WAITING_FOR_DATA
            seen = Seen(own, still=0.0 if moved else seen.still + passed)
            if seen.still > self.timeout:
                self._give_up(f"{own} made no progress for {seen.still:.0f} s: {own.place}")
                return

    def _give_up(self, verdict: str) -> None:
        sys.stderr.write(
            f"\nsimmim: {verdict}.\nThe limit is training.rank_timeout, {self.timeout:g} s. Rank"
            f" {self._own.rank} ends with code {LOST}; it stood at: {self._own.place}. Go on from"
            " the last checkpoint with --resume auto.\n"
        )
        main = threading.main_thread().ident
        traceback.print_stack(sys._current_frames().get(main or 0), file=sys.stderr)
        sys.stderr.flush()
        self._end(LOST)

    def _who_is_lost(self, error: BaseException) -> str | None:
        """Return which other ranks are gone, if `error` comes of that; None if it is our own."""
        text = f"{type(error).__name__} {error}".lower()
        if not isinstance(error, RuntimeError) or not any(
            sign in text for sign in _SIGNS_OF_COMMUNICATION
        ):
            return None
        first: list[Seen] = []
        for _ in range(INTERVALS_TO_TELL):
            time.sleep(self.interval)
            gone = [known for known in list(self._ranks.seen.values()) if self._is_gone(known)]
            # Those that fell silent without a word, or with a reason of their own, fell first.
            first = [known for known in gone if "lost" not in known.standing.fault]
            if first:
                break
        else:
            first = gone
        reasons = [
            f"{known.standing} {_ending(known.standing)}, at {known.standing.place}"
            for known in first[:8]
        ]
        found = "; ".join(reasons) or f"{KEEPER} perhaps"
        return f"a rank was lost, and training needs all: {found}"

    def _is_gone(self, known: Seen) -> bool:
        """Tell whether another rank has failed, or is silent for longer than one that lives."""
        if known.standing.rank == self._own.rank or known.standing.finished:
            return False
        return bool(known.standing.fault) or known.silent > 2.5 * self.interval
