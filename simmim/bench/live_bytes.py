"""Bytes of the tensors that are alive at once, counted as operations run."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from simmim.compat import operator_mode, storage_key, tensors_in
from swinv2.kernels import sequential

OPERATORS: Mapping[Any, Callable[..., Any]] = {
    torch.ops.swinv2.sequential_attention.default: sequential.attend,
    torch.ops.swinv2.sequential_attention_backward.default: sequential.attend_backward,
}
"""Bodies of our custom operators, whose working set counts too."""


class LiveBytes:
    """Count, within its context, the bytes of live storages that operations create or use."""

    def __init__(self) -> None:
        self.now = 0
        self.most = 0
        self._known: set[int] = set()
        self._mode = operator_mode(self._call)

    def __enter__(self) -> "LiveBytes":
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        body = OPERATORS.get(func)
        if body is None:
            outcome = func(*args, **kwargs)
        else:
            with self._mode:
                outcome = body(*args, **kwargs)
        for tensor in tensors_in((args, outcome)):
            self._count(tensor)
        return outcome

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage_key(tensor)
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@contextmanager
def only_two_groups() -> Iterator[None]:
    """Stop sequential attention after two groups, since the others need the same memory.

    The second needs the most: it starts while tensors of the first are alive.
    """
    groups = sequential._groups
    sequential._groups = lambda *sizes: islice(groups(*sizes), 2)
    try:
        yield
    finally:
        sequential._groups = groups


def materialise(model: nn.Module, device: torch.device) -> None:
    """Replace parameters and buffers on the meta device, with fake ones in a fake mode.

    Of the devices autocast supports, the meta device is none.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(empty))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
