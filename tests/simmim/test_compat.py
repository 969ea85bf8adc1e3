"""The private names that the pipeline uses still do what it uses them for."""

import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.checkpoint import checkpoint

from simmim import compat


def test_exit_functions_are_run_before_a_sudden_end() -> None:
    program = """
import atexit, os
from simmim.compat import run_exit_functions
atexit.register(print, "registered", flush=True)
run_exit_functions()
os._exit(3)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout) == (3, "registered\n")


def test_accelerate_starts_afresh_and_keeps_its_state() -> None:
    Accelerator(cpu=True, mixed_precision="no")
    with compat.fresh_accelerate_state():
        assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    assert AcceleratorState().mixed_precision == "no"


def test_accelerate_takes_another_precision() -> None:
    Accelerator(cpu=True, mixed_precision="no")
    compat.forget_precision("bf16")
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"


def test_the_default_store_is_that_of_the_process_group() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(
        "gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    try:
        compat.default_store().set("key", "value")
        assert compat.default_store().get("key") == b"value"
        copy = compat.default_store().clone()  # a connection of its own
        assert copy.get("key") == b"value"
    finally:
        torch.distributed.destroy_process_group()


def test_no_forward_hook_is_called() -> None:
    called: list[str] = []
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda *_: called.append("before"))
    module.register_forward_hook(lambda *_: called.append("after"))
    with compat.without_forward_hooks([module]):
        module(torch.ones(1, 2))
    assert called == []
    module(torch.ones(1, 2))
    assert called == ["before", "after"]


def test_the_backward_is_compiled_in_the_forward() -> None:
    from torch._dynamo.backends.common import aot_autograd

    compiled: list[str] = []

    def backend(direction: str):  # type: ignore[no-untyped-def]
        def compile_graph(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
            compiled.append(direction)
            return graph

        return compile_graph

    def square(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.sin() * tensor).sum()

    both = aot_autograd(fw_compiler=backend("forward"), bw_compiler=backend("backward"))
    with compat.backward_compiled_at_once():
        torch.compile(square, backend=both, dynamic=True)(torch.ones(3, requires_grad=True))
    assert compiled == ["forward", "backward"]


def test_the_end_of_a_recomputation_is_recognised() -> None:
    caught: list[bool] = []

    def block(tensor: torch.Tensor) -> torch.Tensor:
        try:
            return tensor.sin().cos() * 2
        except Exception as error:
            caught.append(compat.ends_recomputation(error))
            raise

    checkpoint(block, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert caught in ([], [True])  # torch ends it early if it has all it needs
    assert not compat.ends_recomputation(ValueError())


@pytest.mark.parametrize("cut", [False, True])
def test_whether_ddp_cuts_graphs_is_set_and_restored(*, cut: bool) -> None:
    import torch._dynamo.config as dynamo

    before = dynamo.optimize_ddp
    with compat.ddp_graphs(cut=cut):
        assert dynamo.optimize_ddp is cut
    assert dynamo.optimize_ddp is before


def test_torch_has_the_function_that_changes_the_allocator() -> None:
    compat.set_allocator_settings("expandable_segments:True")
    compat.set_allocator_settings("expandable_segments:False")


def test_fused_optimisers_skip_a_step_by_themselves() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    fused = torch.optim.AdamW([weight], fused=True)
    assert compat.accepts_found_inf(fused)
    fused.found_inf = torch.ones(())  # type: ignore[attr-defined]
    fused.step()
    assert weight.tolist() == [1, 1, 1]
    fused.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    fused.step()
    assert weight.tolist() != [1, 1, 1]
    assert not compat.accepts_found_inf(torch.optim.AdamW([weight], fused=False))


def test_operators_are_called_through_a_function() -> None:
    called: list[str] = []

    def note(func: Any, args: Any, kwargs: Any) -> Any:
        called.append(func.overloadpacket.__name__)
        return func(*args, **kwargs)

    weight = torch.ones(2, 2, requires_grad=True)
    with compat.operator_mode(note):
        (torch.ones(2, 2) @ weight).sum().backward()  # type: ignore[no-untyped-call]
    assert called.count("mm") == 2  # the backward's, too
    assert compat.tensors_in([(weight,), {"key": weight}, 3]) == [weight, weight]
    doubled = compat.map_tensors(lambda tensor: tensor * 2, {"key": [weight, "text"]})
    assert doubled["key"][0].tolist() == [[2, 2], [2, 2]]
    assert doubled["key"][1] == "text"


def test_fake_tensors_have_sizes_and_share_storages() -> None:
    with compat.fake_tensor_mode():
        whole = torch.empty(10**6, 10**6)
        assert compat.storage_key(whole[1:]) == compat.storage_key(whole)
        assert compat.storage_key(torch.empty(3)) != compat.storage_key(whole)


def test_graphs_of_forward_and_backward_are_kept() -> None:
    graphs: list[torch.fx.Graph] = []
    weight = torch.ones(3, requires_grad=True)
    compiled = torch.compile(
        lambda tensor: (tensor.sin() * tensor).sum(), backend=compat.graphs_backend(graphs.append)
    )
    compiled(weight).backward()
    assert len(graphs) == 2
    assert weight.grad is not None
    expected = torch.tensor(1.0).sin() + torch.tensor(1.0).cos()
    torch.testing.assert_close(weight.grad, expected.expand(3))


def test_the_limit_of_compiled_graphs_is_set() -> None:
    import torch._dynamo.config as dynamo

    before = dynamo.recompile_limit
    try:
        compat.allow_compiled_graphs(before + 12)
        assert dynamo.recompile_limit == before + 12
    finally:
        dynamo.recompile_limit = before


def test_transformers_sends_numbers_as_told() -> None:
    modeling = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    device, sent = torch.device("meta"), []

    def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append(tensor.tolist())
        return tensor.to(device)

    with compat.tensors_sent_by(send, modeling):
        assert modeling.torch.as_tensor([[2, 3]], dtype=torch.long, device=device).shape == (1, 2)
        assert modeling.torch.tensor([4.0], device=device).is_meta
        assert modeling.torch.ones(2).sum() == 2
    assert sent == [[[2, 3]], [4.0]]
    assert modeling.torch is torch


def saved_for_backward(function: Any, weight: torch.Tensor, tensor: torch.Tensor) -> list[str]:
    """Return the names of what the forward returns besides its result."""
    forward, backward = compat.compiled_graphs(
        lambda weights, tensors: function(weights[0], tensors[0]), [weight], [tensor]
    )
    (output,) = (node for node in forward.nodes if node.op == "output")
    _, *saved = (node.name for node in output.args[0])
    inputs = [node.name for node in backward.nodes if node.op == "placeholder"]
    assert inputs[: len(saved)] == saved
    assert len(inputs) == len(saved) + 1  # and the gradient
    return saved


def test_graphs_are_cut_as_compiled_ones_are() -> None:
    def function(weight: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        assert torch.compiler.is_compiling()
        return (tensor @ weight).cos().sin()

    kept: list[torch.fx.Graph] = []
    weight, tensor = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    torch.compile(function, backend=compat.graphs_backend(kept.append))(weight, tensor)
    (output,) = (node for node in kept[0].nodes if node.op == "output")
    saved = saved_for_backward(function, weight, tensor)
    assert len(saved) == len(output.args[0]) - 1
    assert "mm" in saved  # from which the rest is computed again
    assert not torch.compiler.is_compiling()


def test_tracing_is_not_seen_by_modes_or_hooks() -> None:
    seen: list[Any] = []
    with compat.fake_tensor_mode():
        weight, tensor = (torch.empty(4, 4, requires_grad=True) for _ in range(2))
        with (
            compat.operator_mode(lambda func, args, kwargs: seen.append(func)),
            torch.autograd.graph.saved_tensors_hooks(seen.append, lambda one: one),
        ):
            saved_for_backward(lambda left, right: (right @ left).cos(), weight, tensor)
    assert not seen


def test_what_is_marked_is_computed_again_in_the_backward() -> None:
    def function(weight: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        with compat.recomputed_in_backward():
            return (tensor @ weight).cos()

    weight, tensor = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    assert not [one for one in saved_for_backward(function, weight, tensor) if "mm" in one]
