"""The self-test: the encoder computes on this device what it computes on a CPU, and only that."""

import copy
import gc
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, get_args

import torch
from torch import Tensor

from simmim.bench.compiled_blocks import count_compiled_blocks
from simmim.bench.gpu.cells import CheckFailed, Values
from simmim.bench.gpu.gradients import adamw, assign_gradients
from simmim.bench.gpu.scale import Precision, Scale, Size
from simmim.bench.gpu.training import require_pipeline
from simmim.bench.live_bytes import LiveBytes, materialise, only_two_groups
from simmim.compat import fake_tensor_mode
from simmim.engine.generators import seeded
from simmim.method.model import SimMIM
from swinv2 import SwinV2, build_encoder
from swinv2.config import AttentionPath

PATHS: tuple[AttentionPath, ...] = get_args(AttentionPath)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
"""Largest relative error of features, by the precision of autocast; float32 is without TF32."""
MEMORY_TOLERANCE = 0.05
"""Largest relative difference between counted and measured memory."""
WARM_UP_STEPS = 3
"""First steps, which compile, allocate and make tables."""
ROUNDING = 3
"""How much larger the error of gradients may be: rounding adds up on the way back."""


def build_moving_encoder(**sizes: Any) -> SwinV2:
    """Build an encoder whose blocks do something: norms of fresh ones are zero."""
    generator = torch.Generator().manual_seed(0)
    with seeded(0):
        encoder = build_encoder("tiny", **sizes)
    for name, parameter in encoder.named_parameters():
        if "norm" in name:
            parameter.data += 0.5 * torch.rand(parameter.shape, generator=generator)
    return encoder


