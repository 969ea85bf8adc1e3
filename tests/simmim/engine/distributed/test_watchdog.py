"""Verdicts of the watchdog on given statuses; real ranks are in test_faults."""

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.testing._internal.distributed.fake_pg

from simmim.engine.distributed.watchdog import (
    FAULT_GRACE,
    WAITING_FOR_DATA,
    RankStatus,
    RankTable,
    Watchdog,
    group_timeout,
)
from simmim.engine.exit_codes import LOST
from tests.simmim.forked import waiting_ranks

TIMEOUT = 100.0


def status(rank: int) -> RankStatus:
    return RankStatus(
        rank=rank, host=f"node{rank}", process=40 + rank, moves=7, step=3, activity="computing"
    )


def test_there_is_no_verdict_while_ranks_make_progress() -> None:
    ranks = RankTable(TIMEOUT)
    for moves in range(50):
        for rank in (0, 1):
            ranks.update(replace(status(rank), beat=moves, moves=moves), 30.0)
        assert ranks.verdict() is None


def test_a_silent_rank_is_named() -> None:
    ranks = RankTable(TIMEOUT, silence=TIMEOUT)
    for beat in range(11):
        ranks.update(replace(status(0), beat=beat), 10.0)
        ranks.update(status(1), 10.0)
        assert ranks.verdict() is None
    ranks.update(status(1), 10.0)
    verdict = ranks.verdict()
    assert verdict is not None
    assert verdict.startswith("rank 1 (process 41 on node1) sent no heartbeat for 110 s")
    assert "last seen computing, step 3" in verdict
    assert "rank 0" not in verdict


def test_a_rank_without_a_sign_of_life_is_lost_long_before_one_without_progress() -> None:
    ranks = RankTable(7200.0)
    for beat in range(10):
        ranks.update(replace(status(0), beat=beat), 10.0)
        ranks.update(status(1), 10.0)
    verdict = ranks.verdict()
    assert verdict is not None
    assert verdict.startswith("rank 1 (process 41 on node1) sent no heartbeat for 90 s")
    busy = RankTable(7200.0)
    for beat in range(100):  # it compiles, or waits in native code
        busy.update(replace(status(0), beat=beat), 10.0)
        assert busy.verdict() is None


@pytest.mark.skipif(sys.platform != "linux", reason="starts ranks by fork")
def test_a_rank_that_waits_for_a_stopped_one_ends_after_the_short_limit(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with waiting_ranks("Watchdog(400.0, silence=2.0)", log, late=1) as job:
        os.kill(job.pids[1], signal.SIGSTOP)
        assert job.code_of(0, timeout=60) == LOST, log.read_text()
    assert f"rank 1 (process {job.pids[1]} on" in log.read_text()
    assert "sent no heartbeat for 2 s" in log.read_text()


def test_only_the_rank_that_is_behind_is_blamed() -> None:
    ranks = RankTable(TIMEOUT)
    for beat in range(12):
        ranks.update(replace(status(0), beat=beat, moves=8, activity="asking"), 10.0)
        ranks.update(replace(status(1), beat=beat), 10.0)
    verdict = ranks.verdict()
    assert verdict is not None
    assert verdict.startswith("rank 1 (process 41 on node1) made no progress for 110 s: computing")
    assert "asking, step 3" in verdict


def test_all_ranks_are_named_if_all_are_stuck_in_the_same_place() -> None:
    ranks = RankTable(TIMEOUT)
    for beat in range(12):
        for rank in (0, 1):
            ranks.update(replace(status(rank), beat=beat), 10.0)
    verdict = ranks.verdict()
    assert verdict is not None
    assert "rank 0" in verdict
    assert "rank 1" in verdict
    assert "All ranks" in verdict


def test_a_finished_rank_is_ignored() -> None:
    ranks = RankTable(TIMEOUT)
    for beat in range(30):
        ranks.update(replace(status(0), beat=beat, moves=beat), 10.0)
        ranks.update(replace(status(1), finished=True), 10.0)
    assert ranks.verdict() is None


def test_a_fault_is_reported_after_a_grace_period() -> None:
    ranks = RankTable(TIMEOUT)
    failed = replace(status(1), fault="no shards")
    ranks.update(failed, 10.0)
    assert ranks.verdict() is None
    ranks.update(failed, FAULT_GRACE)
    assert ranks.verdict() == "rank 1 (process 41 on node1) failed: no shards"


@pytest.mark.parametrize("timeout", [1.0, 600.0, 86400.0])
def test_process_groups_wait_longer_than_the_watchdog(timeout: float) -> None:
    assert group_timeout(timeout).total_seconds() > timeout + Watchdog(timeout).interval * 3


def test_a_single_process_is_watched_while_it_waits_for_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended: list[int] = []
    with Watchdog(1.0, end=ended.append) as watchdog:
        for step in range(1, 30):
            watchdog.at(step, WAITING_FOR_DATA)
            time.sleep(0.05)
        watchdog.at(30, "computing")
        time.sleep(1.5)
        assert ended == []
        watchdog.at(31, WAITING_FOR_DATA)
        deadline = time.monotonic() + 60
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ended == [76]
    assert "made no progress for 1 s: waiting for data, step 31" in capsys.readouterr().err


def test_a_single_process_fails_for_its_own_reason() -> None:
    ended: list[int] = []
    with pytest.raises(ValueError, match="its own"), Watchdog(0.01, end=ended.append):
        raise ValueError("its own")
    assert ended == []


def test_no_watchdog_thread_outlives_its_context(tmp_path: Path) -> None:
    """Python aborts where one of them waits for the store as it ends."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
    torch.distributed.init_process_group("fake", store=store, rank=0, world_size=2)
    try:
        with Watchdog(60.0):
            assert len(of_the_watch()) == 3
        assert of_the_watch() == []
    finally:
        torch.distributed.destroy_process_group()


def of_the_watch() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("watchdog")]
