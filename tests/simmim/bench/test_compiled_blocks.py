"""What compiled blocks allocate, counted without values, is what real ones hold."""

from typing import Any

import pytest
import torch
from torch import Tensor

from simmim.bench import compiled_blocks
from simmim.bench.compiled_blocks import block_memory, count_compiled_blocks
from simmim.bench.graph_memory import GraphMemory, graph_memory
from simmim.bench.live_bytes import LiveBytes, materialise
from simmim.compat import compiled_graphs, fake_tensor_mode, graphs_backend, tensors_in
from swinv2 import SwinV2, build_encoder
from swinv2.attention import window_grid

SIDE, DIM = 8, 32
CPU = torch.device("cpu")


def encoder(**execution: Any) -> SwinV2:
    """Return an encoder of two blocks of padded windows of 6x6 tokens, plain and shifted."""
    sizes = {"embed_dim": DIM, "depths": (2,), "num_heads": (2,), "window_size": 6}
    built = build_encoder("tiny", image_size=4 * SIDE, **sizes).train()
    built.set_execution(**execution)
    return built


def counted(number: int, dtype: torch.dtype, **execution: Any) -> GraphMemory:
    found: list[GraphMemory] = []

    def note(block: Any, tokens: Tensor, *rest: Any) -> Tensor:
        found.append(block_memory(block, tokens, *rest))
        return tokens

    ours = encoder(**execution)
    with fake_tensor_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        materialise(ours, CPU)
        ours.blocks[number].compiled_run = note
        tokens = torch.empty(2, SIDE, SIDE, DIM, dtype=dtype, requires_grad=True)
        ours.blocks[number](tokens)
    return found[0]


def held(number: int, dtype: torch.dtype, **execution: Any) -> int:
    """Return the bytes that a compiled block holds between forward and backward, by itself."""
    ours = encoder(**execution)
    torch.compiler.reset()
    ours.compile_blocks(backend=graphs_backend(lambda _: None))
    tokens = torch.randn(2, SIDE, SIDE, DIM, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = ours.blocks[number](tokens)
    saved: Any = output.grad_fn.saved_tensors
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in saved}
    block = ours.blocks[number]
    tables = block.attention.tables(window_grid((SIDE, SIDE), block.window, shifted=block.shifted))
    for one in (tokens, output, *ours.parameters(), *tensors_in(tables)):
        storages.pop(one.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize(
    ("number", "dtype", "execution"),
    [
        (0, torch.bfloat16, {}),
        (1, torch.bfloat16, {}),
        (1, torch.float32, {}),
        (1, torch.bfloat16, {"attention": "sequential"}),
        (1, torch.bfloat16, {"attention": "explicit"}),
        (1, torch.bfloat16, {"checkpointing": "attention"}),
    ],
)
def test_the_count_is_what_compiled_blocks_hold(
    number: int, dtype: torch.dtype, execution: dict[str, Any]
) -> None:
    expected = held(number, dtype, **execution)
    found = sum(counted(number, dtype, **execution).saved)
    assert found == pytest.approx(expected, rel=1e-3)


def test_checkpointed_attention_keeps_less() -> None:
    kept = [
        sum(counted(0, torch.bfloat16, checkpointing=one).saved) for one in ("none", "attention")
    ]
    assert kept[1] < 0.7 * kept[0]


def live_bytes(*, compiled: bool, checkpointing: Any) -> dict[str, int]:
    ours = encoder(checkpointing=checkpointing)
    if compiled:
        count_compiled_blocks(ours)
    with fake_tensor_mode(), LiveBytes() as live, torch.autocast("cpu", torch.bfloat16):
        materialise(ours, CPU)
        tokens = torch.empty(16, SIDE, SIDE, DIM, dtype=torch.bfloat16, requires_grad=True)
        before = live.most = live.now
        output = ours.stages[0](tokens)
        kept, forward = live.now - before, live.most - before
        loss = output.sum()
        del output
        gradients = torch.autograd.grad(loss, [tokens, *ours.stages[0].parameters()])
        most = live.most - before
        del loss
        left = live.now - before - sum(one.nbytes for one in gradients)
    return {"kept": kept, "forward": forward, "most": most, "left": left}


def test_blocks_allocate_and_free_what_they_are_counted_for() -> None:
    compiled_blocks._TRACED.clear()  # checkpointed blocks are traced in the forward, too
    full = live_bytes(compiled=True, checkpointing="full")
    plain = live_bytes(compiled=True, checkpointing="none")
    eager = live_bytes(compiled=False, checkpointing="none")
    tokens = 16 * SIDE * SIDE * DIM * 2
    assert 2 * tokens <= full["kept"] < 2.5 * tokens  # the outputs of both blocks, and tables
    assert plain["kept"] > 10 * full["kept"]
    assert plain["most"] >= plain["forward"] >= plain["kept"]
    assert full["most"] < 0.8 * plain["most"]
    # Compiled blocks keep more than eager ones, and need less to compute.
    assert 1.02 < plain["kept"] / eager["kept"] < 1.3
    assert plain["most"] - plain["kept"] < 0.5 * (eager["most"] - eager["kept"])
    assert plain["left"] < tokens / 2  # tables


def test_what_is_fused_takes_no_memory() -> None:
    def function(weights: list[Tensor], tensors: list[Tensor]) -> Tensor:
        (weight,), (tokens,) = weights, tensors
        return ((tokens @ weight).cos().sin() @ weight).cos()

    weight, tokens = (torch.empty(64, 64, requires_grad=True) for _ in range(2))
    found = graph_memory(*compiled_graphs(function, [weight], [tokens]))
    size = 4 * 64 * 64
    # Both products, whose cosines are computed again, and perhaps what the second is given.
    assert sum(found.saved) in (2 * size, 3 * size)
    assert set(found.saved) == {size}
    assert found.saved_inputs == (0, 1)
    assert not found.saves_output
    # The output and two products, or three with the operand of the second.
    assert found.forward == 4 * size
    assert [one.shape for one in found.gradients if one is not None] == [(64, 64)] * 2
    assert 0 < found.backward <= 3 * size
