"""Training a recipe: check the input, start processes, train, print the result."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from data_prep.format.kinds import describe_kinds
from data_prep.format.text import count_noun
from simmim.data.datasets.mixture import StreamedShards
from simmim.data.order.order import describe_order, needless_slots
from simmim.engine.checkpoint.choosing import choose_checkpoint
from simmim.engine.checkpoint.directory import (
    find_checkpoint,
    kept_best,
    read_best,
)
from simmim.engine.devices import build_accelerator, own_process_state
from simmim.engine.distributed.launcher import (
    end_processes,
    end_with_launcher,
    start_processes,
)
from simmim.engine.loop import TrainingResult, train
from simmim.engine.monitor.tracking import chosen_trackers
from simmim.engine.run import RunFolder
from simmim.engine.stage import TrainingStage
from simmim.environment import process_environment
from simmim.recipe import read_values
from simmim.report.page import write_report
from simmim.report.section import NOTHING_MORE
from simmim.stop_signals import ProcessExit
from simmim.tasks.all_tasks import head_folders, task_of_run
from simmim.tasks.architecture import describe_start, overridden
from simmim.tasks.input_check import check_stage_input
from simmim.tasks.loading import with_recorded_slots, with_recorded_windows
from simmim.tasks.other_encoder import exported_step
from simmim.tasks.pretrained import describe_initial, initial_target
from simmim.tasks.recipe import TaskRecipe

RecipeT = TypeVar("RecipeT", bound=TaskRecipe)


@own_process_state()
def train_recipe(
    make_stage: Callable[[RecipeT], TrainingStage],
    recipe: RecipeT,
    *,
    run: RunFolder,
    resume: str | None,
    allow_changes: bool,
    init_from: Path | None = None,
    check_memory: Callable[[Any], None] | None = None,
    process_exit: ProcessExit = "no",
) -> TrainingResult:
    """Train the stage of `recipe` in the run folder, on all processes that were asked for.

    The input is checked before processes start.

    Args:
        make_stage: the stage class.
        recipe: recipe of the training.
        run: the run folder.
        resume: None to start from the beginning, `auto`, or the path of a checkpoint. Processes
            that torchrun restarts resume from the last complete checkpoint in any case.
        allow_changes: resume although the recipe has changed.
        init_from: weights to start from if no checkpoint is resumed.
        check_memory: called with the recipe before anything large is built, or with the resolved
            one if weights bring their own architecture; raises ValueError if it does not fit.
        process_exit: whether the process exits afterwards.

    Raises:
        ValueError: the run folder, the shards or the sizes cannot be used.
    """
    environment = process_environment()
    environment.check_parallelism()
    chosen_trackers(recipe.training.trackers)
    end_with_launcher()
    if environment.restarts and (resume is None or find_checkpoint(run.checkpoints, "auto")):
        resume = "auto"
    recipe = with_recorded_slots(recipe, run, resume)
    starts = resume is None or find_checkpoint(run.checkpoints, resume) is None
    start = describe_initial(init_from) if starts and init_from is not None else None
    recipe = with_recorded_windows(recipe, run, resume, start)
    stage = build_stage(make_stage, recipe, check_memory or (lambda _recipe: None))
    check = partial(check_folder, run, stage.recipe, recipe, resume, allow_changes=allow_changes)
    if environment.is_main:  # others would see what rank 0 has written
        changed = check()
        warnings = check_data(stage, recipe, starts=starts)
        if start is not None:
            target = initial_target(init_from)
            warnings += stage.recipe.differences_from(start, target)
        if environment.processes_to_start < 2:  # printed once, by the process that trains
            print_start(stage, recipe, changed, warnings)
    stage.bad_samples.write_to(run.bad_samples)
    stage.batches(rank=0, world=environment.world, start=0, end=recipe.training.batch_size)
    start_processes()
    accelerator = build_accelerator(recipe.training.precision, recipe.training.rank_timeout)
    with locked_and_checked_again(run, accelerator, check):
        result = train(
            stage,
            run,
            accelerator,
            resume,
            allow_changes=allow_changes,
            init_from=init_from,
            write_report=report_run,
            process_exit=process_exit,
        )
        left_out = merge_left_out(gather_object([stage.bad_samples.without_image]))
        if accelerator.is_main_process:
            print_result(result, run, resume, left_out)
        end_processes(accelerator)
    return result


def build_stage(
    make_stage: Callable[[RecipeT], TrainingStage],
    recipe: RecipeT,
    check_memory: Callable[[Any], None],
) -> TrainingStage:
    """Build the stage of a recipe, once its memory is checked.

    Weights that bring their own architecture are read first: the stage's recipe has their sizes.

    Raises:
        ValueError: it does not fit the memory, or the data or weights cannot be used.
    """
    if recipe.architecture_source is None:
        check_memory(recipe)
        return make_stage(recipe)
    stage = make_stage(recipe)
    check_memory(stage.recipe)
    return stage


def check_data(stage: TrainingStage, recipe: TaskRecipe, *, starts: bool) -> list[str]:
    """Compare the data with the encoder and the batch size, and return warnings.

    Args:
        stage: the stage.
        recipe: the recipe that it was made of.
        starts: whether training starts from the beginning; what is resumed was checked before.

    Raises:
        ValueError: the images do not fit the encoder.
    """
    warnings = check_stage_input(stage, recipe) if starts else []
    warnings += batch_above_data(recipe.training.batch_size, stage.order.samples_per_epoch)
    if starts and needless_slots(stage.order):
        warnings.append(f"{describe_order(stage.order)}: remove data.slots to train on all")
    return warnings


def print_start(
    stage: TrainingStage, recipe: TaskRecipe, changed: Mapping[str, str], warnings: Sequence[str]
) -> None:
    """Print what a person should know when training starts.

    Args:
        stage: the stage.
        recipe: the recipe that it was made of.
        changed: accepted changes of the recipe of a run that is resumed.
        warnings: warnings of the data.
    """
    if changed:
        listed = "".join(f"\n  {key}: {text}" for key, text in changed.items())
        sys.stderr.write(f"the recipe has changed:{listed}\n")
    images, stream = stage.training_shards, None
    if isinstance(images, StreamedShards):
        readers = process_environment().world * max(1, recipe.data.workers)
        stream = images.describe(readers)
    told = (describe_start(recipe), overridden(recipe, stage.recipe), recipe.start_note, stream)
    for line in told:
        sys.stderr.write("" if line is None else f"{line}\n")
    sys.stderr.writelines(f"WARNING: {text.rstrip('.')}.\n" for text in warnings)


def batch_above_data(batch_size: int, samples: int) -> list[str]:
    """Return a warning if a batch has more samples than an epoch."""
    if batch_size <= samples:
        return []
    least, rest = divmod(batch_size, samples)
    times = f"{least} or {least + 1} times" if rest else f"{least} times"
    text = (
        f"training.batch_size {batch_size:,} is larger than the data set: an epoch has "
        f"{count_noun(samples, 'sample')}, so the same sample is in a batch {times}; lower "
        "training.batch_size"
    )
    return [text]


def check_folder(
    run: RunFolder, recipe: object, given: object, resume: str | None, *, allow_changes: bool
) -> dict[str, str]:
    """Check that a run folder can be used; return the accepted changes of the recipe.

    Args:
        run: the run folder.
        recipe: the recipe that is trained.
        given: the recipe before the stage filled it in; see `RunFolder.check`.
        resume: None, `auto`, or the path of a checkpoint.
        allow_changes: accept any change.

    Raises:
        ValueError: see `RunFolder.check` and `choose_checkpoint`.
    """
    return run.check(
        recipe,
        resume=resume is not None,
        checkpoint=choose_checkpoint(
            run.checkpoints, resume, run=run.identity(), tensors=False
        ).path,
        allow_changes=allow_changes,
        given=given,
    )


@contextmanager
def locked_and_checked_again(
    run: RunFolder, accelerator: Accelerator, check: Callable[[], object]
) -> Iterator[None]:
    """Lock the run folder within this context and check it again; all ranks enter it together.

    Another start may have written into it since the first check, and ended while this one waited.

    Raises:
        ValueError: the folder can no longer be used; on all ranks.
    """
    refusal = [""]
    with ExitStack() as held:
        if accelerator.is_main_process:
            try:
                held.enter_context(run.locked())
                check()
            except (ValueError, OSError) as error:
                refusal = [str(error)]
        broadcast_object_list(refusal)
        if refusal[0]:
            raise ValueError(refusal[0])
        yield


def merge_left_out(counts: Sequence[Counter[str]]) -> str:
    """Return what samples without an image have instead, and how often, given that of each rank."""
    return describe_kinds(sum(counts, Counter()))


def print_result(
    result: TrainingResult, run: RunFolder, resume: str | None, left_out: str = ""
) -> None:
    """Print how training ended and where its results are.

    Args:
        result: the result of training.
        run: the run folder.
        resume: what training was started with: with `auto`, the same command resumes.
        left_out: what samples without an image have instead, and how often; empty if there are
            none.
    """
    if result.stopped:
        lines = [
            f"Stopped at step {result.step}; its checkpoint is in {run.checkpoints}."
            if result.step
            else "Stopped before the first checkpoint.",
            "Resume with the same command" + ("." if resume == "auto" else " and --resume auto."),
        ]
    else:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in result.figures.items())
        lines = [
            f"Done: {count_noun(result.step, 'step')}" + (f"; {figures}." if figures else "."),
            *_exported_lines(run, result.step),
            f"Metrics  {run.metrics}",
            f"Report   {run.report}",
        ]
        if run.bad_samples.is_file():
            lines.append(
                f"Damaged  {run.bad_samples}: samples that were replaced, skipped or noted"
            )
        if left_out:
            lines.append(f"Left out samples without an image, counted in each epoch: {left_out}")
        if run.reconstructions.is_dir():
            lines.append(f"Pictures {run.reconstructions}")
    sys.stdout.write("\n".join(lines) + "\n")


def _exported_lines(run: RunFolder, last: int) -> list[str]:
    """Return lines on the folders of encoder and head, and the checkpoint that they are of."""
    best, path = read_best(run.path), kept_best(run.path)
    is_best = best is not None and exported_step(run.encoder) == best.step
    of = " (of the best checkpoint)" if is_best else ""
    heads = [run.path / name for name in head_folders() if (run.path / name).is_dir()]
    lines = [f"Encoder  {run.encoder}{of}", *(f"Head     {head}{of}" for head in heads)]
    if best is not None and path is not None:
        lines.append(f"Best     {path}: {best.metric} {best.value:.4f} at step {best.step:,}")
        if best.step != last and is_best:
            lines.append(f"Last     simmim export {run.path} FOLDER --last exports step {last:,}")
    return lines


def report_run(run: RunFolder) -> Path:
    """Write the HTML report of a run, with what its task adds, and return its path.

    Raises:
        ValueError: see `write_report`.
    """
    try:
        task = task_of_run(read_values(run.recipe))
    except (OSError, ValueError):  # edited, or none yet
        task = None
    return write_report(run, NOTHING_MORE if task is None else task.report)
