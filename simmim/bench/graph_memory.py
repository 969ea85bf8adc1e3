"""Memory of compiled graphs: what a forward saves for its backward, and what both hold at once.

Operators between products are fused: their results exist only where a product, the backward or a
reduction needs them (`roofline.counting`).
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from simmim.bench.roofline.counting import OPERATOR, is_stored, kind_of, stored_bytes
from simmim.compat import tensors_in

UNCHANGED = {"alias", "detach", "_unsafe_view"}
"""Operators, other than views, that return the storage of an argument."""


@dataclass(frozen=True)
class Form:
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class GraphMemory:
    """What the graphs of a function's forward and backward allocate."""

    output: Form
    saved_inputs: tuple[int, ...]
    """Numbers of the inputs that are saved for the backward."""
    saves_output: bool
    saved: tuple[int, ...]
    """Bytes of each other storage that is saved for the backward."""
    forward: int
    """Most bytes that the forward holds at once, with output and saved storages."""
    backward: int
    """Most bytes that the backward holds at once, more than are saved for it."""
    gradients: tuple[Form | None, ...]
    """Gradients of the inputs."""


def graph_memory(forward: fx.Graph, backward: fx.Graph) -> GraphMemory:
    """Return what the two graphs of a function with one output allocate."""
    inputs = [node for node in forward.nodes if node.op == "placeholder"]
    output, *saved = _results(forward)
    owners = [_owner(node) for node in saved]
    own = [node for node in dict.fromkeys(owners) if node not in (*inputs, _owner(output))]
    # The backward frees what it was given, each storage after the last use of any view of it.
    given = [node for node in backward.nodes if node.op == "placeholder"]
    freed = {node: owner for node, owner in zip(given, owners, strict=False) if owner in own}
    return GraphMemory(
        output=_form(output),
        saved_inputs=tuple(number for number, node in enumerate(inputs) if node in owners),
        saves_output=_owner(output) in owners and _owner(output) not in inputs,
        saved=tuple(map(_bytes, own)),
        forward=most_bytes(forward, {}),
        backward=most_bytes(backward, freed),
        gradients=tuple(None if node is None else _form(node) for node in _results(backward)),
    )


def _form(node: fx.Node) -> Form:
    value: Tensor = node.meta["val"]
    return Form(tuple(value.shape), value.dtype)


def _results(graph: fx.Graph) -> list[Any]:
    (output,) = (node for node in graph.nodes if node.op == "output")
    return list(output.args[0])


def _is_view(node: fx.Node) -> bool:
    func: Any = node.target
    return (
        isinstance(func, OPERATOR)
        and bool(node.all_input_nodes)
        and (func.is_view or func.overloadpacket.__name__ in UNCHANGED)
    )


def _owner(node: fx.Node) -> fx.Node:
    """Return the node that allocates the storage of a node's result."""
    if node.target is operator.getitem:
        source = node.all_input_nodes[0]
        return _owner(source) if _is_view(source) else node
    return _owner(node.all_input_nodes[0]) if _is_view(node) else node


def _bytes(node: fx.Node) -> int:
    return sum(map(stored_bytes, tensors_in(node.meta.get("val"))))


def most_bytes(graph: fx.Graph, freed: Mapping[fx.Node, fx.Node]) -> int:
    """Return the most bytes that a graph holds at once, more than at its start.

    Args:
        graph: a forward or backward.
        freed: inputs that nobody else holds, with the nodes that have allocated their storages,
            which are freed after the last use.
    """
    written = [node for node in graph.nodes if is_written(node) or node.op == "output"]
    read = {node: {freed.get(one, one) for one in _stored_inputs(node)} for node in written}
    last = {one: node for node in written for one in read[node]}
    now = most = 0
    for node in written:
        if node.op == "output":
            break
        size = _bytes(node)
        ended = {
            one: 0 if one.op == "placeholder" else _bytes(one)
            for one in read[node]
            if last[one] is node
        }
        # A fused loop may write its result where it reads what is not needed afterwards.
        reused = next((one for one in ended if ended[one] == size), None)
        if kind_of(node) == "fused" and reused is not None:
            now -= ended.pop(reused)
        now += size
        most = max(most, now)
        now -= sum(ended.values())
    return most


def is_written(node: fx.Node) -> bool:
    """Return whether a graph allocates the result of a node."""
    return node.op == "call_function" and (kind_of(node) == "fixed" or is_stored(node))


def _stored_inputs(node: fx.Node) -> set[fx.Node]:
    """Return the inputs and written results that a node is computed from."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    pending = list(node.all_input_nodes)
    while pending:
        one = pending.pop()
        if one in seen:
            continue
        seen.add(one)
        if is_written(one) or one.op == "placeholder":
            found.add(one)
        else:
            pending += one.all_input_nodes
    return found
