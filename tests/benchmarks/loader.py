"""Measure the throughput of data loaders on the same photographs: ours and its peers, in one run.

    data-prep shard photos.zip shards/photos --samples-per-shard 40
    OMP_NUM_THREADS=1 python tests/benchmarks/loader.py shards/photos

Peers: a stock WebDataset pipeline and an image folder with a DataLoader, both decoding with Pillow,
with a bicubic RandomResizedCrop, normalised to float32 in the worker. The bound is libjpeg-turbo
(in C) decoding the same bytes, and nothing else. Repeats are interleaved, so that all contestants
see the same other load, and medians are compared. Loaders never end: before each measurement the
batches prefetched while they were idle are consumed.
"""

import argparse
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import simplejpeg
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from simmim.data.datasets.shards import ShardSet
from simmim.data.loader.batches import TrainingBatches
from simmim.data.order.order import SampleOrder, slots_for
from simmim.data.settings import IMAGENET_MEAN, IMAGENET_STD
from simmim.data.transforms.cropping import random_box, resize
from simmim.data.transforms.decoding import decode_pixels
from simmim.data.transforms.image_transforms import TrainTransform
from simmim.data.transforms.settings import RandomCropSettings
from simmim.method.masking import MaskGenerator

SIZE = 192
SCALE, RATIO = (0.67, 1.0), (3 / 4, 4 / 3)
BATCH = 32
PREFETCH = 2
MEAN, STD = (torch.tensor(part).view(3, 1, 1) for part in (IMAGENET_MEAN, IMAGENET_STD))


class StockTransform:
    """RandomResizedCrop, flip, ToTensor and Normalize as in torchvision, with Pillow."""

    def __call__(self, image: Image.Image) -> Tensor:
        rng = np.random.default_rng()
        top, left, height, width = random_box(
            (image.height, image.width), rng, scale=SCALE, ratio=RATIO
        )
        box = (left, top, left + width, top + height)
        resized = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
        if rng.random() < 0.5:
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
        return (pixels.to(torch.float32).div(255) - MEAN) / STD


class ImageFolder(Dataset[Tensor]):
    """Image files in a folder, opened and decoded by Pillow."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())
        self.transform = StockTransform()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> Tensor:
        with self.paths[place].open("rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


def stock_webdataset(shards: ShardSet, workers: int) -> Iterator[Any]:
    urls = [str(shards.folder / entry.name) for entry in shards.manifest.shards]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls))
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;jpeg;png;webp")
        .map_tuple(StockTransform())
        .batched(BATCH)
        .repeat()
    )
    loader = webdataset.WebLoader(
        dataset, batch_size=None, num_workers=workers, prefetch_factor=PREFETCH
    )
    return (batch[0] for batch in loader)


def image_folder(folder: Path, workers: int) -> Iterator[Any]:
    dataset = ImageFolder(folder)
    sampler = RandomSampler(dataset, replacement=True, num_samples=10**9)
    loader = DataLoader(
        dataset, BATCH, sampler=sampler, num_workers=workers, prefetch_factor=PREFETCH
    )
    return iter(loader)


def ours(shards: ShardSet, workers: int) -> Iterator[Any]:
    slots = slots_for(BATCH, shards.samples)
    batches = TrainingBatches(
        shards,
        SampleOrder(shards.sizes, seed=0, slots=slots),
        our_transform(),
        batch_size=BATCH,
        start_position=0,
        end_position=BATCH * 10**7,
        workers=workers,
        prefetch=PREFETCH,
    )
    return (batch.images for batch in batches)


def our_transform() -> TrainTransform:
    mask = MaskGenerator(grid=(SIZE // 32, SIZE // 32), ratio=0.6)
    crop = RandomCropSettings(image_size=SIZE, scale=SCALE, ratio=RATIO)
    return TrainTransform(data=crop, seed=0, mask=mask)


@dataclass(kw_only=True)
class Contestant:
    """A running loader and its measurements."""

    name: str
    workers: int
    batches: Iterator[Any]
    processes: set[psutil.Process] = field(default_factory=set)
    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    """CPU seconds of all workers per image."""

    def measure(self, images: int) -> None:
        """Measure the throughput over `images` images, starting and ending with idle workers."""
        used, ahead = processor_seconds(self.processes), 0
        for _ in range(PREFETCH * self.workers + 1):
            ahead += len(next(self.batches))
        count, began = 0, time.perf_counter()
        while count < images:
            count += len(next(self.batches))
        self.rates.append(count / (time.perf_counter() - began))
        settle(self.processes)
        self.costs.append((processor_seconds(self.processes) - used) / (ahead + count))

    def memory(self) -> float:
        """Return the private memory (USS) of a worker in MiB, averaged over the workers."""
        sizes = [process.memory_full_info().uss for process in self.processes]
        return statistics.mean(sizes) / 2**20


def processor_seconds(processes: set[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def settle(processes: set[psutil.Process]) -> None:
    """Wait until all workers have filled their prefetch queue and are idle."""
    before, used = -1.0, 0.0
    while used - before > 0.02:
        time.sleep(0.3)
        before, used = used, processor_seconds(processes)


def start(name: str, workers: int, make: Callable[[int], Iterator[Any]]) -> Contestant:
    before = set(psutil.Process().children())
    batches = make(workers)
    next(batches)
    started = set(psutil.Process().children()) - before
    return Contestant(name=name, workers=workers, batches=batches, processes=started)


def bound_rate(files: list[bytes]) -> float:
    """Return the images per second that libjpeg-turbo decodes in one thread."""
    began = time.perf_counter()
    for data in files:
        simplejpeg.decode_jpeg(data)
    return len(files) / (time.perf_counter() - began)


def cpu_seconds(work: Callable[[], int], repeats: int) -> float:
    """Return CPU seconds per image, the minimum over the repeats."""
    work()
    found = []
    for _ in range(repeats):
        began = time.process_time()
        count = work()
        found.append((time.process_time() - began) / count)
    return min(found)


def decode_all(files: list[bytes]) -> int:
    for data in files:
        simplejpeg.decode_jpeg(data)
    return len(files)


def take(batches: Iterator[Any], images: int) -> int:
    count = 0
    while count < images:
        count += len(next(batches))
    return count


def fidelity(files: list[bytes]) -> dict[str, np.ndarray]:
    """Return the PSNR in dB of each crop against an exact resize, for ours and Pillow's."""
    found: dict[str, list[float]] = {"ours": [], "Pillow": []}
    for number, data in enumerate(files):
        pixels = decode_pixels(data, "jpg").pixels
        box = random_box(pixels.shape, np.random.default_rng(number), scale=SCALE, ratio=RATIO)
        top, left, height, width = box
        part = torch.from_numpy(pixels[top : top + height, left : left + width].copy())
        planes = part.permute(2, 0, 1)[None].to(torch.float64)
        exact = F.interpolate(planes, (SIZE, SIZE), mode="bicubic", antialias=True)[0].clamp(0, 255)
        image = Image.fromarray(pixels)
        corners = (left, top, left + width, top + height)
        by_pillow = np.array(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=corners))
        crops = {
            "ours": resize(pixels, box, (SIZE, SIZE)),
            "Pillow": torch.from_numpy(by_pillow).permute(2, 0, 1),
        }
        for name, crop in crops.items():
            error = float((crop.to(torch.float64) - exact).square().mean())
            found[name].append(10 * math.log10(255**2 / max(error, 1e-12)))
    return {name: np.array(values) for name, values in found.items()}


