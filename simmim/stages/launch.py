"""Running a stage from its recipe: checks, processes, training, and what is said at the end."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from simmim.engine.launcher import (
    end_with_launcher,
    requested_cpu_processes,
    start_processes,
)
from simmim.engine.loop import TrainingResult, build_accelerator, train
from simmim.engine.run import RunFolder
from simmim.engine.stage import Stage
from simmim.engine.tracking import chosen_trackers
from simmim.stages.classification import ClassificationRecipe
from simmim.stages.pretrain import PretrainRecipe

Recipe = TypeVar("Recipe", PretrainRecipe, ClassificationRecipe)

STOPPED = 75
"""Exit code after a stop on request: EX_TEMPFAIL, "try again later"."""


def launch(
    make_stage: Callable[[Recipe], Stage],
    recipe: Recipe,
    *,
    run: RunFolder,
    resume: str | None,
    allow_changes: bool,
) -> TrainingResult:
    """Train the stage of `recipe` in the folder `run`, on all the processes that were asked for.

    Everything that can be wrong with the input is looked at before processes start.

    Raises:
        ValueError: the run folder, the shards or the sizes cannot be used.
    """
    check_parallelism()
    chosen_trackers(recipe.training.trackers)
    end_with_launcher()
    stage = make_stage(recipe)
    if int(os.environ.get("RANK", "0")) == 0:  # the others would meet what rank 0 has begun
        run.check(stage.recipe, resume=resume is not None, allow_changes=allow_changes)
    stage.bad_samples.write_to(run.bad_samples)
    world = max(requested_cpu_processes(), int(os.environ.get("WORLD_SIZE", "1")))
    stage.batches(rank=0, world=world, start=0, end=recipe.training.batch_size)
    start_processes()
    accelerator = build_accelerator(recipe.training.precision)
    if accelerator.is_main_process:
        run.lock()
    accelerator.wait_for_everyone()
    result = train(stage, run, accelerator, resume)
    if accelerator.is_main_process:
        say_result(result, run)
    accelerator.end_training()
    return result


def check_parallelism() -> None:
    """Refuse what accelerate would do to the weights and checkpoints cannot hold.

    Raises:
        ValueError: accelerate was told to shard them.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "accelerate was told to use FSDP, and training does not write sharded checkpoints yet: "
            "leave out --use_fsdp, or the --config_file that asks for it. To save memory, set "
            "execution.checkpointing to full; `simmim bench memory` tells what fits."
        )


def say_result(result: TrainingResult, run: RunFolder) -> None:
    """Print where a training ended and where its results are."""
    if result.stopped:
        lines = [
            f"Stopped at step {result.step}; its checkpoint is in {run.checkpoints}.",
            "Go on from it with the same command and --resume auto.",
        ]
    else:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in result.figures.items())
        lines = [
            f"Done: {result.step} steps" + (f"; {figures}." if figures else "."),
            f"Encoder  {run.encoder}",
            f"Metrics  {run.metrics}",
            f"Report   {run.report}",
        ]
        if run.bad_samples.is_file():
            lines.append(f"Damaged  {run.bad_samples}: samples that were replaced or left out")
        if run.reconstructions.is_dir():
            lines.append(f"Pictures {run.reconstructions}")
    sys.stdout.write("\n".join(lines) + "\n")


def run_folder(path: str | None, config: Path) -> RunFolder:
    """Return the folder of a run: `path`, or `runs/` and the recipe's name."""
    return RunFolder(path=Path(path) if path else Path("runs") / config.stem)
