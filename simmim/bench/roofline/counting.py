"""Operations and bytes of code as it is implemented, counted on tensors without values.

Eagerly every operator reads its inputs and writes its outputs. Compiled, all operators between
matrix products count as one kernel, which reads once what it takes and writes once what others
need: the least that a compiler can do without fusing products themselves.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from simmim.bench.live_bytes import OPERATORS
from simmim.bench.roofline.ceiling import Operation
from simmim.compat import graphs_backend, operator_mode, tensors_in

FREE = {"alias", "detach", "empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"}
"""Operators, other than views, that move no bytes."""
REDUCTIONS = {"amax", "amin", "any", "max", "mean", "min", "prod", "sum", "var", "var_mean"}
"""Operators whose results are kept, not computed again for each use."""
OPERATOR = type(torch.ops.aten.add.Tensor)
"""The class of operators."""
OVERWRITING = {"copy_", "fill_", "zero_"}
"""Operators that do not read what they change."""


def count_eager(run: Callable[[], object]) -> list[Operation]:
    """Return the operations of a function of tensors on the meta device."""
    operations: list[Operation] = []

    def note(func: Any, args: Any, kwargs: Any) -> Any:
        body = OPERATORS.get(func)
        if body is not None:
            with mode:
                return body(*args, **kwargs)
        outcome = func(*args, **kwargs)
        if not _is_free(func):
            operations.append(_operation(func, args, kwargs, outcome))
        return outcome

    mode = operator_mode(note)
    with mode:
        run()
    return operations


def _is_free(func: Any) -> bool:
    return func.is_view or _name(func) in FREE


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


def _operation(func: Any, args: Any, kwargs: Any, outcome: Any) -> Operation:
    """Return an operator's reads and writes, and the operations of its products."""
    given = args[1:] if _name(func) in OVERWRITING else args
    written = {"out", "grad_input", "grad_weight"}
    read = [value for name, value in kwargs.items() if name not in written]
    tensors = tensors_in((given, read, outcome))
    count = flop_registry.get(func.overloadpacket)
    return Operation(
        name=_name(func),
        flops=0 if count is None else count(*args, **kwargs, out_val=outcome),
        bytes=sum(map(stored_bytes, tensors)),
    )


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements, each once where it is expanded."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    sizes = [size if stride else min(size, 1) for size, stride in steps]
    return math.prod(sizes) * tensor.element_size()


def count_compiled(run: Callable[[Callable[..., Any]], object]) -> list[Operation]:
    """Return the operations of compiled functions.

    Args:
        run: takes a backend of torch.compile, compiles with it, and runs what it compiled forward
            and backward, each function once.
    """
    graphs: list[fx.Graph] = []
    torch.compiler.reset()
    run(graphs_backend(graphs.append))
    return [operation for graph in graphs for operation in fused_operations(graph)]


def fused_operations(graph: fx.Graph) -> Iterator[Operation]:
    """Yield the products and other fixed operators of a graph, and its fused kernels.

    Elementwise results are computed again by each kernel that needs them, unless fixed operators do
    or they are reduced. All that depends on the same fixed operators is one kernel.
    """
    stored = {node for node in graph.nodes if is_stored(node)}
    sources = {node: _sources(node, stored) for node in graph.nodes}
    level: dict[fx.Node, int] = {}
    for node in graph.nodes:
        ready = (level[one] + (kind_of(one) == "fixed") for one in sources[node])
        level[node] = max(ready, default=0)
        if kind_of(node) == "fixed":
            args, kwargs = fx.map_arg((node.args, node.kwargs), _value)
            yield _operation(node.target, args, kwargs, _value(node))
    readers: dict[fx.Node, set[fx.Node]] = {node: set() for node in graph.nodes}
    for node in graph.nodes:
        if node in stored or kind_of(node) == "fixed" or node.op == "output":
            for source in sources[node]:
                readers[source].add(node)
    for number in sorted({level[node] for node in stored}):
        inside = {node for node in stored if level[node] == number}
        read = {source for node in inside for source in sources[node]} - inside
        written = {node for node in inside if not inside >= readers[node]}
        yield Operation(name="kernel", flops=0, bytes=sum(map(_bytes_of, read | written)))


def is_stored(node: fx.Node) -> bool:
    """Return whether a fused operator's result is written, or kept for what is computed next."""
    if kind_of(node) != "fused":
        return False
    return _name(node.target) in REDUCTIONS or any(
        reader.op == "output" or kind_of(reader) == "fixed" for reader in _readers(node)
    )


def _sources(node: fx.Node, stored: set[fx.Node]) -> set[fx.Node]:
    """Return the stored results that an operator is computed from."""
    seen: set[fx.Node] = set()
    pending = list(node.all_input_nodes)
    while pending:
        source = _base(pending.pop())
        if source not in seen and kind_of(source) == "fused" and source not in stored:
            pending += source.all_input_nodes
        seen.add(source)
    return {one for one in seen if one in stored or kind_of(one) != "fused"}


def _bytes_of(node: fx.Node) -> int:
    return sum(map(stored_bytes, tensors_in(_value(node))))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that read a result, or a view of it."""
    for user in node.users:
        if kind_of(user) == "view":
            yield from _readers(user)
        else:
            yield user


def _base(node: fx.Node) -> fx.Node:
    """Return the node whose result a view shows."""
    return _base(node.all_input_nodes[0]) if kind_of(node) == "view" else node


def kind_of(node: fx.Node) -> str:
    """Return input, view, fixed (an operator of its own) or fused."""
    if node.op != "call_function":
        return "input"
    func: Any = node.target
    if not isinstance(func, OPERATOR) or _is_free(func):
        return "view" if node.all_input_nodes else "input"
    is_product = func.overloadpacket in flop_registry
    return "fixed" if is_product or func.namespace not in ("aten", "prims") else "fused"


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")
