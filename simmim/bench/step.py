"""One training step, counted without being computed, or taken while its memory is watched.

    python -m simmim.bench.step simulate|measure < cases.json

A step runs in a process of its own: fake tensors get into the encoder's kept tables, and the peak
of a process cannot be lowered again. Cases come as a JSON list, and a line of JSON goes out for
each.
"""

import contextlib
import json
import resource
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simmim.method.model import SimMIM
from swinv2 import SwinV2, build_encoder
from swinv2.config import AttentionPath, Checkpointing
from swinv2.kernels import sequential

Precision = Literal["fp32", "bf16", "bf16-weights"]
"""fp32; bf16 arithmetic over float32 weights (autocast); or weights in bf16 themselves."""

MASK_CELL = 32
OPERATORS: Mapping[Any, Callable[..., Any]] = {
    torch.ops.swinv2.sequential_attention.default: sequential.attend,
    torch.ops.swinv2.sequential_attention_backward.default: sequential.attend_backward,
}
"""What our own operators do, whose working set counts too."""


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """A SimMIM training step on one device."""

    variant: str
    """Name in swinv2.VARIANTS."""
    image_size: int
    """Side of the images in pixels, whole mask cells."""
    window_size: int
    """Side of the windows in tokens."""
    attention: AttentionPath | tuple[AttentionPath, ...]
    checkpointing: Checkpointing | tuple[Checkpointing, ...]
    precision: Precision
    batch: int
    """Images."""
    mask_cell: int = MASK_CELL
    """Side of a mask cell in pixels."""
    patch_size: int = 4
    """Side of a patch in pixels."""
    in_channels: int = 3
    """Channels of the images."""
    sizes: tuple[tuple[str, int | tuple[int, ...]], ...] = ()
    """Fields of the encoder's configuration that replace the variant's, and their values."""
    optimizer: bool = True
    """Whether AdamW belongs to the step, or only forward and backward."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The most that activations take while a part of the gradients is there."""

    gradients: int
    """Numbers in the gradients that the backward has finished."""
    activations: int
    """Bytes of everything but weights, finished gradients and optimiser."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What a step takes, from the sizes of its tensors."""

    peaks: tuple[Peak, ...]
    """In the order of the backward; the first is that of the forward pass too."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a step took."""

    peak: int
    """Bytes at the peak, over what the process held before there was a model."""
    seconds: float
    """Of the step."""
    meter: str
    """How it was measured."""


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the storages that operations make or meet, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        body = OPERATORS.get(func)
        if body is None:
            outcome = func(*args, **(kwargs or {}))
        else:
            with self:
                outcome = body(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, outcome)):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return outcome

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
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


@cache
def _fake_mode() -> FakeTensorMode:
    """Return the one mode of this process: tables that the encoder keeps belong to it."""
    return FakeTensorMode()


def simulate(case: StepCase) -> Simulation:
    """Run the step on fake tensors, which have sizes and no content, and follow what is alive."""
    with torch.device("meta"):
        model = build_step_model(case)
    peaks: list[Peak] = []
    finished = 0
    with _fake_mode(), LiveBytes() as live, few_groups():
        _materialise(model)
        weights = live.now

        def close() -> None:
            peaks.append(Peak(gradients=finished, activations=live.most - weights))
            live.most = live.now

        def finish(parameter: Tensor) -> None:
            nonlocal finished
            close()
            finished += parameter.numel()
            parameter.grad = None

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(finish)  # type: ignore[no-untyped-call]
        device = torch.device("cpu")
        forward_backward(model, case.precision, device, batch=case.batch, side=case.image_size)
        close()
    return Simulation(peaks=tuple(_rising(peaks)))


