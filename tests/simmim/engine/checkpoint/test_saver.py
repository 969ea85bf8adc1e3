"""Saving in the background, by one rank or by two in this process."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from simmim.engine.checkpoint import saver as saving
from simmim.engine.checkpoint.directory import Best, complete_checkpoints
from simmim.engine.checkpoint.resume import read_model
from simmim.engine.checkpoint.saver import (
    RankContents,
    Saver,
    SavingOutcome,
    write_contents,
)
from simmim.engine.checkpoint.shard_files import TensorShard


def contents(rank: int, world: int, value: float) -> RankContents:
    """Two rows for each rank."""
    rows = torch.full((2, 3), value)
    return RankContents(
        shard=rank,
        shard_count=world,
        model={"weight": TensorShard(rows, 2 * rank, (2 * world, 3))},
        optimizer={},
        texts={"state.json": "{}"} if rank == 0 else {},
    )


@pytest.fixture
def both(tmp_path: Path) -> Iterator[list[Saver]]:
    savers = [Saver(tmp_path, rank=rank, keep_last=2, keep_every=10) for rank in range(2)]
    yield savers
    for saver in savers:
        saver.close()


def meet(savers: list[Saver]) -> list[SavingOutcome | None]:
    """Do what happens at the start of a step."""
    flags = [max(flag) for flag in zip(*(saver.flags() for saver in savers), strict=True)]
    return [saver.update(*flags) for saver in savers]


def steps(folder: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(folder)]


class Gate:
    """Holds up the writing of one rank until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
        self.opened = threading.Event()

        def write(folder: Path, step: int, what: RankContents) -> None:
            if what.shard == rank:
                assert self.opened.wait(timeout=60)
            write_contents(folder, step, what)

        monkeypatch.setattr(saving, "write_contents", write)


def test_a_checkpoint_is_complete_once_all_ranks_have_written(
    both: list[Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, rank=1)
    for rank, saver in enumerate(both):
        saver.start(4, contents(rank, 2, 1.0))
    for _ in range(3):
        assert meet(both) == [None, None]
    assert steps(tmp_path) == []
    gate.opened.set()
    outcomes: list[SavingOutcome | None] = [None, None]
    while outcomes == [None, None]:
        outcomes = meet(both)
    assert outcomes == 2 * [SavingOutcome(step=4, saved=True)]
    assert steps(tmp_path) == ["step-00000004"]
    assert torch.equal(read_model(tmp_path / "step-00000004")["weight"], torch.ones(4, 3))
    assert meet(both) == [None, None]


def test_the_checkpoint_holds_the_weights_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, rank=0)
    saver = Saver(tmp_path, keep_last=2)
    what = contents(0, 1, 3.0)
    saver.start(1, what)
    what.model["weight"].rows.zero_()  # training continues before anything is written
    gate.opened.set()
    assert saver.finish(list) == SavingOutcome(step=1, saved=True)
    assert read_model(tmp_path / "step-00000001")["weight"].unique().tolist() == [3.0]
    saver.start(2, contents(0, 1, 4.0))  # into the same memory
    saver.finish(list)
    assert read_model(tmp_path / "step-00000002")["weight"].unique().tolist() == [4.0]
    saver.close()


def test_a_failure_on_any_rank_leaves_the_earlier_checkpoints(
    both: list[Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def agree(savers: list[Saver]) -> list[SavingOutcome | None]:
        outcomes: list[SavingOutcome | None] = [None, None]
        while outcomes == [None, None]:
            outcomes = meet(savers)
        return outcomes

    for rank, saver in enumerate(both):
        saver.start(4, contents(rank, 2, 1.0))
    agree(both)

    def full(folder: Path, step: int, what: RankContents) -> None:
        write_contents(folder, step, what)
        if what.shard == 1:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_contents", full)
        for rank, saver in enumerate(both):
            saver.start(8, contents(rank, 2, 1.0))
        first, second = agree(both)
    assert first is not None
    assert second is not None
    assert not first.saved
    assert not second.saved
    assert "No space left" in second.reason
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000004"}
    for rank, saver in enumerate(both):
        saver.start(12, contents(rank, 2, 1.0))
    assert agree(both) == 2 * [SavingOutcome(step=12, saved=True)]


def test_a_full_disk_is_reported_and_leaves_nothing(
    tmp_path: Path, no_file_above: Callable[[int], AbstractContextManager[None]]
) -> None:
    saver = Saver(tmp_path, keep_last=2)
    with no_file_above(100):
        saver.start(1, contents(0, 1, 1.0))
        outcome = saver.finish(list)
    saver.close()
    assert outcome is not None
    assert not outcome.saved
    assert "is the disk full?" in outcome.reason
    assert list(tmp_path.iterdir()) == []


def test_a_shard_file_on_another_machines_disk_is_missed(tmp_path: Path) -> None:
    savers = [Saver(tmp_path / str(rank), rank=rank, keep_last=1) for rank in range(2)]
    for rank, saver in enumerate(savers):
        saver.start(1, contents(rank, 2, 1.0))
    outcomes: list[SavingOutcome | None] = [None, None]
    while outcomes == [None, None]:
        outcomes = meet(savers)
    assert outcomes[0] is not None
    assert "must be on a file system that all machines share" in outcomes[0].reason
    assert complete_checkpoints(tmp_path / "0") == []
    for saver in savers:
        saver.close()


def test_a_bug_in_the_writing_thread_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path, step: int, what: RankContents) -> None:
        raise KeyError("weight")

    monkeypatch.setattr(saving, "write_contents", broken)
    saver = Saver(tmp_path, keep_last=2)
    saver.start(1, contents(0, 1, 1.0))
    with pytest.raises(KeyError, match="weight"):
        saver.finish(list)
    saver.close()


def test_keep_every_keeps_checkpoints_permanently(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=2, keep_every=10)

    def agree(flags: Sequence[int]) -> list[int]:
        return list(flags)

    for step in range(5, 45, 5):
        saver.start(step, contents(0, 1, 1.0))
        saver.finish(agree)
    saver.close()
    assert [int(name[-2:]) for name in steps(tmp_path)] == [10, 20, 30, 35, 40]


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        ("remove_old_checkpoints", "old checkpoints"),
        ("write_best", "best.json"),
    ],
)
def test_a_checkpoint_is_complete_even_if_later_work_fails(
    fails: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, keep_last=1)
    saver.start(1, contents(0, 1, 1.0))
    saver.finish(list)

    def denied(folder: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(saving, fails, denied)
    saver.start(2, contents(0, 1, 2.0), Best(step=2, metric="top1", value=50.0))
    outcome = saver.finish(list)
    saver.close()
    assert outcome is not None
    assert outcome.saved
    assert told in outcome.reason
    assert "Permission denied" in outcome.reason
    assert steps(tmp_path) == ["step-00000001", "step-00000002"]
