"""Train at window 8, test at larger windows without fine-tuning (paper, table 1), on CIFAR-10.

    OMP_NUM_THREADS=1 nice -n 15 python tests/benchmarks/transfer.py --data cifar10.zip

Three classifiers differ only in the position bias of their encoder: log-spaced coordinates (as in
swinv2), linear coordinates, and a table with one parameter per offset, as in Swin Transformer V1,
interpolated to larger windows as in its published code. They start from the same weights and see
the same images in the same order. Image and window grow together, so that each stage has the same
number of windows at every size; the last stage has one.
"""

import argparse
import statistics
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from simmim.data.order.randomness import numpy_stream, shuffled
from simmim.data.transforms.cropping import center_crop_resize, random_resized_crop
from simmim.data.transforms.decoding import decode_pixels
from simmim.engine.optimizer import (
    OptimizerSettings,
    build_optimizer,
    parameter_groups,
    set_learning_rate,
)
from simmim.engine.schedule import learning_rate
from simmim.engine.settings import ScheduleSettings
from simmim.tasks.classification.classifier import Classifier
from simmim.tasks.features import Normalise
from swinv2 import SwinV2, SwinV2Config
from swinv2.attention import WindowAttention
from swinv2.position_bias import PositionBias, PositionTables, relative_position_index

Kind = Literal["table", "linear", "log-spaced"]
Pair = tuple[int, int]

DATA = Path(__file__).parents[2] / "../shared/data/cifar10.zip"
SIZES = {8: 64, 12: 96, 16: 128, 24: 192}
"""Window in tokens: image size in pixels. The first is the training window."""
ENCODER = SwinV2Config(
    image_size=64, patch_size=4, embed_dim=32, depths=(2, 4), num_heads=(1, 2), window_size=8
)
NORMALISATION = ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
BATCH = 32
OPTIMIZER = OptimizerSettings(lr=2e-3)
SCHEDULE = ScheduleSettings(warmup_steps=200)
CROP_SCALE = (0.4, 1.0)
CLIP_NORM = 5.0


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Images and their class indices, in the order of the class names."""

    images: list[np.ndarray]
    labels: Tensor


class LinearBias(nn.Module):
    """Position bias from the same MLP as the log-spaced one, on linear coordinates.

    Offsets are divided by the largest one in the pretraining window, so that both lie in [-1, 1]
    there.
    """

    def __init__(self, log_spaced: PositionBias) -> None:
        super().__init__()
        self.reference_window = log_spaced.reference_window
        self.expand, self.reduce = log_spaced.expand, log_spaced.reduce

    def tables(self, window: Pair) -> PositionTables:
        """Return the tables for a window; see `PositionBias.tables`."""
        coordinates = linear_coordinates(window, self.reference_window)
        return PositionTables(coordinates, relative_position_index(window, coordinates.device))

    def forward(self, window: Pair, tables: PositionTables | None = None) -> Tensor:
        """Return the bias of a window (height, width), as (heads, queries, keys)."""
        tables = tables or self.tables(window)
        with torch.autocast("cpu", enabled=False):
            hidden = F.relu(self.expand(tables.coordinates))
            return spread(16 * torch.sigmoid(self.reduce(hidden)), tables)


class TableBias(nn.Module):
    """Position bias with one parameter per head and offset (Swin Transformer V1, section 3.2)."""

    def __init__(self, num_heads: int, window: Pair) -> None:
        super().__init__()
        height, width = window
        self.table = nn.Parameter(torch.empty(num_heads, 2 * height - 1, 2 * width - 1))
        nn.init.trunc_normal_(self.table, std=0.02)

    def tables(self, window: Pair) -> PositionTables:
        """Return the tables for a window, which has no coordinates."""
        none = self.table.new_empty(0)
        return PositionTables(none, relative_position_index(window, none.device))

    def forward(self, window: Pair, tables: PositionTables | None = None) -> Tensor:
        """Return the bias of a window (height, width), as (heads, queries, keys)."""
        return spread(interpolated(self.table, window).flatten(1).T, tables or self.tables(window))


def linear_coordinates(window: Pair, reference: Pair) -> Tensor:
    """Return the offsets in a window, ((2h-1)·(2w-1), 2), divided by the reference's largest."""
    rows, columns = (
        torch.arange(1 - side, side) / (reference_side - 1)
        for side, reference_side in zip(window, reference, strict=True)
    )
    return torch.cartesian_prod(rows, columns)


def interpolated(table: Tensor, window: Pair) -> Tensor:
    """Resize (heads, 2h-1, 2w-1) to another window's offsets, as in Swin V1's published code."""
    size = (2 * window[0] - 1, 2 * window[1] - 1)
    if tuple(table.shape[1:]) == size:
        return table
    return F.interpolate(table[None], size=size, mode="bicubic")[0]


def spread(offsets: Tensor, tables: PositionTables) -> Tensor:
    """Expand values per (offset, head) to (head, query, key)."""
    # The backward of an embedding accumulates in a fixed order.
    return F.embedding(tables.pairs, offsets).permute(2, 0, 1)


