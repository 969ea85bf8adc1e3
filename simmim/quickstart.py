"""The whole pipeline on one machine in minutes: images → shards → pretraining → encoder → probe."""

import math
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.format.manifest import read_manifest
from simmim.bench.choices import GIB
from simmim.data.datasets.opening import measured_statistics
from simmim.data.datasets.procedural import draw_images
from simmim.data.transforms.sampling import ImageForm, sample_images
from simmim.doctor.fits import find_room, most_memory
from simmim.engine.folder_lock import locked_folder
from simmim.engine.run import RunFolder
from simmim.recipe import load, parse
from simmim.stop_signals import ProcessExit
from simmim.tasks.input_check import SAMPLES, SECONDS
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from simmim.tasks.probe.probe import compare, table
from simmim.tasks.probe.recipe import ProbeRecipe
from simmim.tasks.train import train_recipe

NUM_IMAGES = 4096
IMAGE_SIZE = 64
BATCH_SIZE = 64
COLOUR = ImageForm(3, "uint8")
"""Images that fit the recipe as it is."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a quickstart ended."""

    text: str
    """Summary to print; empty if there is none."""
    stopped: bool
    """Whether a signal stopped it early."""


def quickstart(images: Path | None, folder: Path, *, process_exit: ProcessExit = "no") -> Outcome:
    """Run the pipeline in `folder`; the same call resumes an earlier one that was stopped.

    Args:
        images: a folder, zip or tar of images; None draws labelled procedural ones.
        folder: output folder of images, shards and the run.
        process_exit: whether the process exits after a training; see `train_recipe`.

    Raises:
        ValueError: the images cannot be used, the folder holds another run, or there is too little
            memory.
    """
    check_memory(embedded_recipe(folder / "shards"))
    with locked_folder(folder):
        return _run_pipeline(images, folder, process_exit)


def _run_pipeline(images: Path | None, folder: Path, process_exit: ProcessExit) -> Outcome:
    began = time.perf_counter()
    if images is None:
        say(f"1/4 drawing {NUM_IMAGES} images of shapes, textures and backgrounds")
        images = folder / "images"
        draw_images(images, count=NUM_IMAGES, size=IMAGE_SIZE, seed=0)
    else:
        say(f"1/4 using the images of {images}")
    say("2/4 writing shards")
    shards = folder / "shards"
    make_shards(images, shards)
    say("3/4 pretraining a small SwinV2")
    run = RunFolder(path=folder / "run")
    recipe = quickstart_recipe(shards)
    if not run.recipe.is_file() or load(PretrainRecipe, run.recipe).encoder != recipe.encoder:
        recipe = fit_to_images(recipe, shards)
    result = train_recipe(
        PretrainStage,
        recipe,
        run=run,
        resume="auto",
        allow_changes=False,
        process_exit=process_exit,
    )
    if result.stopped:
        return Outcome(text="", stopped=True)  # training has said how to resume
    say("4/4 probing its frozen features")
    return Outcome(text=summarise(run, shards, began), stopped=False)


def check_memory(recipe: PretrainRecipe) -> None:
    """Refuse a machine or container that is too small before images are drawn.

    Raises:
        ValueError: training needs more memory than there is.
    """
    room = find_room()
    most = 0.0 if room is None else most_memory(recipe, BATCH_SIZE, room)
    if room is not None and most > room.there:
        raise ValueError(
            f"the quickstart needs up to {most / GIB:.1f} GiB of memory, and this machine "
            f"or its container has {room.there / GIB:.1f} GiB: use a larger one, or raise the "
            "container's limit."
        )


def say(text: str) -> None:
    """Print a progress line."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def make_shards(images: Path, shards: Path) -> None:
    """Write shards with data-prep, in a separate process.

    Raises:
        ValueError: it failed; it has printed the reason.
    """
    command = [sys.executable, "-m", "data_prep", "shard", str(images), str(shards)]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise ValueError(f"no shards could be written from {images}; see the error above.")


def quickstart_recipe(shards: Path) -> PretrainRecipe:
    """Return the embedded recipe, sized for two CPU cores and a small set.

    Raises:
        ValueError: there are too few images to learn from and hold some out.
    """
    manifest = read_manifest(shards)
    if len(manifest.shards) < 2:
        raise ValueError(
            f"{manifest.samples} image is too few: the quickstart trains on some images and "
            "validates on others."
        )
    return embedded_recipe(shards)


def embedded_recipe(shards: Path) -> PretrainRecipe:
    """Return the embedded recipe for shards that need not exist yet."""
    return parse(
        PretrainRecipe,
        {
            "task": "pretrain",
            "encoder": {
                "variant": "tiny",
                "window_size": 8,
                "embed_dim": 64,
                "depths": [2, 2, 4],
                "num_heads": [2, 4, 8],
            },
            "data": {
                "shards": str(shards),
                "image_size": IMAGE_SIZE,
                "workers": 1,
            },
            "mask": {"cell": 8, "ratio": 0.6},
            "training": {
                "batch_size": BATCH_SIZE,
                "steps": 350,
                "log_every": 10,
                "checkpoint_every": 100,
                "validate_every": 175,
                "look_every": 175,
                "optimizer": {"lr": 2e-3},
                "schedule": {"warmup_steps": 35, "warmup_lr": 2e-5, "min_lr": 2e-5},
            },
        },
        "the quickstart's recipe",
    )


def fit_to_images(recipe: PretrainRecipe, shards: Path) -> PretrainRecipe:
    """Return the recipe with channels, mean and std of images that are not colour of 8 bits.

    Raises:
        ValueError: their statistics cannot be measured; data-prep has printed the reason.
    """
    found = sample_images(
        recipe.data.open_shards(),
        channels=recipe.encoder.in_channels,
        data=recipe.data,
        most=SAMPLES,
        seconds=SECONDS,
    )
    if not found.forms or found.main == COLOUR:
        return recipe
    say(f"    the images have {found.main}; measuring their mean and std")
    command = [sys.executable, "-m", "data_prep", "info", str(shards), "--statistics"]
    if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
        raise ValueError(f"{shards} cannot be measured; see the error above.")
    measured = measured_statistics([str(shards)])
    return replace(
        recipe,
        encoder=replace(recipe.encoder, in_channels=len(measured.mean)),
        data=replace(recipe.data, mean=measured.mean, std=measured.std),
    )


def summarise(run: RunFolder, shards: Path, began: float) -> str:
    """Return the results of the run and the paths of its files."""
    validated: dict[str, float] = {"validation_loss": math.nan, "mean_color_loss": math.nan}
    for line in run.read_metrics():
        if "validation_loss" in line:
            validated |= line
    lines = [
        "",
        f"L1 on masked pixels, held-out images:    {validated['validation_loss']:.3f}",
        f"baseline, predicting the mean colour:    {validated['mean_color_loss']:.3f}",
    ]
    if len(read_manifest(shards).classes) >= 2:
        values = {"encoder": str(run.encoder), "data": {"shards": str(shards), "workers": 1}}
        lines += ["", table(compare(parse(ProbeRecipe, values, "the quickstart's probe")))]
    else:
        lines += ["", "These images have no classes (one folder per class), so there is no probe."]
    lines += [
        "",
        f"Pictures  {run.reconstructions}",
        f"Encoder   {run.encoder}",
        f"Recipe    {run.recipe}",
        f"Shards    {shards}",
        "",
        "Next: simmim export, finetune and probe use the encoder; jobs/ has more recipes.",
        f"Finished in {(time.perf_counter() - began) / 60:.1f} minutes.",
    ]
    return "\n".join(lines)
