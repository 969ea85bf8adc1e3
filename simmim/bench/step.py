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
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from data_prep.validation import adapter
from simmim.bench.choices import Device, Precision
from simmim.bench.compiled_blocks import count_compiled_blocks
from simmim.bench.cuda_rules import cuda_rules
from simmim.bench.live_bytes import LiveBytes, materialise, only_two_groups
from simmim.compat import fake_tensor_mode, fresh_accelerate_state
from simmim.data.loader.batch import Batch
from simmim.engine.loop import accumulate_gradients, training_step
from simmim.engine.settings import OptimizerSettings, TrainingSettings
from simmim.method.masking import draw_masks
from simmim.method.settings import Grid, LossSettings
from simmim.method.strategies import MaskSettings
from simmim.tasks.pretrain.model import build_model
from simmim.tasks.pretrain.recipe import PretrainData, PretrainEncoderSettings, PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainModule
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
    mask: MaskSettings = field(default_factory=MaskSettings)
    """The mask."""
    loss: LossSettings = field(default_factory=LossSettings)
    """The prediction target and the loss."""
    patch_size: int = 4
    """Side of a patch in pixels."""
    in_channels: int = 3
    """Channels of the images."""
    sizes: tuple[tuple[str, int | float | tuple[int, ...]], ...] = ()
    """Fields of the encoder's settings that override the variant's, with their values."""
    device: Device = "cuda"
    """Kind of device, whose kernels and rules of autocast are counted."""
    optimizer: bool = True
    """Whether the step includes AdamW; else forward and backward only."""
    compiled: bool = False
    """Whether the encoder's blocks are compiled."""

    @property
    def recipe(self) -> PretrainRecipe:
        """A pretraining that takes this step; its images are nowhere."""
        return PretrainRecipe(
            task="pretrain",
            encoder=PretrainEncoderSettings(
                variant=self.variant,  # type: ignore[arg-type]
                window_size=self.window_size,
                patch_size=self.patch_size,
                in_channels=self.in_channels,
                **dict(self.sizes),  # type: ignore[arg-type]
            ),
            data=PretrainData(
                shards="nowhere",
                image_size=self.image_size,
                mean=(0.5,) * self.in_channels,
                std=(0.25,) * self.in_channels,
            ),
            mask=self.mask,
            loss=self.loss,
            training=TrainingSettings(
                batch_size=self.batch, steps=1, optimizer=OptimizerSettings(lr=1e-4)
            ),
        )


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
    compiled: bool
    """Whether the encoder's blocks were compiled."""
    meter: str
    """How it was measured."""


@cache
def _fake_mode() -> AbstractContextManager[Any]:
    """Return the one fake mode of this process, which the encoder's cached tables belong to."""
    return fake_tensor_mode()


def simulate(case: StepCase) -> Simulation:
    """Run the step on fake tensors, which have sizes but no values, and track live memory.

    Whatever the mask, all patches are decoded: that is the most that a mask can ask for. Compiled
    blocks allocate what their graphs do, and are not compiled.
    """
    case = replace(case, loss=replace(case.loss, area="all"))
    peaks: list[Peak] = []
    finished = 0
    rules = cuda_rules() if case.device == "cuda" else contextlib.nullcontext()
    with torch.device("meta"):
        module = build_module(case)
    if case.compiled:
        count_compiled_blocks(module.model.encoder)
    with fresh_accelerate_state(), _fake_mode(), LiveBytes() as live, only_two_groups(), rules:
        accelerator = build_accelerator(case, torch.device("cpu"))
        materialise(module, torch.device("cpu"))
        weights = live.now
        rows, columns = mask_grid(case)
        batch = batch_of(case, torch.ones(case.batch, rows, columns, dtype=torch.bool))

        def close() -> None:
            peaks.append(Peak(gradients=finished, activations=live.most - weights))
            live.most = live.now

        def finish(parameter: Tensor) -> None:
            nonlocal finished
            close()
            finished += parameter.numel()
            parameter.grad = None

        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(finish)  # type: ignore[no-untyped-call]
        prepared = accelerator.prepare(module, device_placement=[False])  # it is there
        accumulate_gradients(accelerator, prepared, [batch], lambda _: None)
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
    encoder before it keeps what torch loads on first use out of the measurement. On a CPU, where
    compiling takes minutes and training does not do it by default, blocks are eager.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = replace(case, compiled=case.compiled and device.type == "cuda")
    with fresh_accelerate_state():
        take_step(smallest(case), device)
        before = _peak_of_process()
        seconds = take_step(case, device)
    if device.type == "cuda":
        peak, meter = torch.cuda.max_memory_allocated(), "torch.cuda.max_memory_allocated"
    else:
        peak, meter = _peak_of_process() - before, "peak resident memory"
    return Measurement(peak=peak, seconds=seconds, meter=meter, compiled=case.compiled)


