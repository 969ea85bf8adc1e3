"""A whole training: `simmim pretrain`, transformers' Trainer, or a plain loop on timm's encoder.

`train.py` runs it as a subprocess: it prints "ready" before its first step, then takes a turn for
each line on standard input and prints the seconds of the measured steps.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from stand_in import import_with_stand_in
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import simmim.engine.loop
from simmim import cli
from simmim.bench.gpu.peers import TimmSimMIM
from simmim.data.transforms.cropping import random_box
from simmim.recipe import load
from simmim.tasks.pretrain.recipe import PretrainRecipe

STEPS = 100_000
"""Steps of the training, which ends when it is killed."""
PREPARED = 3
"""Batches that one data worker prepares during a pause: two in the queue, and one in its hands."""


class Turns:
    """Pause before steps, and time of the steps of a turn.

    Args:
        steps: measured steps of a turn.
        cores: number of cores; on one, processor time is measured.
    """

    def __init__(self, steps: int, cores: int) -> None:
        self.steps = steps
        self.cores = cores
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print is no answer
        self.step = 0
        self.began = 0.0
        self.answers.write('"ready"\n')

    def before_step(self) -> None:
        """Count a step: at the end of a turn, answer and wait for the next one."""
        place = self.step % (PREPARED + self.steps)
        if place == 0:
            if self.step:
                self.answers.write(f"{json.dumps(self.clock() - self.began)}\n")
            if not sys.stdin.readline():
                raise SystemExit
        elif place == PREPARED:
            self.began = self.clock()
        self.step += 1

    def clock(self) -> float:
        """Return seconds: on one core those of this process and its workers on the processor."""
        if self.cores > 1:
            return time.perf_counter()
        workers = psutil.Process().children(recursive=True)
        times = [worker.cpu_times() for worker in workers]
        return time.process_time() + sum(spent.user + spent.system for spent in times)


class MaskedImages(Dataset[dict[str, Tensor]]):
    """Images and masks as transformers' masked-image script prepares them, with Pillow and NumPy.

    RandomResizedCrop, horizontal flip, normalisation to float32, and a mask of its MaskGenerator.
    """

    def __init__(self, folder: Path, recipe: PretrainRecipe) -> None:
        self.paths = sorted(folder.iterdir())
        self.recipe = recipe
        mean, std = recipe.data.normalisation
        self.mean, self.std = (
            torch.tensor(part, dtype=torch.float32).view(3, 1, 1) for part in (mean, std)
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        data, rng = self.recipe.data, np.random.default_rng()
        with self.paths[place].open("rb") as file:
            image = Image.open(file).convert("RGB")
        sides = (image.height, image.width)
        top, left, height, width = random_box(sides, rng, scale=data.scale, ratio=data.ratio)
        size = (data.image_size, data.image_size)
        box = (left, top, left + width, top + height)
        resized = image.resize(size, Image.Resampling.BICUBIC, box=box)
        if rng.random() < 0.5:
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
        normal = (pixels.to(torch.float32).div(255) - self.mean) / self.std
        return {"pixel_values": normal, "bool_masked_pos": self.draw_mask(rng)}

    def draw_mask(self, rng: np.random.Generator) -> Tensor:
        """Return a mask of patches, flat, 1 = hidden."""
        recipe = self.recipe
        cells = recipe.data.image_size // recipe.mask.cell
        mask = np.zeros(cells**2, dtype=int)
        mask[rng.permutation(cells**2)[: int(np.ceil(cells**2 * recipe.mask.ratio))]] = 1
        times = recipe.mask.cell // recipe.encoder.patch_size
        patches = mask.reshape(cells, cells).repeat(times, axis=0).repeat(times, axis=1)
        return torch.tensor(patches.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("contestant", choices=["ours", "transformers", "timm"])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path, help="folder with images/ and shards/ of them")
    parser.add_argument("--precision", choices=["fp32", "bf16"], required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--cores", type=int, required=True)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    torch.set_num_threads(options.cores)
    with tempfile.TemporaryDirectory() as run:
        match options.contestant:
            case "ours":
                train_ours(options, Path(run))
            case "transformers":
                train_transformers(options, Path(run))
            case _:
                train_timm(options)


def train_ours(options: argparse.Namespace, run: Path) -> None:
    """Train with `simmim pretrain`; checkpoints and pictures are due after the benchmark."""
    turns = Turns(options.steps, options.cores)
    advance = simmim.engine.loop.advance

    def advance_in_turn(*arguments: Any) -> None:
        turns.before_step()
        advance(*arguments)

    simmim.engine.loop.advance = advance_in_turn
    training = {
        "steps": STEPS,
        "batch_size": options.batch,
        "precision": options.precision,
        "checkpoint_every": STEPS,
        "validate_every": STEPS,
        "look_every": STEPS,
        "schedule.warmup_steps": 100,
    }
    overrides = [
        part for key, value in training.items() for part in (f"--training.{key}", f"{value}")
    ]
    overrides += ["--data.shards", f"{options.folder}/shards", "--data.workers", "1"]
    overrides += ["--data.validation_shards", "0", "--folder", f"{run}/run"]
    raise SystemExit(cli.main(["pretrain", "--config", f"{options.recipe}", *overrides]))


def train_transformers(options: argparse.Namespace, run: Path) -> None:
    """Train with transformers' Trainer and the model and data of its masked-image script."""
    import transformers

    recipe = load(PretrainRecipe, options.recipe)
    sizes, training = recipe.encoder.config(recipe.data.image_size), recipe.training
    config = transformers.Swinv2Config(
        image_size=recipe.data.image_size,
        patch_size=sizes.patch_size,
        embed_dim=sizes.embed_dim,
        depths=list(sizes.depths),
        num_heads=list(sizes.num_heads),
        window_size=sizes.window_size[0],
        encoder_stride=sizes.strides[-1],
        drop_path_rate=sizes.drop_path,
    )
    turns = Turns(options.steps, options.cores)

    class InTurn(transformers.TrainerCallback):
        def on_step_begin(self, *arguments: object, **named: object) -> None:
            turns.before_step()

    arguments = transformers.TrainingArguments(
        output_dir=f"{run}",
        use_cpu=True,
        bf16=options.precision == "bf16",
        per_device_train_batch_size=options.batch,
        dataloader_num_workers=1,
        remove_unused_columns=False,
        max_steps=STEPS,
        learning_rate=training.optimizer.lr,
        weight_decay=training.optimizer.weight_decay,
        max_grad_norm=training.clip_norm,
        warmup_steps=100,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    transformers.Trainer(
        model=transformers.Swinv2ForMaskedImageModeling(config),
        args=arguments,
        train_dataset=MaskedImages(options.folder / "images", recipe),
        data_collator=stack,
        callbacks=[InTurn()],
    ).train()


def stack(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collate as the masked-image script does."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def train_timm(options: argparse.Namespace) -> None:
    """Train timm's encoder in a plain loop."""
    import_with_stand_in("timm")
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    recipe = load(PretrainRecipe, options.recipe)
    sizes, training = recipe.encoder.config(recipe.data.image_size), recipe.training
    encoder = SwinTransformerV2(
        img_size=sizes.image_size,
        patch_size=sizes.patch_size,
        num_classes=0,
        embed_dim=sizes.embed_dim,
        depths=sizes.depths,
        num_heads=sizes.num_heads,
        window_size=sizes.window_size,
        drop_path_rate=sizes.drop_path,
    )
    model = TimmSimMIM(encoder, sizes, mask_cell=sizes.patch_size).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=training.optimizer.lr,
        weight_decay=training.optimizer.weight_decay,
        fused=True,
    )
    dataset = MaskedImages(options.folder / "images", recipe)
    loader = DataLoader(
        dataset, options.batch, shuffle=True, num_workers=1, drop_last=True, collate_fn=stack
    )
    side = recipe.data.image_size // sizes.patch_size
    turns = Turns(options.steps, options.cores)
    while True:
        for batch in loader:
            turns.before_step()
            with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
                loss = model(batch["pixel_values"], batch["bool_masked_pos"].view(-1, side, side))
            optimizer.zero_grad()
            loss.backward()
            if training.clip_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
            optimizer.step()


if __name__ == "__main__":
    main()