def report(contestants: list[Contestant], bound: list[float]) -> None:
    median = {(one.name, one.workers): statistics.median(one.rates) for one in contestants}
    limit = statistics.median(bound)
    print(f"\nbound (libjpeg-turbo alone, one thread): {limit:.0f} images/s")
    print("µs: CPU time of all workers per image; MiB: private memory per worker")
    print("| loader | workers | images/s | to stock | of the bound | to one worker | µs | MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for one in contestants:
        rate = median[one.name, one.workers]
        print(
            f"| {one.name} | {one.workers} | {rate:.0f}"
            f" | {rate / median['stock webdataset', one.workers]:.2f}"
            f" | {rate / limit / one.workers:.0%}"
            f" | {rate / median.get((one.name, 1), math.nan):.2f}"
            f" | {1e6 * statistics.median(one.costs):.0f} | {one.memory():.0f} |"
        )


def report_cpu_time(shards: ShardSet, files: list[bytes], repeats: int) -> None:
    """Print CPU time per image in a single process, which is less sensitive to other load."""
    alone = ours(shards, 0)
    costs = {
        "bound": cpu_seconds(lambda: decode_all(files), repeats),
        "ours": cpu_seconds(lambda: take(alone, len(files)), repeats),
    }
    print(
        f"CPU time per image, no workers: bound {1e6 * costs['bound']:.0f} µs,"
        f" ours {1e6 * costs['ours']:.0f} µs: {costs['bound'] / costs['ours']:.0%} of the bound"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shards", type=Path, help="folder of shards with JPEG photographs")
    parser.add_argument("--images", type=int, default=640, help="images per measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--processor-only", action="store_true", help="no workers, no peers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shards = ShardSet(options.shards)
    places = [(shard, row) for shard, size in enumerate(shards.sizes) for row in range(size)]
    samples = [shards.read(*place) for place in places]
    samples = [sample for sample in samples if sample.extension in ("jpg", "jpeg")]
    files = [sample.image for sample in samples]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch"
        f" {torch.__version__}; {len(files)} photographs, mean size"
        f" {np.mean([*map(len, files)]):,.0f} bytes"
    )
    for name, values in fidelity(files).items():
        low = np.percentile(values, 1)
        print(
            f"PSNR against an exact resize, {name}: mean {values.mean():.1f} dB,"
            f" 1st percentile {low:.1f} dB"
        )
    report_cpu_time(shards, files, options.repeats)
    if options.processor_only:
        return
    with tempfile.TemporaryDirectory() as folder:
        for number, sample in enumerate(samples):
            (Path(folder) / f"{number:06d}.jpg").write_bytes(sample.image)
        makers: dict[str, Callable[[int], Iterator[Any]]] = {
            "stock webdataset": lambda workers: stock_webdataset(shards, workers),
            "image folder": lambda workers: image_folder(Path(folder), workers),
            "ours": lambda workers: ours(shards, workers),
        }
        running = [
            start(name, workers, make)
            for workers in options.workers
            for name, make in makers.items()
        ]
        for one in running:
            settle(one.processes)
        bound = []
        for _ in range(options.repeats):
            bound.append(bound_rate(files))
            for one in running:
                one.measure(options.images)
        report(running, bound)


if __name__ == "__main__":
    main()