def smallest(case: StepCase) -> StepCase:
    """Return a step like this one of one image and a very small encoder."""
    sizes = (("embed_dim", 8), ("depths", (2, 1)), ("num_heads", (1, 2)))
    return replace(
        case,
        variant="tiny",
        image_size=64,
        window_size=4,
        patch_size=4,
        sizes=sizes,
        mask=MaskSettings(),
        loss=LossSettings(),
        batch=1,
        compiled=False,
    )


def take_step(case: StepCase, device: torch.device) -> float:
    """Run a step of training, with AdamW if the case includes it, and return its seconds.

    Raises:
        ValueError: a gradient is missing or not finite.
    """
    accelerator = build_accelerator(case, device)
    pretraining = build_module(case).to(device)
    if case.compiled:
        pretraining.model.encoder.compile_blocks()
    module = accelerator.prepare(pretraining)
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda" or None)
    if case.optimizer:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    batch = draw_batch(case)
    missing: list[bool] = []

    def look_at_gradients() -> None:
        missing.extend(parameter.grad is None for parameter in parameters)

    def step() -> Tensor:
        if case.optimizer:
            loss, _ = training_step(
                accelerator,
                module,
                optimizer,
                [batch],
                clip_norm=case.recipe.training.clip_norm,
                normalisers=lambda _: None,
                before_update=look_at_gradients,
            )
        else:
            loss = accumulate_gradients(accelerator, module, [batch], lambda _: None)
            look_at_gradients()
        return loss

    if case.compiled:  # the first step compiles, which takes memory of its own
        step()
        optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    loss = step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    if any(missing) or not bool(loss.isfinite()):
        raise ValueError("a gradient is missing or not finite.")
    return seconds


def build_accelerator(case: StepCase, device: torch.device) -> Accelerator:
    """Build an accelerator for the precision of a step.

    Unlike that of training it lets the allocator return freed memory, which is measured.
    """
    precision = "no" if case.precision == "fp32" else "bf16"
    return Accelerator(cpu=device.type == "cpu", mixed_precision=precision)


def build_module(case: StepCase) -> PretrainModule:
    """Build the module of a step on the current device, in training mode; blocks are eager."""
    recipe = case.recipe
    model = build_model(recipe)
    model.encoder.set_execution(attention=case.attention, checkpointing=case.checkpointing)
    if case.precision == "bf16-weights":
        model = model.to(torch.bfloat16)
    return PretrainModule(model, recipe.data, seed=recipe.training.seed).train()


def draw_batch(case: StepCase) -> Batch:
    """Return a batch of stored images of noise, with masks of the recipe; see `batch_of`."""
    mask = case.mask
    return batch_of(case, draw_masks(mask.chosen, case.batch, mask_grid(case), mask.ratio))


def mask_grid(case: StepCase) -> Grid:
    """Return the rows and columns of mask cells of an image."""
    return case.mask.grid((case.image_size, case.image_size), case.patch_size)


def batch_of(case: StepCase, masks: Tensor) -> Batch:
    """Return a batch of stored images of noise, half of them to be flipped.

    Args:
        case: the step.
        masks: mask of each image, bool (batch, rows, columns).
    """
    shape = (case.batch, case.image_size, case.image_size, case.in_channels)
    return Batch(
        images=torch.randint(256, shape, dtype=torch.uint8).permute(0, 3, 1, 2),
        masks=masks,
        labels=None,
        addresses=torch.zeros(case.batch, 3, dtype=torch.int64),
        flips=torch.arange(case.batch) % 2 == 0,
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
    for case in adapter(list[StepCase]).validate_json(sys.stdin.read()):
        answer = simulate(case) if action == "simulate" else measure(case)
        sys.stdout.write(json.dumps(asdict(answer)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
