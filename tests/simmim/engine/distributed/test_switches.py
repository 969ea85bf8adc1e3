"""What a run sets on a GPU is described without one, and set back when the run ends."""

from contextlib import suppress
from typing import Any

import pytest
import torch
import torch._dynamo.config as dynamo

from simmim.engine.distributed import switches
from simmim.engine.distributed.switches import Switches, in_force, switched, switches_for


def test_nothing_is_set_on_a_cpu() -> None:
    assert switches_for("cpu", {}) is None


@pytest.mark.parametrize(
    ("environment", "allocator"),
    [
        ({}, "expandable_segments:True"),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"},
            "max_split_size_mb:512,expandable_segments:True",
        ),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, None),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, None),
    ],
)
def test_the_allocator_of_the_environment_is_kept(
    environment: dict[str, str], allocator: str | None
) -> None:
    assert switches_for("cuda", environment) == Switches(allocator=allocator)


def state() -> list[Any]:
    matmul, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    return [matmul, benchmark, dynamo.optimize_ddp]


def test_switches_are_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    allocators: list[str] = []
    monkeypatch.setattr(switches, "set_allocator_settings", allocators.append)
    before = state()
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}
    with suppress(KeyError), switched(switches_for("cuda", environment), environment):
        assert state() == ["high", True, False]
        raise KeyError
    assert state() == before
    assert allocators == [
        "max_split_size_mb:512,expandable_segments:True",
        "max_split_size_mb:512,expandable_segments:False",
    ]


def test_settings_and_network_are_recorded() -> None:
    assert in_force("cpu", {}, ddp=True) == {}
    network = {"GLOO_SOCKET_IFNAME": "eth1"}
    assert in_force("cpu", network | {"HOME": "/"}, ddp=True) == network
    with switched(Switches(allocator=None), {}):
        found = in_force("cuda", network, ddp=True)
    assert found == {
        "float32_matmul": "high",
        "cudnn_benchmark": True,
        "optimize_ddp": False,
        "allocator": "expandable_segments:True",
        "gradient_as_bucket_view": True,
        "broadcast_buffers": False,
        "GLOO_SOCKET_IFNAME": "eth1",
    }
