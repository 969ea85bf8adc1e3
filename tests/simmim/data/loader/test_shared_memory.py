"""Buffers return what was put in, are not overwritten before it is taken, and replace the pipe."""

import gc
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from simmim.data.datasets.shards import ShardSet
from simmim.data.loader import shared_memory
from simmim.data.loader.batches import TrainingBatches
from simmim.data.loader.shared_memory import BatchBuffers, BufferedArray, take
from simmim.data.order.order import SampleOrder
from simmim.data.transforms.image_transforms import TrainTransform
from tests.simmim.data.conftest import WriteShards, crop

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A worker whose number can be set, played by this process."""
    info = SimpleNamespace(id=0)
    monkeypatch.setattr(shared_memory, "get_worker_info", lambda: info)
    return info


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_arrays_pass_unchanged(worker: SimpleNamespace, kind: str) -> None:
    held = BatchBuffers(workers=3, each=2)
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 255, (2, 5, number + 1, 3)).astype(kind) for number in range(12)]
    found = []
    for worker.id in range(3):
        held.filled = 0  # each worker counts its own
        for number in range(worker.id * 4, worker.id * 4 + 4, 2):
            places = [held.fill(array) for array in arrays[number : number + 2]]
            found += [take(place) for place in places if place is not None]
    assert len(found) == len(arrays)
    for array, taken in zip(arrays, found, strict=True):
        assert taken.dtype == array.dtype
        assert np.array_equal(taken, array)


def test_no_buffer_is_overwritten_before_it_is_taken(worker: SimpleNamespace) -> None:
    held = BatchBuffers(workers=2, each=2)
    array = np.arange(6, dtype=np.uint8)
    first, second = held.fill(array), held.fill(array + 1)
    assert first is not None
    assert second is not None
    assert held.fill(array) is None
    assert np.array_equal(take(first), array)
    third = held.fill(array + 2)
    assert third is not None
    assert held.fill(array) is None
    assert np.array_equal(take(second), array + 1)
    assert np.array_equal(take(third), array + 2)


def test_large_or_empty_arrays_go_through_the_pipe(
    worker: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "BUFFER_BYTES", 4096)
    held = BatchBuffers(workers=1, each=1)
    assert held.fill(np.zeros(4097, np.uint8)) is None
    assert held.fill(np.zeros((0, 3), np.uint8)) is None
    assert held.fill(np.ones(4096, np.uint8)) is not None


def test_memory_and_file_are_released_with_the_buffers() -> None:
    def in_use() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text().count("memfd:batches")
        return len([*Path("/proc/self/fd").iterdir()]), maps

    gc.collect()  # of earlier tests
    before = in_use()
    held = BatchBuffers(workers=2, each=3)
    assert in_use()[1] == before[1] + 1
    del held
    assert in_use() == before


def stream(shards: ShardSet, workers: int) -> TrainingBatches:
    return TrainingBatches(
        shards,
        SampleOrder(shards.sizes, seed=1, slots=8),
        TrainTransform(data=crop(16), seed=1),
        batch_size=8,
        start_position=0,
        end_position=8 * 24,
        workers=workers,
    )


@pytest.mark.parametrize("way", ["buffers", "refused", "full"])
def test_batches_are_the_same_with_and_without_buffers(
    write_shards: WriteShards, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    shards = ShardSet(write_shards([12, 20, 16]))
    expected = [batch.images.clone() for batch in stream(shards, 0)]
    passed: list[BufferedArray] = []

    def counting(place: BufferedArray) -> np.ndarray:
        passed.append(place)
        return take(place)

    monkeypatch.setattr(shared_memory, "take", counting)
    if way == "refused":

        def refuse(*_: object) -> int:
            raise OSError("no memory")

        monkeypatch.setattr(os, "memfd_create", refuse)
    elif way == "full":
        monkeypatch.setattr(shared_memory, "BUFFER_BYTES", 100)
    found = [batch.images for batch in stream(shards, 2)]  # kept, while buffers are refilled
    assert all(one.equal(other) for one, other in zip(expected, found, strict=True))
    assert len(passed) == (24 if way == "buffers" else 0)


PROGRAM = """
import hashlib, multiprocessing, sys
from pathlib import Path
from simmim.data.datasets.shards import ShardSet
from tests.simmim.data.loader.test_shared_memory import stream
import simmim.data.loader.shared_memory as shared_memory

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    taken = 0
    take = shared_memory.take
    def counting(place):
        global taken
        taken += 1
        return take(place)
    shared_memory.take = counting
    digest = hashlib.sha256()
    for batch in stream(ShardSet(Path(sys.argv[2])), int(sys.argv[3])):
        digest.update(batch.images.contiguous().numpy().tobytes())
    print(taken, digest.hexdigest())
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_spawned_workers_use_the_buffers(
    write_shards: WriteShards, tmp_path: Path, method: str
) -> None:
    assert method in multiprocessing.get_all_start_methods()
    folder = write_shards([12, 20, 16])
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = Path(__file__).parents[4]
    printed = [
        subprocess.run(
            [sys.executable, str(program), method, str(folder), workers],
            env=os.environ | {"PYTHONPATH": str(root)},
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        ).stdout.split()
        for workers in ("0", "2")
    ]
    assert [taken for taken, _ in printed] == ["0", "24"]
    assert printed[0][1] == printed[1][1]