def build_classifier(kind: Kind, classes: int, seed: int) -> Classifier:
    """Return a new classifier; with the same seed, all kinds share all common weights."""
    torch.manual_seed(seed)
    model = Classifier(SwinV2(ENCODER), classes)
    for module in model.encoder.modules():
        if isinstance(module, WindowAttention):
            bias = module.position_bias
            if kind == "linear":
                module.position_bias = LinearBias(bias)
            elif kind == "table":
                module.position_bias = TableBias(module.num_heads, bias.reference_window)
    return model


def read_images(archive: Path, part: str, *, per_class: int | None = None) -> Labelled:
    """Read `part`/CLASS/NAME from a zip file, the first `per_class` names of each class."""
    with zipfile.ZipFile(archive) as file:
        names: dict[str, list[str]] = defaultdict(list)
        for name in sorted(file.namelist()):
            if name.startswith(f"{part}/") and not name.endswith("/"):
                names[name.split("/")[1]].append(name)
        chosen = [(name, label) for label in names for name in names[label][:per_class]]
        numbers = {label: number for number, label in enumerate(names)}
        return Labelled(
            images=[
                decode_pixels(file.read(name), "jpg").pixels
                for name, _ in tqdm(chosen, desc=part, unit="image")
            ],
            labels=torch.tensor([numbers[label] for _, label in chosen]),
        )


def training_batches(data: Labelled, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield uint8 images, randomly cropped and flipped, and classes, epoch after epoch."""
    steps_per_epoch = len(data.images) // BATCH
    for step in range(steps):
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0:
            order = shuffled(len(data.images), "order", seed, epoch)
        chosen = order[place * BATCH : (place + 1) * BATCH]
        crops = []
        for index in chosen:
            rng = numpy_stream("crop", seed, epoch, int(index))
            crop = random_resized_crop(
                data.images[index], ENCODER.image_size, rng, scale=CROP_SCALE, ratio=(3 / 4, 4 / 3)
            )
            crops.append(crop.flip(-1) if rng.random() < 0.5 else crop)
        yield torch.stack(crops), data.labels[chosen]


def train(model: Classifier, data: Labelled, *, seed: int, epochs: float, label: str) -> None:
    """Train in place with cross-entropy, AdamW and a cosine schedule, in bfloat16."""
    steps_per_epoch = len(data.images) // BATCH
    steps = round(epochs * steps_per_epoch)
    optimizer = build_optimizer(model, OPTIMIZER, parameter_groups(model, OPTIMIZER))
    normalise = Normalise(*NORMALISATION)
    batches = tqdm(training_batches(data, seed, steps), total=steps, desc=label, unit="step")
    model.train()
    running = 0.0
    for step, (images, labels) in enumerate(batches):
        rate = learning_rate(
            SCHEDULE, step, peak=OPTIMIZER.lr, total_steps=steps, steps_per_epoch=steps_per_epoch
        )
        set_learning_rate(optimizer, lambda factor, rate=rate: rate * factor)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(normalise(images))
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        batches.set_postfix(loss=f"{running:.3f}", refresh=False)


@torch.no_grad()
def top1(model: Classifier, data: Labelled, window: int, *, label: str) -> float:
    """Return top-1 accuracy in percent at a window and its image size."""
    side = SIZES[window]
    model.eval()
    model.encoder.set_input(image_size=side, window_size=window)
    normalise = Normalise(*NORMALISATION)
    right = 0
    for start in tqdm(range(0, len(data.images), BATCH), desc=f"{label}, W{window}", unit="batch"):
        part = slice(start, start + BATCH)
        images = torch.stack([center_crop_resize(one, (side, side)) for one in data.images[part]])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(normalise(images))
        right += int((logits.argmax(dim=1) == data.labels[part]).sum())
    return 100 * right / len(data.images)


def results_table(results: dict[Kind, list[dict[int, float]]]) -> str:
    """Return a Markdown table of the mean over seeds, with each seed's figure in parentheses."""
    sizes = [f"W{window}, {side} px" for window, side in SIZES.items()]
    lines = [f"| position bias | {' | '.join(sizes)} |", "|---" * (len(SIZES) + 1) + "|"]
    for kind, seeds in results.items():
        cells = []
        for window in SIZES:
            found = [one[window] for one in seeds]
            each = ", ".join(f"{figure:.1f}" for figure in found)
            cells.append(f"{statistics.mean(found):.1f} ({each})")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="cifar10.zip")
    parser.add_argument("--kinds", nargs="+", default=get_args(Kind), choices=get_args(Kind))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=float, default=2.0, help="epochs of the 50,000 images")
    parser.add_argument("--tested", type=int, default=200, help="test images per class")
    options = parser.parse_args()
    torch.set_num_threads(1)
    training = read_images(options.data, "train")
    testing = read_images(options.data, "test", per_class=options.tested)
    results: dict[Kind, list[dict[int, float]]] = {kind: [] for kind in options.kinds}
    for seed in options.seeds:
        for kind in options.kinds:
            label = f"seed {seed}, {kind}"
            model = build_classifier(kind, int(training.labels.max()) + 1, seed)
            train(model, training, seed=seed, epochs=options.epochs, label=label)
            figures = {window: top1(model, testing, window, label=label) for window in SIZES}
            results[kind].append(figures)
            tqdm.write(f"{label}: {figures}")
        print(f"\ntop-1, %, {len(testing.images):,} test images", results_table(results), sep="\n")


if __name__ == "__main__":
    main()
