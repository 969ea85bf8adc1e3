"""Time a SimMIM step, forward and backward, on one CPU thread, next to transformers' Swinv2.

    OMP_NUM_THREADS=1 python tests/benchmarks/step.py --variants tiny base --precisions f32 bf16

Every repeat runs each contestant once, and the matrix products that the limit is measured by. Time
is what the processor spent on this process, which other processes disturb less than the clock. The
limit is the rate of a square product (torch.mm, and oneDNN's where PyTorch has it) divided by the
operations of a step; work that a contestant adds, such as computing scores again, is not counted.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from simmim import SimMIM
from swinv2 import SwinV2, build_encoder
from swinv2.bridges.transformers import transformers_config

IMAGE, WINDOW, SIDE = 192, 12, 1024
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variants", nargs="+", default=["tiny", "base"])
    parser.add_argument("--precisions", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--paths", nargs="+", default=["auto", "explicit", "sdpa"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for variant in options.variants:
        for precision in options.precisions:
            compare(variant, precision, options.batch, options.repeats, options.paths)


def compare(variant: str, precision: str, batch: int, repeats: int, paths: list[str]) -> None:
    encoder = build_encoder(variant, image_size=IMAGE, window_size=WINDOW)
    images = torch.randn(batch, 3, IMAGE, IMAGE)
    mask = (torch.arange(36) < 22).view(6, 6).expand(batch, 6, 6)
    peer = peer_step(encoder, images, mask)
    with FlopCounterMode(display=False) as counter:
        peer()
    operations = counter.get_total_flops() / batch
    contestants = {"transformers": peer}
    model = SimMIM(encoder).train()
    for path in paths:
        contestants[f"ours, {path}"] = our_step(model, path, images, mask)
    products = matrix_products(DTYPES[precision])

    seconds: dict[str, list[float]] = {name: [] for name in [*contestants, *products]}
    for repeat in range(repeats + 1):
        for name, run in [*contestants.items(), *products.items()]:
            with autocast(precision) if name in contestants else contextlib.nullcontext():
                spent = timed(run)
            if repeat:
                seconds[name].append(spent)
    median = {name: statistics.median(spent) for name, spent in seconds.items()}
    rates = {name: 2 * SIDE**3 / median[name] for name in products}
    print(f"\n{variant} {precision}: {operations / 1e9:.1f} GFLOP an image, batch {batch}")
    print("".join(f"  {name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()))
    for name in contestants:
        speed = batch / median[name]
        shares = ", ".join(f"{speed * operations / rate:.0%} of {of}" for of, rate in rates.items())
        ratio = median["transformers"] / median[name]
        print(f"  {name:16} {speed:6.2f} images/s  x{ratio:.2f}  {shares}", flush=True)


def timed(run: Callable[[], Any]) -> float:
    before = time.process_time()
    run()
    return time.process_time() - before


def autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def our_step(model: SimMIM, path: str, images: Tensor, mask: Tensor) -> Callable[[], None]:
    def step() -> None:
        model.encoder.set_execution(attention=path)
        model.zero_grad()
        backward(model(images, mask).loss)

    return step


def peer_step(encoder: SwinV2, images: Tensor, mask: Tensor) -> Callable[[], None]:
    import transformers

    config = transformers.Swinv2Config(**transformers_config(encoder))
    model = transformers.Swinv2ForMaskedImageModeling(config).train()
    hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).flatten(1)

    def step() -> None:
        model.zero_grad()
        backward(model(images, bool_masked_pos=hidden).loss)

    return step


def backward(loss: Tensor) -> None:
    with torch.autocast("cpu", enabled=False):
        loss.backward()


def matrix_products(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    left, right = torch.randn(2, SIDE, SIDE).to(dtype)
    products: dict[str, Callable[[], Any]] = {"torch.mm": lambda: torch.mm(left, right)}
    if torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._linear_pointwise
        products["oneDNN"] = lambda: onednn(left, right, None, "none", [], "")
    return products


if __name__ == "__main__":
    main()
