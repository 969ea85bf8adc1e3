import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from simmim.data.datasets.shards import ShardSet
from simmim.data.loader.bad_samples import BadSamples
from simmim.data.loader.batch import NO_TARGETS, Batch
from simmim.data.loader.batches import TrainingBatches, evaluation_batches
from simmim.data.loader.lost_workers import WorkerLostError
from simmim.data.order.order import Address, SampleOrder
from simmim.data.order.source import DataError
from simmim.data.transforms.image_transforms import (
    EvalTransform,
    Instances,
    StackedTargets,
    TrainTransform,
)
from tests.simmim.data.conftest import WriteShards, crop, random_images
from tests.simmim.data.transforms.test_image_transforms import DrawMask
from tests.simmim.forked import forked

TRAIN = TrainTransform(data=crop(8), seed=3, mask=DrawMask((2, 2)))
EVALUATE = EvalTransform(size=(8, 8), mask=DrawMask((2, 2)))


def joined(batches: Iterable[Batch]) -> Batch:
    parts = list(batches)
    masks = [part.masks for part in parts if part.masks is not None]
    labels = [part.labels for part in parts if part.labels is not None]
    flips = [part.flips for part in parts if part.flips is not None]
    return Batch(
        images=torch.cat([part.images for part in parts]),
        masks=torch.cat(masks) if masks else None,
        labels=torch.cat(labels) if labels else None,
        addresses=torch.cat([part.addresses for part in parts]),
        flips=torch.cat(flips) if flips else None,
        bad=tuple(chain(*(part.bad for part in parts))),
    )


def equal(first: Batch, second: Batch) -> bool:
    pairs = [
        (first.images, second.images),
        (first.masks, second.masks),
        (first.labels, second.labels),
        (first.addresses, second.addresses),
        (first.flips, second.flips),
    ]
    return first.bad == second.bad and all(
        (a is b is None) or (a is not None and torch.equal(a, b)) for a, b in pairs
    )


@pytest.fixture
def shards(write_shards: WriteShards) -> ShardSet:
    return ShardSet(write_shards([11, 9, 14], ("a", "b")))


def training(shards: ShardSet, **options: int) -> TrainingBatches:
    order = SampleOrder(shards.sizes, seed=1, slots=8)
    chosen = {"batch_size": 16, "start_position": 0, "end_position": 96} | options
    return TrainingBatches(shards, order, TRAIN, **chosen)


def test_batches_are_bytes(shards: ShardSet) -> None:
    batch = next(iter(training(shards)))
    assert batch.masks is not None
    assert batch.labels is not None
    assert (batch.images.shape, batch.images.dtype) == ((16, 3, 8, 8), torch.uint8)
    assert (batch.masks.shape, batch.masks.dtype) == ((16, 2, 2), torch.bool)
    assert (batch.labels.shape, batch.labels.dtype) == ((16,), torch.int64)
    assert batch.addresses.shape == (16, 3)
    assert len(batch) == 16
    assert equal(batch.to("cpu"), batch)
    moved = batch.to("meta")
    assert moved.masks is not None
    assert moved.images.device.type == "meta"
    assert moved.masks.device.type == "cpu"  # where it is looked up what to decode


def objects(count: int) -> Instances:
    return Instances(
        labels=torch.arange(count),
        boxes=torch.rand(count, 4),
        masks=torch.rand(count, 3, 3) < 0.5,
        image=torch.tensor([count, 3, 3]),
    )


def dense_batch(targets: list[Instances]) -> Batch:
    count = len(targets)
    return Batch(
        images=torch.zeros(count, 3, 3, 3, dtype=torch.uint8),
        masks=torch.zeros(count, 1, 1, dtype=torch.bool),
        labels=None,
        addresses=torch.zeros(count, 3, dtype=torch.int64),
        flips=torch.zeros(count, dtype=torch.bool),
        targets=StackedTargets.stack(targets),
    )


def test_targets_are_one_tensor_a_field_and_each_image_has_its_own() -> None:
    targets = [objects(count) for count in (2, 0, 3)]
    batch = dense_batch(targets)
    for found in (batch, pickle.loads(pickle.dumps(batch)), batch.to("cpu")):
        assert len(found.targets) == 3
        for own, expected in zip(found.targets, targets, strict=True):
            assert isinstance(own, Instances)
            pairs = zip(own.tensors, expected.tensors, strict=True)
            assert all(torch.equal(*pair) for pair in pairs)
    assert [len(part) for part in batch.targets.values] == [5, 20, 45, 9]
    assert torch.equal(batch.only(2).targets[0].tensors[1], targets[2].boxes)
    assert batch.to("meta").targets[0].tensors[0].device.type == "meta"
    assert list(NO_TARGETS) == []


