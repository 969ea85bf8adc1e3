"""Private names of torch, accelerate and Python, each with the reason that there is no public way.

No other module of this package uses one. tests/simmim/test_compat.py tells when one changes.
"""

import atexit
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import, and every command imports this file
    import torch
    from torch import fx, nn

# ruff: noqa: PLC0415 (see above)

CHECKPOINTED = count()
"""Numbers the checkpointed functions that are traced."""


def run_exit_functions() -> None:
    """Call the functions registered with atexit, as Python does when it ends.

    For a process that ends with `os._exit`, which calls none of them.
    """
    atexit._run_exitfuncs()


@contextmanager
def fresh_accelerate_state() -> Iterator[None]:
    """Give accelerate the state of a new process within this context, and restore the old one.

    It keeps one state for the whole process, and has no public way to put one back.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    shared = (AcceleratorState, PartialState, GradientState)
    before = [dict(kind._shared_state) for kind in shared]
    for kind in shared:
        kind._shared_state.clear()
    try:
        yield
    finally:
        for kind, state in zip(shared, before, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)


def forget_precision(precision: str) -> None:
    """Let accelerate take another precision than an earlier run in this process had.

    It keeps the first one; the processes stay as they are.
    """
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()


def default_store() -> Any:
    """Return the key-value store of the default process group, through which ranks found another.

    A second store would need a port of its own, which a launcher does not hand out.
    """
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


@contextmanager
def without_forward_hooks(modules: "list[nn.Module]") -> Iterator[None]:
    """Call no forward hooks of these modules within this context.

    FSDP2 gathers and frees weights in hooks, which wait for all ranks, and has no switch for them.
    """
    hooks = [(module, module._forward_pre_hooks, module._forward_hooks) for module in modules]
    for module in modules:
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, before, after in hooks:
            module._forward_pre_hooks, module._forward_hooks = before, after


def backward_compiled_at_once() -> AbstractContextManager[None]:
    """Return a context in which torch.compile compiles the backward with the forward.

    By default it may do so in the first backward, when it is too late to run the block eagerly.
    Torch 2.8 has no such setting: there a backward that cannot be compiled, after a forward that
    could, ends the training.
    """
    import torch._functorch.config as functorch

    config: Any = functorch
    setting = "force_non_lazy_backward_lowering"
    at_once: AbstractContextManager[None] = config.patch(
        {setting: True} if hasattr(config, setting) else {}
    )
    return at_once


def ends_recomputation(error: BaseException) -> bool:
    """Return whether an exception is torch's way to end the recomputation of a checkpointed block.

    Whoever handles all exceptions has to let it pass.
    """
    from torch.utils.checkpoint import _StopRecomputationError

    return isinstance(error, _StopRecomputationError)


@contextmanager
def ddp_graphs(*, cut: bool) -> Iterator[None]:
    """Set, within this context, whether compiled graphs are cut where DDP sends gradients.

    Torch documents this setting under its private name only.
    """
    import torch._dynamo.config as dynamo

    before = dynamo.optimize_ddp
    dynamo.optimize_ddp = cut
    try:
        yield
    finally:
        dynamo.optimize_ddp = before


def set_allocator_settings(settings: str) -> None:
    """Change the settings of the allocator of GPU memory, which the environment gives at the start.

    Args:
        settings: as in PYTORCH_ALLOC_CONF.
    """
    import torch

    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # from torch 2.9
    if change is None:
        change = torch.cuda.memory._set_allocator_settings
    change(settings)


def accepts_found_inf(optimizer: "torch.optim.Optimizer") -> bool:
    """Return whether an optimiser skips its step on the device if its `found_inf` is not 0.

    `torch.amp.GradScaler` asks fused optimisers the same; without it there is no public way.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def operator_mode(handle: Callable[[Any, Any, Any], Any]) -> AbstractContextManager[Any]:
    """Return a context in which operators are called through a function.

    `torch.overrides` intercepts functions; operators, as backward and compilers call them, only a
    private module does.

    Args:
        handle: takes an operator, its arguments and its keyword arguments, and returns its result.
            Operators that it calls are not intercepted, unless it enters the context again.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class OperatorMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            del types
            return handle(func, args, kwargs or {})

    mode: AbstractContextManager[Any] = OperatorMode()  # type: ignore[no-untyped-call]
    return mode


def fake_tensor_mode() -> AbstractContextManager[Any]:
    """Return a context in which tensors have sizes, types and devices, but no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def tensors_in(value: Any) -> "list[torch.Tensor]":
    """Return the tensors in nested lists, tuples and mappings, as torch.compile finds them."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def map_tensors(function: "Callable[[torch.Tensor], object]", value: Any) -> Any:
    """Return nested lists, tuples and mappings with a function applied to their tensors."""
    from torch import Tensor
    from torch.utils._pytree import tree_map_only

    return tree_map_only(Tensor, function, value)


def storage_key(tensor: "torch.Tensor") -> int:
    """Return a number that tensors share if they share memory; fake tensors have no address."""
    return int(tensor.untyped_storage()._cdata)


def allow_compiled_graphs(most: int) -> None:
    """Let torch.compile keep at most this many graphs of a function, which then runs eagerly."""
    import torch

    torch._dynamo.config.recompile_limit = most


def graphs_backend(keep: "Callable[[fx.Graph], object]") -> "Callable[..., Any]":
    """Return a backend of torch.compile that runs graphs as they are, as its default one cuts them.

    Args:
        keep: called with each graph of a forward or a backward.
    """

    def compile_graph(gm: "fx.GraphModule", example_inputs: Any) -> Any:
        del example_inputs
        keep(gm.graph)

        def run_boxed(inputs: list[Any]) -> Any:
            return gm.forward(*inputs)

        run_boxed._boxed_call = True  # type: ignore[attr-defined]  # as compiled graphs are called
        return run_boxed

    def backend(module: "fx.GraphModule", inputs: Any) -> Any:
        # The compiler takes seconds to import, and imports what else is installed.
        from torch._functorch.aot_autograd import aot_module_simplified
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor.decomposition import select_decomp_table

        return aot_module_simplified(
            module,
            inputs,
            fw_compiler=compile_graph,
            bw_compiler=compile_graph,
            decompositions=select_decomp_table(),
            partition_fn=min_cut_rematerialization_partition,
        )

    return backend


@contextmanager
def tensors_sent_by(
    send: "Callable[[torch.Tensor, torch.device], torch.Tensor]", module: Any
) -> Iterator[None]:
    """Let a module of transformers send tensors of Python numbers to a device in another way.

    `torch.tensor(numbers, device=device)` waits for a GPU, and transformers has no switch for it.

    Args:
        send: copies a tensor on the CPU to a device.
        module: a module that has `import torch`.
    """
    import torch

    module.torch = _TorchThatSends(send)
    try:
        yield
    finally:
        module.torch = torch


class _TorchThatSends:
    """torch, with another way for `tensor` and `as_tensor` to send what is on the CPU."""

    def __init__(self, send: "Callable[[torch.Tensor, torch.device], torch.Tensor]") -> None:
        self.send = send

    def __getattr__(self, name: str) -> Any:
        import torch

        return getattr(torch, name)

    def as_tensor(
        self,
        data: Any,
        *,
        dtype: "torch.dtype | None" = None,
        device: "torch.device | None" = None,
    ) -> "torch.Tensor":
        """Return a tensor of the data; see `torch.as_tensor`."""
        import torch

        if device is None or isinstance(data, torch.Tensor):
            return torch.as_tensor(data, dtype=dtype, device=device)
        return self.send(torch.as_tensor(data, dtype=dtype), device)

    tensor = as_tensor


def compiled_graphs(
    function: "Callable[..., torch.Tensor]",
    weights: "list[torch.Tensor]",
    tensors: "list[torch.Tensor]",
) -> "tuple[fx.Graph, fx.Graph]":
    """Return the graphs of a function's forward and backward, cut as torch.compile cuts them.

    The forward returns what the function does, and then what is saved for the backward, whose first
    inputs these are. Dynamo is not asked, and dispatch modes see nothing of it: tensors may be fake
    ones of a mode. Torch has no public way to ask for the graphs.

    Args:
        function: takes the weights and the tensors, as two lists.
        weights: tensors that exist throughout the training.
        tensors: the others.
    """
    import torch
    from torch import fx
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils._python_dispatch import _disable_current_modes

    graphs: list[fx.Graph] = []

    def partition(joint: Any, inputs: Any, **options: Any) -> Any:
        options["static_lifetime_input_indices"] = list(range(len(weights)))
        parts = min_cut_rematerialization_partition(joint, inputs, **options)
        graphs.extend(part.graph for part in parts)
        return parts

    def return_traced(gm: fx.GraphModule, example_inputs: Any) -> Any:
        del example_inputs
        (output,) = (node for node in gm.graph.nodes if node.op == "output")
        results = fx.map_arg(output.args[0], lambda node: node.meta["val"])
        return make_boxed_func(lambda *_: results)

    traced = aot_function(
        function,
        fw_compiler=return_traced,
        bw_compiler=return_traced,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        # Hooks of a checkpointed function that this is called in would count what is saved here.
        with _disable_current_modes(), saved_tensors_hooks(lambda one: one, lambda one: one):
            traced(weights, tensors)
    finally:
        torch.compiler._is_compiling_flag = before
    forward, backward = graphs
    return forward, backward


@contextmanager
def recomputed_in_backward() -> Iterator[None]:
    """Mark what is traced within this context as torch.compile marks checkpointed functions.

    It does so itself only for functions that Dynamo traces.
    """
    from torch.fx import traceback
    from torch.utils.checkpoint import CheckpointPolicy

    with traceback.preserve_node_meta():
        traceback.current_meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
        traceback.current_meta["ac_graph_id"] = next(CHECKPOINTED)
        yield
