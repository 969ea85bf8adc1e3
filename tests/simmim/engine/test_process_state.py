"""A run leaves nothing behind in its process, so that another may follow it, in a notebook say."""

import inspect
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from simmim.cli import main
from simmim.engine.devices import build_accelerator, own_process_state
from simmim.engine.generators import initialised_cuda_devices, seeded


def test_runs_of_different_precision_follow_each_other(
    pretrain_config: Path, tmp_path: Path
) -> None:
    with own_process_state():
        mine = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
        before = dict(os.environ), torch.get_num_threads(), torch.get_rng_state()
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        threads = set(threading.enumerate())
        for number, precision in enumerate(("fp32", "bf16", "fp32")):
            folder = str(tmp_path / str(number))
            options = ["--training.steps", "1", "--training.precision", precision]
            command = ["pretrain", "--config", str(pretrain_config), "--folder", folder]
            assert main([*command, *options]) == 0
        assert main(["evaluate", str(tmp_path / "1")]) == 0
        # The user's own accelerator works as before.
        assert mine.mixed_precision == AcceleratorState().mixed_precision == "bf16"
        assert mine.gradient_accumulation_steps == 3
        assert mine.device.type == "cpu"
        assert (dict(os.environ), torch.get_num_threads()) == before[:2]
        assert torch.equal(torch.get_rng_state(), before[2])
        assert handlers == [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
        left = {one.name for one in set(threading.enumerate()) - threads if not one.daemon}
        assert not left


def test_accelerators_of_different_precision_follow_each_other() -> None:
    with own_process_state():
        for precision, expected in (("fp32", "no"), ("bf16", "bf16"), ("fp32", "no")):
            assert build_accelerator(precision).mixed_precision == expected


def test_no_state_stays_after_a_failure() -> None:
    with own_process_state():
        try:
            with own_process_state():
                os.environ["LEFT_BEHIND"] = "1"
                build_accelerator("bf16")
                raise KeyError
        except KeyError:
            pass
        assert "LEFT_BEHIND" not in os.environ
        assert not AcceleratorState._shared_state
        assert not PartialState._shared_state
        assert not GradientState._shared_state


def queued_cuda_seed() -> int | None:
    """Return the seed that CUDA would get if it was initialised now; None for its own default."""
    queued = torch.cuda._lazy_seed_tracker.call_order
    return None if not queued else inspect.getclosurevars(queued[-1][0]).nonlocals["seed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="seeds are queued where there is no CUDA")
def test_weights_are_drawn_without_seeding_cuda() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with seeded(1):
        drawn = torch.rand(3)
        assert queued_cuda_seed() == 7
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(1)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="seeds are queued where there is no CUDA")
def test_a_run_that_seeds_everything_leaves_cuda_the_seed_of_the_caller() -> None:
    torch.manual_seed(7)
    assert not initialised_cuda_devices()
    with own_process_state():
        torch.manual_seed(1)
        assert queued_cuda_seed() == 1
    assert queued_cuda_seed() == torch.initial_seed() == 7
