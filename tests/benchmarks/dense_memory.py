"""Measure memory and time of a forward and backward pass of UperNet on an encoder.

python tests/benchmarks/dense_memory.py --variant tiny --size 1536 --window 32
"""

import argparse
import resource
import time

import torch

from simmim.data.transforms.image_transforms import ClassMap
from simmim.tasks.segmentation.heads import build_segmenter
from simmim.tasks.segmentation.recipe import SegmentationHead
from swinv2 import build_encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", default="tiny")
    parser.add_argument("--size", type=int, default=1536)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--checkpointing", default="full", choices=("none", "attention", "full"))
    arguments = parser.parse_args()
    encoder = build_encoder(
        arguments.variant, image_size=arguments.size, window_size=arguments.window
    )
    names = [str(number) for number in range(arguments.classes)]
    model = build_segmenter(encoder, names, SegmentationHead()).train()
    model.backbone.encoder.set_execution(
        attention=("sequential", "sequential", "auto", "auto"),
        checkpointing=arguments.checkpointing,
    )
    images = torch.randn(1, 3, arguments.size, arguments.size)
    classes = torch.randint(0, arguments.classes, images.shape[-2:], dtype=torch.uint8)
    targets = [ClassMap.of(classes)]
    before, began = _peak(), time.perf_counter()
    loss = model.loss(images, targets, seeds=[0], normalisers=model.normalisers(targets))
    forward = time.perf_counter() - began
    loss.backward()
    total = time.perf_counter() - began
    print(
        f"{arguments.variant} with UperNet, {arguments.size}/{arguments.window}, checkpointing "
        f"{arguments.checkpointing}, 1 image: loss {loss.item():.3f}, forward {forward:.0f} s, "
        f"forward and backward {total:.0f} s, peak memory of the process {_peak():.2f} GiB "
        f"(before: {before:.2f} GiB)"
    )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