def test_the_whole_batch_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's loader, whose thread knows nothing of batches but the method."""
    pinned: list[torch.Size] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.shape)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = dense_batch([objects(2), objects(1)])
    assert isinstance(pin_memory(batch), Batch)
    parts = [batch.images, batch.masks, batch.flips, *batch.targets.values]
    expected = [part.shape for part in parts if part is not None]
    assert sorted(pinned) == sorted(expected)


def test_labels_and_masks_belong_to_their_images(shards: ShardSet) -> None:
    for batch in training(shards):
        assert batch.labels is not None
        for row, (epoch, shard, sample) in enumerate(batch.addresses.tolist()):
            raw = shards.read(shard, sample)
            expected = TRAIN(raw, Address(epoch, shard, sample))
            assert torch.equal(batch.images[row], expected.image)
            assert batch.labels[row] == raw.label


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards: ShardSet, workers: int) -> None:
    alone, helped = list(training(shards)), list(training(shards, workers=workers))
    assert len(alone) == len(helped) == len(training(shards)) == 6
    assert all(equal(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 2), (4, 2), (8, 1), (2, 8)])
def test_ranks_and_accumulation_change_no_global_batch(
    shards: ShardSet, world: int, accumulation: int
) -> None:
    whole = list(training(shards))
    ranks = [
        list(training(shards, rank=rank, world=world, accumulation=accumulation))
        for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        micro = slice(step * accumulation, (step + 1) * accumulation)
        assert equal(joined(chain(*[rank[micro] for rank in ranks])), batch)
        assert {len(part) for rank in ranks for part in rank[micro]} == {
            16 // world // accumulation
        }


def test_a_restart_resumes_where_the_run_stopped(shards: ShardSet) -> None:
    whole = list(training(shards))
    rest = list(training(shards, start_position=48, workers=1))
    assert all(equal(a, b) for a, b in zip(whole[3:], rest, strict=True))


def test_epochs_follow_each_other_without_a_break(shards: ShardSet) -> None:
    epochs = joined(training(shards)).addresses[:, 0].unique()
    assert epochs.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 12}, "multiple of the 8 slots"),
        ({"world": 3}, "3 processes cannot share"),
        ({"accumulation": 3}, "accumulation is 3"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"end_position": 90}, "whole number of batches"),
        ({"start_position": 112}, "whole number of batches"),
        ({"workers": -1}, "workers is -1"),
        ({"prefetch": 0}, "prefetch 0"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(
    shards: ShardSet, options: dict[str, int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        training(shards, **options)


def test_an_order_of_other_shards_is_refused(shards: ShardSet) -> None:
    with pytest.raises(ValueError, match="other shards"):
        TrainingBatches(
            shards,
            SampleOrder([50], seed=1, slots=1),
            TRAIN,
            batch_size=1,
            start_position=0,
            end_position=1,
        )


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_evaluation_sees_each_sample_once(shards: ShardSet, world: int, batch_size: int) -> None:
    streams = [
        evaluation_batches(shards, EVALUATE, batch_size=batch_size, rank=rank, world=world)
        for rank in range(world)
    ]
    seen = [batch.addresses.tolist() for stream in streams for batch in stream]
    assert sum(len(stream) for stream in streams) == len(seen)
    expected = [
        [0, shard, sample] for shard, size in enumerate(shards.sizes) for sample in range(size)
    ]
    assert sorted(chain(*seen)) == expected
    if world == 1:
        assert list(chain(*seen)) == expected
        assert {len(part) for part in seen[:-1]} <= {batch_size}


def test_evaluation_masks_are_the_sample_s_own(shards: ShardSet) -> None:
    whole = joined(evaluation_batches(shards, EVALUATE, batch_size=64))
    pieces = joined(evaluation_batches(shards, EVALUATE, batch_size=5, workers=2))
    assert equal(whole, pieces)
    last = joined(evaluation_batches(shards.split(1)[1], EVALUATE, batch_size=64))
    assert whole.masks is not None
    assert last.masks is not None
    assert torch.equal(whole.masks[-14:], last.masks)


def test_nothing_to_evaluate(shards: ShardSet) -> None:
    none = shards.split(0)[1]
    assert list(evaluation_batches(none, EVALUATE, batch_size=4, workers=1)) == []
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluation_batches(shards, EVALUATE, batch_size=0)


def test_sets_without_labels_make_batches_without(write_shards: WriteShards) -> None:
    shards = ShardSet(write_shards([4]))
    transform = EvalTransform(size=(8, 8))
    batch = next(iter(evaluation_batches(shards, transform, batch_size=4)))
    assert batch.labels is None
    assert batch.masks is None
    assert equal(batch.to("cpu"), batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_are_named_in_one_message(
    write_shards: WriteShards, workers: int
) -> None:
    images = random_images(8)
    images[5] = b"no image at all"
    shards = ShardSet(write_shards([4, 4], images=images))
    batches = evaluation_batches(
        shards, EVALUATE, batch_size=2, workers=workers, bad_samples=BadSamples(max_share=0)
    )
    before = set(psutil.Process().children())
    with pytest.raises(DataError, match="max_bad_share 0 allows") as caught:
        list(batches)
    assert set(psutil.Process().children()) == before
    message = str(caught.value)
    assert "shard-000001/001000001" in message
    assert "damaged or of an unknown format" in message
    assert "Traceback" not in message
    assert "\n" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_shard_is_named(write_shards: WriteShards, workers: int) -> None:
    folder = write_shards([4, 4])
    shards = ShardSet(folder)
    os.truncate(folder / "shard-000001.tar", 700)
    with pytest.raises(DataError, match=r"shard-000001\.tar"):
        list(evaluation_batches(shards, EVALUATE, batch_size=2, workers=workers))


def test_starting_draws_nothing_from_the_process(shards: ShardSet) -> None:
    before = torch.get_rng_state()
    list(training(shards, workers=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_are_picklable(shards: ShardSet) -> None:
    stream = training(shards)
    next(iter(stream))
    copy = pickle.loads(pickle.dumps(stream))
    assert equal(joined(copy), joined(stream))


def test_workers_end_when_the_loop_is_left(shards: ShardSet) -> None:
    before = set(psutil.Process().children())
    batches = iter(training(shards, workers=2))
    next(batches)
    workers = set(psutil.Process().children()) - before
    assert len(workers) == 2
    batches.close()
    assert psutil.wait_procs(workers, timeout=20)[1] == []


# torch may notice the death a second time while it lets the other workers go.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_dies_is_reported(shards: ShardSet) -> None:
    before = set(psutil.Process().children())
    batches = iter(training(shards, workers=2, end_position=16 * 400))
    next(batches)
    (set(psutil.Process().children()) - before).pop().kill()
    with pytest.raises(WorkerLostError, match=r"memory.*data\.workers"):
        list(batches)
    assert set(psutil.Process().children()) == before


STOPPED = """
import signal, sys, time
from simmim.data.datasets.shards import ShardSet
from simmim.data.loader.batches import TrainingBatches
from simmim.data.order.order import SampleOrder
from simmim.data.transforms.image_transforms import TrainTransform
from simmim.data.transforms.settings import RandomCropSettings

asked = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: asked.append(number))
crop = RandomCropSettings(image_size=8, scale=(0.67, 1.0))
shards = ShardSet(sys.argv[1])
order = SampleOrder(shards.sizes, seed=1, slots=8)
transform = TrainTransform(data=crop, seed=3)
batches = TrainingBatches(
    shards, order, transform, batch_size=16, start_position=0, end_position=160_000, workers=2
)
for step, batch in enumerate(batches):
    if step == 0:
        print("started", flush=True)
    if len(asked) == 2:
        asked.append(step)
    if len(asked) == 3 and step == asked[2] + 50:
        break
    time.sleep(0.002)
print("stopped by itself", flush=True)
"""

ENDS = """
import sys
from simmim.data.datasets.shards import ShardSet
from simmim.data.loader.bad_samples import BadSamples
from simmim.data.loader.batches import evaluation_batches
from simmim.data.transforms.image_transforms import EvalTransform

batches = iter(evaluation_batches(
    ShardSet(sys.argv[1]), EvalTransform(size=(8, 8)), batch_size=1, workers=2,
    bad_samples=BadSamples(max_share=0),
))
next(batches)
if sys.argv[2] == "leave":
    raise ValueError("with its workers still at work")
for batch in batches:
    pass
"""


def group_ends(group: int, timeout: float = 15) -> bool:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def wait_for_start(log: Path) -> None:
    deadline = time.monotonic() + 120
    while not log.read_text().startswith("started\n"):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def test_signals_to_the_whole_group_leave_workers_to_the_main_process(
    shards: ShardSet, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with forked(["-c", STOPPED, str(shards.folder)], log) as process:
        wait_for_start(log)
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0, log.read_text()
        assert log.read_text() == "started\nstopped by itself\n"
        assert group_ends(process.pids[0])


@pytest.mark.parametrize("reason", ["leave", "read on"])
def test_an_error_while_workers_work_ends_the_program(
    write_shards: WriteShards, reason: str
) -> None:
    images = random_images(60)
    images[9] = b"no image at all"
    folder = write_shards([60], images=images)
    process = subprocess.Popen(
        [sys.executable, "-c", ENDS, str(folder), reason],  # not forked: the end of Python itself
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        words = "with its workers still at work" if reason == "leave" else "of an unknown format"
        assert words in errors.splitlines()[-1]
        assert group_ends(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)


def test_workers_do_not_outlive_a_killed_main_process(shards: ShardSet, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with forked(["-c", STOPPED, str(shards.folder)], log) as process:
        wait_for_start(log)
        os.kill(process.pids[0], signal.SIGKILL)
        process.wait(timeout=120)
        assert group_ends(process.pids[0], timeout=60)