def _materialise(model: nn.Module) -> None:
    """Replace parameters on the meta device by fake ones on the CPU, which autocast knows."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            setattr(module, name, nn.Parameter(empty))


def _rising(peaks: Iterable[Peak]) -> Iterator[Peak]:
    """Drop peaks below a later one, which has more gradients and so decides anyway."""
    kept: list[Peak] = []
    for peak in peaks:
        while kept and kept[-1].activations <= peak.activations:
            kept.pop()
        kept.append(peak)
    return iter(kept)


@contextlib.contextmanager
def few_groups() -> Iterator[None]:
    """Let sequential attention stop after two groups: the others take the same once more.

    It is the second that takes the most, since it begins while tensors of the first are there.
    """
    groups = sequential._groups
    sequential._groups = lambda *sizes: islice(groups(*sizes), 2)
    try:
        yield
    finally:
        sequential._groups = groups


def measure(case: StepCase) -> Measurement:
    """Take the step on this machine's GPU, or its CPU, and watch the peak of its memory.

    AdamW's state is there from the start, as in every step but the first. What torch loads when it
    is first used is no part of it: a step of a very small encoder comes before.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _take_step(_smallest_model(case).to(device), case, device, batch=1, side=MASK_CELL)
    before = _peak_of_process()
    model = build_step_model(case).to(device)
    seconds = _take_step(model, case, device, batch=case.batch, side=case.image_size)
    if not all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters()):
        raise ValueError("some gradient is missing or not finite")
    if device.type == "cuda":
        peak, meter = torch.cuda.max_memory_allocated(), "torch.cuda.max_memory_allocated"
    else:
        peak, meter = _peak_of_process() - before, "peak resident memory"
    return Measurement(peak=peak, seconds=seconds, meter=meter)


def _take_step(
    model: SimMIM[SwinV2], case: StepCase, device: torch.device, *, batch: int, side: int
) -> float:
    """Take a step with AdamW, if it belongs to the case, and return the seconds that it took."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda" or None)
    if case.optimizer:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    forward_backward(model, case.precision, device, batch=batch, side=side)
    if case.optimizer:
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _smallest_model(case: StepCase) -> SimMIM[SwinV2]:
    encoder = build_encoder(
        "tiny", image_size=MASK_CELL, window_size=4, embed_dim=8, depths=(2, 1), num_heads=(1, 2)
    )
    return _prepare(encoder, replace(case, mask_cell=MASK_CELL))


def build_step_model(case: StepCase) -> SimMIM[SwinV2]:
    """Build the model of a step on the present device, in training mode."""
    encoder = build_encoder(
        case.variant,
        image_size=case.image_size,
        window_size=case.window_size,
        patch_size=case.patch_size,
        in_channels=case.in_channels,
        drop_path=0.1,
        **dict(case.sizes),
    )
    return _prepare(encoder, case)


def _prepare(encoder: SwinV2, case: StepCase) -> SimMIM[SwinV2]:
    encoder.set_execution(attention=case.attention, checkpointing=case.checkpointing)
    # Decoding every pixel is the most that any mask can ask for, and needs no look at the mask.
    model = SimMIM(encoder, mask_cell=case.mask_cell, loss_area="all").train()
    return model.to(torch.bfloat16) if case.precision == "bf16-weights" else model


def forward_backward(
    model: SimMIM[SwinV2], precision: Precision, device: torch.device, *, batch: int, side: int
) -> None:
    """Compute the gradients of `batch` images of noise, of `side` pixels."""
    images = torch.randn(batch, model.encoder.config.in_channels, side, side, device=device)
    cells = side // model.mask_cell
    mask = torch.ones(batch, cells, cells, dtype=torch.bool, device=device)
    if precision == "bf16-weights":
        images = images.to(torch.bfloat16)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = model(images, mask).loss
    loss.backward()


def _peak_of_process() -> int:
    """Return the most bytes of memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts what the parent held before it started this process
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(arguments: Sequence[str]) -> None:
    """Answer the cases on stdin one after the other."""
    (action,) = arguments
    for values in json.load(sys.stdin):
        case = StepCase(**values)
        answer = simulate(case) if action == "simulate" else measure(case)
        sys.stdout.write(json.dumps(asdict(answer)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
