"""Forward and backward pass of SimMIM with our encoder or a peer's, as its users would write it.

`step.py` runs it as a subprocess: it prints "ready", then answers each line on standard input with
a line of JSON. "step" runs a step and returns seconds, "products" multiplies matrices and returns
operations per second; "peak" returns the memory in bytes that a step adds to what the process, or
the GPU, used before the model was built.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from stand_in import import_with_stand_in
from torch import Tensor, nn

from simmim import SimMIM
from simmim.engine.devices import keep_freed_memory
from swinv2 import SwinV2, build_encoder
from swinv2.bridges.timm import timm_arguments
from swinv2.bridges.transformers_layout import transformers_config

SIDES = {"cpu": 1024, "cuda": 8192}
"""Side of the matrices that measure the limit."""
PRODUCTS = 16
"""Matrix products per measurement: about the operations of a step of a few images."""
WARM_UP = {"cpu": 1, "cuda": 5}
"""Untimed first steps: they compile, choose kernels and fill caches."""

Step = Callable[[], None]


class TimmSimMIM(nn.Module):
    """SimMIM on timm's encoder, following the published SimMIM code."""

    def __init__(self, encoder: nn.Module, stride: int, channels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, encoder.embed_dim))
        self.decoder = nn.Sequential(
            nn.Conv2d(encoder.num_features, stride**2 * channels, kernel_size=1),
            nn.PixelShuffle(stride),
        )

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        tokens = self.encoder.patch_embed(images)
        hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[..., None].type_as(tokens)
        tokens = tokens * (1 - hidden) + self.mask_token * hidden
        features = self.encoder.norm(self.encoder.layers(tokens)).permute(0, 3, 1, 2)
        pixels = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None].float()
        loss = F.l1_loss(self.decoder(features), images, reduction="none")
        return (loss * pixels).sum() / (pixels.sum() + 1e-5) / images.shape[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("contestant", choices=["ours", "checkpointed", "timm", "transformers"])
    parser.add_argument("--variant", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--window", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--precision", choices=["f32", "bf16"], required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64
    on_gpu = options.device == "cuda"
    baseline = 0.0 if on_gpu else memory("VmRSS")
    step = build(options)
    with torch.random.fork_rng():
        for _ in range(WARM_UP[options.device]):
            step()
    keep_freed_memory()  # as training does; the same for all contestants
    products = matrix_products(options.precision, options.device)
    operations = PRODUCTS * 2 * SIDES[options.device] ** 3
    # CPU time on one thread: less sensitive to other load than wall time.
    clock = time.process_time if options.threads == 1 and not on_gpu else time.perf_counter
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        match line.strip():
            case "step" if on_gpu:
                step()  # allocates the memory
                answer = timed(step, clock)
                torch.cuda.empty_cache()  # the other contestants need it
            case "step":
                answer = timed(step, clock)
            case "products":
                answer = operations / timed(products, clock)
            case _ if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                step()
                answer = float(torch.cuda.max_memory_allocated())
            case _:
                Path("/proc/self/clear_refs").write_text("5")  # reset the peak
                step()
                answer = memory("VmHWM") - baseline
        print(json.dumps(answer), flush=True)


def build(options: argparse.Namespace) -> Step:
    torch.manual_seed(0)
    torch.set_default_device(options.device)
    encoder = build_encoder(options.variant, image_size=options.size, window_size=options.window)
    cells = options.size // 32
    images = torch.randn(options.batch, 3, options.size, options.size)
    hidden = (torch.arange(cells**2) < round(0.6 * cells**2)).view(cells, cells)
    mask = hidden.expand(options.batch, cells, cells)
    build_loss = {
        "ours": our_loss,
        "checkpointed": checkpointed_loss,
        "timm": timm_loss,
        "transformers": transformers_loss,
    }[options.contestant]
    model, loss = build_loss(encoder, images, mask, options.compile)
    autocast = torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16")

    def step() -> None:
        model.zero_grad()
        with autocast:
            value = loss()
        value.backward()

    return step


Built = tuple[nn.Module, Callable[[], Tensor]]


def our_loss(encoder: SwinV2, images: Tensor, mask: Tensor, compiled: bool) -> Built:
    model = SimMIM(encoder).train()
    if compiled:
        encoder.compile_blocks()
    return model, lambda: model(images, mask).loss


def checkpointed_loss(encoder: SwinV2, images: Tensor, mask: Tensor, compiled: bool) -> Built:
    encoder.set_execution(checkpointing="full")
    return our_loss(encoder, images, mask, compiled)


def timm_loss(encoder: SwinV2, images: Tensor, mask: Tensor, compiled: bool) -> Built:
    timm: Any = import_with_stand_in("timm")
    name, arguments = timm_arguments(encoder)
    model = TimmSimMIM(timm.create_model(name, num_classes=0, **arguments), 32, 3).train()
    if compiled:
        for layer in model.encoder.layers:
            for block in layer.blocks:
                block.compile(dynamic=False)
    return model, lambda: model(images, mask)


def transformers_loss(encoder: SwinV2, images: Tensor, mask: Tensor, compiled: bool) -> Built:
    import transformers

    config = transformers.Swinv2Config(**transformers_config(encoder))
    model = transformers.Swinv2ForMaskedImageModeling(config).train()
    hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).flatten(1)
    if compiled:
        for layer in model.swinv2.encoder.layers:
            for block in layer.blocks:
                block.compile(dynamic=False)
    return model, lambda: model(images, bool_masked_pos=hidden).loss


def matrix_products(precision: str, device: str) -> Step:
    left, right = torch.randn(2, SIDES[device], SIDES[device]).to(
        torch.bfloat16 if precision == "bf16" else torch.float32
    )

    def multiply() -> None:
        for _ in range(PRODUCTS):
            torch.mm(left, right)

    return multiply


def timed(run: Step, clock: Callable[[], float]) -> float:
    """Return the seconds that a run takes, waiting for the GPU if there is one."""
    before = clock()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock() - before


def memory(what: str) -> int:
    """Return a field of /proc/self/status in bytes, for example VmRSS."""
    with contextlib.suppress(FileNotFoundError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) * 1024
    raise SystemExit("memory is only measured on Linux (it is read from /proc)")


if __name__ == "__main__":
    main()