def images_of(size: Size) -> Tensor:
    """Return two images of noise, the same in each call."""
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def features_and_gradients(encoder: SwinV2, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features, and the gradients of all weights in a row."""
    features = encoder(images)
    assign_gradients(features.float().square().mean(), encoder.parameters())
    gradients = [
        weight.grad.flatten() for weight in encoder.parameters() if weight.grad is not None
    ]
    return features.detach(), torch.cat(gradients).detach()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of the expected, which is on the CPU."""
    return float((found.double().cpu() - expected).norm() / expected.norm())


@lru_cache(maxsize=8)
def _exact(sizes: tuple[tuple[str, Any], ...], images: Size) -> tuple[Tensor, Tensor]:
    encoder = build_moving_encoder(**dict(sizes)).double()
    return features_and_gradients(encoder, images_of(images).double())


def check_agreement(
    scale: Scale, path: AttentionPath, precision: Precision, *, compiled: bool
) -> Values:
    """Compare features and gradients with those of the CPU in double precision.

    Raises:
        CheckFailed: they differ by more than rounding explains.
    """
    dtype, tolerance = TYPES[precision], TOLERANCES[precision]
    ours = build_moving_encoder(**scale.encoder).to(scale.device)
    ours.set_execution(attention=path)
    found: dict[str, float] = {}
    with quiet_compiler():
        for name, size in scale.images.items():
            if compiled and name not in scale.compiled_images:
                continue
            encoder = copy.deepcopy(ours)
            if compiled:
                torch.compiler.reset()
                encoder.compile_blocks(backend=scale.backend)
            images = images_of(size).to(scale.device)
            exact = _exact(tuple(sorted(scale.encoder.items())), size)
            with torch.autocast(scale.torch_device.type, dtype, enabled=precision != "fp32"):
                features, gradients = features_and_gradients(encoder, images)
            found[f"{name} features"] = relative_error(features, exact[0])
            found[f"{name} gradients"] = relative_error(gradients, exact[1])
    wrong = [
        f"{name} {error:.2g}"
        for name, error in found.items()
        # NaN is not below the tolerance either.
        if not error <= tolerance * (ROUNDING if name.endswith("gradients") else 1)
    ]
    if wrong:
        raise CheckFailed(f"relative errors beyond {tolerance:g}: {', '.join(wrong)}", found)
    return found


@contextmanager
def quiet_compiler() -> Iterator[None]:
    """Silence the compiler's warnings, on which nothing here depends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_quiet_steps(scale: Scale) -> Values:
    """Take training steps, eager and compiled, in which nothing may wait for the device.

    Raises:
        Skipped: packages of the pipeline, whose step it is, are missing.
        CheckFailed: a loss is not finite.
    """
    require_pipeline()
    found: dict[str, Any] = {"steps": scale.quiet_steps}
    for compiled in (False, True):
        with quiet_compiler():
            losses = _quiet_losses(scale, compiled=compiled)
        mode = "compiled" if compiled else "eager"
        found |= {f"{mode}, first loss": losses[0], f"{mode}, last loss": losses[-1]}
        if not all(map(math.isfinite, losses)):
            raise CheckFailed("a loss is not finite", found)
    return found


def _quiet_losses(scale: Scale, *, compiled: bool) -> list[float]:
    """Return the losses of the engine's steps; waiting for the device in any but a few raises."""
    # Of the pipeline, which is there.
    from simmim.bench.step import StepCase, build_module, draw_batch  # noqa: PLC0415
    from simmim.engine.devices import build_accelerator, own_process_state  # noqa: PLC0415
    from simmim.engine.loop import training_step  # noqa: PLC0415
    from simmim.method.strategies import MaskSettings  # noqa: PLC0415

    device, sizes = scale.torch_device, dict(scale.encoder)
    side = sizes.pop("image_size")
    case = StepCase(
        variant="tiny",
        image_size=side,
        window_size=sizes.pop("window_size"),
        attention="auto",
        checkpointing="none",
        precision="bf16",
        batch=2,
        mask=MaskSettings(cell=side // 2),
        sizes=(*sizes.items(), ("drop_path", 0.1)),
    )
    training = build_module(case).to(device)
    if compiled:
        training.model.encoder.compile_blocks(backend=scale.backend)
    batch = draw_batch(case)
    if device.type == "cuda":
        batch = batch.pin_memory()

    with own_process_state():
        accelerator = build_accelerator("bf16")
        module = accelerator.prepare(training)
        optimizer = accelerator.prepare(adamw(training, device))

        def step() -> Tensor:
            loss, _ = training_step(
                accelerator, module, optimizer, [batch], clip_norm=5.0, normalisers=lambda _: None
            )
            return loss

        losses = [step() for _ in range(WARM_UP_STEPS)]
        with no_waiting(device):
            losses += [step() for _ in range(scale.quiet_steps)]
        return [float(loss) for loss in losses]


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Raise wherever something waits for a GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _inputs(model: SimMIM[SwinV2], batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return images of noise on the device, and masks on the host, as training has them."""
    config = model.encoder.config
    images = torch.randn(batch, config.in_channels, *config.image_size, device=device)
    rows, columns = (side // model.mask_cell for side in config.image_size)
    hidden = torch.arange(rows * columns).view(rows, columns) % 5 < 3
    return images, hidden.repeat(batch, 1, 1)


def check_memory(scale: Scale) -> Values:
    """Compare the peak of training steps with the count of their tensors: eager, then compiled.

    Raises:
        CheckFailed: they differ by more than the tolerance.
    """
    size, batch = scale.steps[0], min(16, scale.largest_batch)
    found: dict[str, Any] = {"step": str(size), "batch": batch}
    for compiled in (False, True):
        mode = "compiled" if compiled else "eager"
        with quiet_compiler():
            counted = counted_peak(scale, batch, compiled=compiled)
            found[f"{mode}, counted GiB"] = counted / 2**30
            if scale.torch_device.type != "cuda":
                found[f"{mode}, measured GiB"] = None
                continue
            measured = _measured_peak(scale, batch, compiled=compiled)
        ratio = measured / counted
        found |= {f"{mode}, measured GiB": measured / 2**30, f"{mode}, ratio": ratio}
        if abs(ratio - 1) > MEMORY_TOLERANCE:
            raise CheckFailed(
                f"a step of {mode} blocks takes {ratio:.3f} of the counted memory: more than "
                f"{MEMORY_TOLERANCE:.0%} apart",
                found,
            )
    return found


def counted_peak(scale: Scale, batch: int, *, compiled: bool) -> int:
    """Return the bytes of all tensors at the peak of a training step, counted on fake ones."""
    device = scale.torch_device
    with torch.device("meta"):
        model = _model_of_step(scale)
    if compiled:
        count_compiled_blocks(model.encoder)
    with fake_tensor_mode(), LiveBytes() as live, only_two_groups():
        materialise(model, device)
        states = [torch.zeros_like(weight) for weight in model.parameters() for _ in range(2)]
        _compute_gradients(model, batch, device)
    del states
    return live.most


def _measured_peak(scale: Scale, batch: int, *, compiled: bool) -> int:
    """Return the peak bytes of a training step on a GPU, without what was there before."""
    device = scale.torch_device
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = _model_of_step(scale).to(device)
    if compiled:
        model.encoder.compile_blocks(backend=scale.backend)
    optimizer = adamw(model, device)
    for _ in range(2):  # the first compiles, and allocates the optimiser's state
        torch.cuda.reset_peak_memory_stats()
        _compute_gradients(model, batch, device)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated() - before


def _model_of_step(scale: Scale) -> SimMIM[SwinV2]:
    size = scale.steps[0]
    encoder = build_encoder(
        size.variant,
        image_size=size.image_size,
        window_size=size.window_size,
        **scale.overrides,
    )
    # With all pixels in the loss no shape depends on the mask's values.
    return SimMIM(encoder, loss_area="all").train()


def _compute_gradients(model: SimMIM[SwinV2], batch: int, device: torch.device) -> None:
    images, mask = _inputs(model, batch, device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = model(images, mask).loss
    assign_gradients(loss, model.parameters())
