"""What torch raises for a lost worker, and what it passes on from one that is alive."""

import errno
from typing import Any

import pytest
from torch.utils.data import DataLoader

from simmim.data.loader import lost_workers
from simmim.data.loader.batches import next_batch, start_without_stop_signals
from simmim.data.loader.lost_workers import WorkerLostError, lost_worker, usable_workers

KILLED = "DataLoader worker (pid 7) is killed by signal: {}. "
CAUGHT = "Caught {} in DataLoader worker process 0.\nOriginal Traceback (most recent call last)"


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (RuntimeError(KILLED.format("Killed")), "ran out of memory"),
        (RuntimeError(KILLED.format("Bus error")), "/dev/shm"),
        (RuntimeError(KILLED.format("Segmentation fault")), "native code"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "memory"),
        (MemoryError(CAUGHT.format("MemoryError")), "memory"),
        (RuntimeError(CAUGHT.format("RuntimeError") + "\ncan't allocate memory"), "memory"),
        (EOFError(), "memory"),
        (ConnectionResetError("reset"), "memory"),
    ],
)
def test_a_lost_worker_is_told_with_its_remedy(error: Exception, word: str) -> None:
    lost = lost_worker(error)
    assert lost is not None
    assert word in str(lost)
    assert "data.workers" in str(lost)
    assert lost_worker(lost) is lost


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(CAUGHT.format("RuntimeError") + "\na mistake in a transform"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        MemoryError(),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert lost_worker(error) is None

    def fail() -> Any:
        raise error
        yield

    with pytest.raises(type(error)) as caught:
        next_batch(fail())
    assert caught.value is error


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN])
def test_workers_that_cannot_be_started(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_loader: Any) -> Any:
        raise OSError(number, "the system refuses")

    monkeypatch.setattr(DataLoader, "__iter__", refuse)
    with pytest.raises(WorkerLostError, match=r"the system refuses.*data\.workers"):
        start_without_stop_signals(DataLoader([1]))  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.ENOENT])
def test_without_shared_memory_the_main_process_reads(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lost_workers, "_WARNED", set())
    assert usable_workers(3) == 3

    def refuse() -> None:
        raise OSError(number, "the system refuses")

    monkeypatch.setattr(lost_workers.multiprocessing, "Lock", refuse)
    assert usable_workers(3) == 0
    assert "the system refuses in /dev/shm" in capsys.readouterr().err
    assert usable_workers(3) == 0
    assert capsys.readouterr().err == ""  # once
