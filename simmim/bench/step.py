"""A training step, simulated on fake tensors or run, with the peak of its memory.

    python -m simmim.bench.step simulate|measure < cases.json

Steps run in a separate process: fake tensors get into the encoder's cached tables, and the peak of
a process cannot be reset. Cases are read as a JSON list; one line of JSON is written for each.
"""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from simmim.bench.choices import MASK_CELL, Device, Precision
from simmim.bench.cuda_rules import cuda_rules
from simmim.bench.live_bytes import LiveBytes, materialise, only_two_groups
from simmim.data.loader.batch import Batch
from simmim.engine.loop import accumulate_gradients
from simmim.method.model import SimMIM
from swinv2 import SwinV2, build_encoder
from swinv2.config import AttentionPath, Checkpointing


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
    """Number of images."""
    mask_cell: int = MASK_CELL
    """Side of a mask cell in pixels."""
    patch_size: int = 4
    """Side of a patch in pixels."""
    in_channels: int = 3
    """Channels of the images."""
    sizes: tuple[tuple[str, float | tuple[int, ...]], ...] = ()
    """Fields of the encoder's config that override the variant's, with their values."""
    device: Device = "cuda"
    """Kind of device, whose kernels and rules of autocast are counted."""
    optimizer: bool = True
    """Whether the step includes AdamW; else forward and backward only."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Peak of the activations while a part of the gradients exists."""

    gradients: int
    """Number of elements of the finished gradients."""
    activations: int
    """Bytes of everything except weights, finished gradients and optimiser state."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Memory of a step, from the sizes of its tensors."""

    peaks: tuple[Peak, ...]
    """Peaks in the order of the backward pass; the first includes the forward pass."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Measured memory and time of a step."""

    peak: int
    """Peak bytes, minus the memory of the process before the model was built."""
    seconds: float
    """Duration of the step."""
    meter: str
    """How it was measured."""


@cache
def _fake_mode() -> FakeTensorMode:
    """Return the one fake mode of this process, which the encoder's cached tables belong to."""
    return FakeTensorMode()


def simulate(case: StepCase) -> Simulation:
    """Run the step on fake tensors, which have sizes but no values, and track live memory."""
    with torch.device("meta"):
        model = build_step_model(case)
    peaks: list[Peak] = []
    finished = 0
    rules = cuda_rules() if case.device == "cuda" else contextlib.nullcontext()
    with _fake_mode(), LiveBytes() as live, only_two_groups(), rules:
        materialise(model, torch.device("cpu"))
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


def _rising(peaks: Iterable[Peak]) -> Iterator[Peak]:
    """Drop peaks that are lower than a later one, which has more gradients."""
    kept: list[Peak] = []
    for peak in peaks:
        while kept and kept[-1].activations <= peak.activations:
            kept.pop()
        kept.append(peak)
    return iter(kept)


def measure(case: StepCase) -> Measurement:
    """Run the step on this machine's GPU or CPU, and measure the peak of its memory.

    AdamW's state exists from the start, as in every step but the first. A step of a very small
    encoder before it keeps what torch loads on first use out of the measurement.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _take_step(_smallest_model(case).to(device), case, device, batch=1, side=MASK_CELL)
    before = _peak_of_process()
    model = build_step_model(case).to(device)
    seconds = _take_step(model, case, device, batch=case.batch, side=case.image_size)
    if not all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters()):
        raise ValueError("a gradient is missing or not finite.")
    if device.type == "cuda":
        peak, meter = torch.cuda.max_memory_allocated(), "torch.cuda.max_memory_allocated"
    else:
        peak, meter = _peak_of_process() - before, "peak resident memory"
    return Measurement(peak=peak, seconds=seconds, meter=meter)


def _take_step(
    model: SimMIM[SwinV2], case: StepCase, device: torch.device, *, batch: int, side: int
) -> float:
    """Run a step, with AdamW if the case includes it, and return its seconds."""
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
    """Build the model of a step on the current device, in training mode."""
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
    # Decoding every pixel is the maximum over masks, and does not depend on the mask's values.
    model = SimMIM(encoder, mask_cell=case.mask_cell, loss_area="all").train()
    return model.to(torch.bfloat16) if case.precision == "bf16-weights" else model


class StepModule(nn.Module):
    """SimMIM over batches, in the precision of a case."""

    def __init__(self, model: SimMIM[SwinV2], precision: Precision) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of a batch of normalised images."""
        images = batch.images.bfloat16() if self.precision == "bf16-weights" else batch.images
        device, autocast = images.device.type, self.precision == "bf16"
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss: Tensor = self.model(images, batch.masks).loss
        return loss


def forward_backward(
    model: SimMIM[SwinV2], precision: Precision, device: torch.device, *, batch: int, side: int
) -> None:
    """Compute the gradients of `batch` images of noise, `side` pixels high and wide."""
    noise = noise_batch(model, batch, side, device)
    accelerator = Accelerator(cpu=device.type == "cpu")
    accumulate_gradients(accelerator, StepModule(model, precision), [noise], lambda _: None)


def noise_batch(model: SimMIM[SwinV2], batch: int, side: int, device: torch.device) -> Batch:
    """Return a batch of images of noise, `side` pixels high and wide, hidden everywhere."""
    cells = side // model.mask_cell
    return Batch(
        images=torch.randn(batch, model.encoder.config.in_channels, side, side, device=device),
        masks=torch.ones(batch, cells, cells, dtype=torch.bool),
        labels=None,
        addresses=torch.zeros(batch, 3, dtype=torch.int64, device="cpu"),
    )


def _peak_of_process() -> int:
    """Return the peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage includes the parent's memory before the fork
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(arguments: Sequence[str]) -> None:
    """Simulate or measure the cases on stdin, one after another."""
    (action,) = arguments
    for values in json.load(sys.stdin):
        case = StepCase(**values)
        answer = simulate(case) if action == "simulate" else measure(case)
        sys.stdout.write(json.dumps(asdict(answer)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
