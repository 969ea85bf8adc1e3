"""The command line: `simmim COMMAND`, from quickstart and pretrain to doctor and bench.

A command is a function; its signature and docstring are its arguments and help. What a command
needs is imported when it runs: help, a mistyped command and a mistake in a recipe answer without
loading torch.
"""

# ruff: noqa: PLC0415 (see above)
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import CycloptsError, Parameter, UnknownOptionError

from data_prep.bounds import Fraction, Seed
from data_prep.format.command_line import (
    FLAT,
    MANY,
    ONE_OF,
    PASSED,
    add_completion,
    describe_mistake,
    make_app,
    parse_arguments,
)
from data_prep.format.terminal import ExitCode, flush_output
from data_prep.format.text import printable_lines
from simmim.bench.cli import app as bench
from simmim.doctor.cli import doctor
from simmim.engine.exit_codes import BAD_INPUT, LOST, STOPPED, RankLostError
from simmim.environment import process_environment
from simmim.export.cli import export, import_
from simmim.fields import Overrides, RecipeOptions
from simmim.start import TRAINING, start_process
from simmim.stop_signals import ignore_stop_signals

if TYPE_CHECKING:
    from simmim.tasks.task import Task

EXIT_CODES = f"""Exit codes:
  0    done
  {BAD_INPUT}    fix the input first: command, recipe, shards, disk, or training diverged
  {STOPPED}   stopped by SIGTERM, SIGINT or SIGUSR1, or SIGHUP (not under nohup), with a checkpoint
       (on a full disk: the previous one, and a warning): resume with --resume auto
  {LOST}   a process hung or was lost (training.rank_timeout), or a data worker was killed, usually
       because memory ran out: resume with --resume auto

accelerate launch and torchrun turn all of these except 0 into 1, and accelerate launch may not wait
for the checkpoint of a stop. `python -m simmim.launch` and `python -m simmim.launch torchrun` take
the same options, wait, and pass the exit code on."""

EndsProcess = Annotated[bool, PASSED]
"""Whether the process exits after the command, so that stop signals after a stop are ignored."""

app = make_app(
    "simmim",
    "Pretrain a Swin Transformer V2 on unlabelled images with SimMIM, and use its encoder.",
)
add_completion(app)


def run() -> None:
    """Run the command of this process and exit with its code; see EXIT_CODES."""
    from simmim.engine.distributed.launcher import run_as_rank

    start_process(sys.argv[1:])
    if process_environment().is_one_of_several:
        run_as_rank(lambda: main(ends_process=True))
    try:
        code: ExitCode = main(ends_process=True)
    except SystemExit as ending:
        code = ending.code
    if sys.argv[1:2] and sys.argv[1] in TRAINING:
        ignore_stop_signals()
    sys.exit(flush_output(code))


def main(argv: Sequence[str] | None = None, *, ends_process: bool = False) -> int:
    """Run a command and return its exit code.

    Args:
        argv: the command and its arguments; None takes those of the process.
        ends_process: the process exits afterwards, so stop signals that arrive once a training has
            ended are ignored.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        command, given, passed = parse_arguments(app, argv)
        if (options := _recipe_options(given.arguments)) is not None:
            return show_fields(argv[0], options)
        ours = {"ends_process": ends_process} if "ends_process" in passed else {}
        return command(*given.args, **given.kwargs, **ours) or 0
    except CycloptsError as error:
        _say_for_machine(_mistake(argv, error))
        return BAD_INPUT
    except RankLostError as error:
        print(f"simmim {argv[0]}: {printable_lines(error)}", file=sys.stderr)
        return LOST
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return _fail(argv[0] if argv else "", error)
    except KeyboardInterrupt:
        print(f"simmim {argv[0]}: interrupted", file=sys.stderr)
        return 128 + 2


def _mistake(argv: Sequence[str], error: CycloptsError) -> str:
    if argv[0] == "evaluate" and isinstance(error, UnknownOptionError):
        key = error.token.keyword or error.token.value
        if "." in key:
            return f"simmim evaluate: {key} belongs behind RUN: RUN --KEY VALUE."
    return describe_mistake(error, "simmim")


def _fail(command: str, error: Exception) -> int:
    """Say why a command failed, and return its exit code; other errors are raised."""
    from simmim.data.loader.lost_workers import lost_worker
    from simmim.engine.exit_codes import out_of_memory
    from simmim.recipe import RecipeError

    if isinstance(error, RecipeError):
        _say_for_machine(f"simmim {command}: {error}")
        return BAD_INPUT
    lost = lost_worker(error) if isinstance(error, RuntimeError) else None
    reason = lost or out_of_memory(error)
    if reason is None and isinstance(error, RuntimeError):
        raise error
    resume = " Resume with --resume auto." if reason and command in TRAINING else ""
    print(f"simmim {command}: {printable_lines(reason or error)}{resume}", file=sys.stderr)
    return LOST if reason else BAD_INPUT


def _say_for_machine(mistake: str) -> None:
    """Print a mistake in arguments or recipe, which all ranks of a machine find, once."""
    if not process_environment().local_rank:
        print(printable_lines(mistake), file=sys.stderr)


def _recipe_options(arguments: dict[str, object]) -> RecipeOptions | None:
    """Return the options of a command if they ask for the fields of a recipe."""
    found = arguments.get("options")
    asks = isinstance(found, RecipeOptions) and found.help_fields is not None
    return found if asks and isinstance(found, RecipeOptions) else None


def show_fields(command: str, options: RecipeOptions) -> int:
    """Print the fields of a recipe: of the given one's task, or of all tasks of a command."""
    from simmim.fields import describe, has_section
    from simmim.recipe import read_values
    from simmim.tasks.all_tasks import TASKS, command_of, recipe_type

    section = "".join(options.help_fields or ())
    if options.config is not None:
        tasks = [str(read_values(options.config).get("task", command))]
    else:
        known = [*(task.name for task in TASKS), "probe"]
        its = command if command in map(command_of, known) else "finetune"  # doctor and labels
        tasks = [task for task in known if command_of(task) == its]
    recipes = [(task, recipe_type(task, options.config)) for task in tasks]
    with_section = [one for one in recipes if has_section(one[1], section)] or recipes
    texts = [(task, describe(recipe, section)) for task, recipe in with_section]
    for task, text in texts:
        print(f"Recipe of task {task}:\n\n{text}\n" if len(texts) > 1 else text)
    return 0


@app.command(sort_key=0)
def quickstart(
    *,
    images: Path | None = None,
    folder: Path = Path("runs/quickstart"),
    ends_process: EndsProcess,
) -> int:
    """Run the whole pipeline on a small set, in minutes.

    Images → shards → pretraining → encoder → comparison with a random one.

    Args:
        images: Folder, zip or tar of images. Default: draw some.
        folder: Output folder.
    """
    from simmim.quickstart import quickstart as run_pipeline

    # Once training has ended, the probe follows, which a signal may stop.
    outcome = run_pipeline(images, folder, process_exit="if stopped" if ends_process else "no")
    if outcome.text:
        print(outcome.text)
    return STOPPED if outcome.stopped else 0


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(RecipeOptions):
    """Options of a training."""

    folder: str | None = None
    """Run folder. Default: runs/ and the recipe's name."""
    resume: str | None = None
    """auto: resume from the last complete checkpoint, if there is one; or a checkpoint's folder."""
    init_from: Path | None = None
    """Start from the weights of a run, checkpoint or encoder directory, with a new optimiser and
    from the first image; with --resume auto only if there is no checkpoint yet."""
    allow_recipe_changes: bool = False
    """Resume although the recipe differs from the one the run was started with."""
    ignore_memory: bool = False
    """Train although the memory counted for a step is more than this machine has."""
    compile: bool = False
    """Compile the encoder's blocks, as is the default on a GPU."""


def pretrain(
    *overrides: Overrides,
    options: Annotated[TrainingOptions, FLAT] = TrainingOptions(),
    ends_process: EndsProcess,
) -> int:
    """Run `simmim pretrain`."""
    return _train("pretrain", options, overrides, ends_process)


def finetune(
    *overrides: Overrides,
    options: Annotated[TrainingOptions, FLAT] = TrainingOptions(),
    ends_process: EndsProcess,
) -> int:
    """Run `simmim finetune`."""
    return _train("finetune", options, overrides, ends_process)


app.command(
    pretrain,
    sort_key=1,
    help=f"Pretrain an encoder on unlabelled images.\n\n{EXIT_CODES}",
)
app.command(
    finetune,
    sort_key=2,
    help="Fine-tune an encoder on the task of a recipe.\n\n"
    "--init PATH names the encoder directory or the finished run to start from.\n\n"
    f"{EXIT_CODES}",
)


def _train(
    command: str, options: TrainingOptions, overrides: Sequence[str], ends_process: bool
) -> int:
    from simmim.recipe import load

    config = options.recipe_file(overrides)
    if options.compile:
        overrides = [*overrides, "--execution.compile", "true"]
    task = task_of(command, config)
    recipe = load(task.recipe, config, overrides, options.names())
    from simmim.api import default_folder, train_task

    run = train_task(
        task,
        recipe,
        Path(options.folder) if options.folder else default_folder(config),
        resume=options.resume,
        init_from=options.init_from,
        allow_recipe_changes=options.allow_recipe_changes,
        check_memory=not options.ignore_memory,
        process_exit="always" if ends_process else "no",
    )
    return STOPPED if run.stopped else 0


def task_of(command: str, config: Path) -> "Task":
    """Return the task that `simmim pretrain` or `simmim finetune` is to train.

    Raises:
        RecipeError: the recipe is for another command.
    """
    from simmim.recipe import read_values
    from simmim.tasks.all_tasks import check_command, fine_tuning_named, task_named

    task = read_values(config).get("task")
    check_command(command, task, config)
    if command == "pretrain":
        return task_named("pretrain", f"recipe {config}")
    return fine_tuning_named(task, config)


@app.command(sort_key=3)
def evaluate(
    run: Path,
    /,
    *overrides: Overrides,
    best: Annotated[bool | None, ONE_OF, Parameter(negative="--last")] = None,
    data: str | None = None,
    config: Path | None = None,
) -> int:
    """Validate a trained run, on its data or on other data.

    It is validated as in training, and a line is added to evaluations.jsonl in the run. --KEY VALUE
    overrides any field of its recipe. With --config, the reconstruction loss of an encoder
    directory that has mask token and decoder is measured instead.

    Args:
        run: Run folder, checkpoint, or with --config an encoder directory.
        best: Checkpoint of the run. Default: the best, or the last if none is known.
        data: Other validation data: shards or a folder of images, clips, a folder of images and
            annotations, or a COCO file.
        config: Recipe of a pretraining, with mask, loss and images for an encoder directory.
    """
    from simmim.tasks.evaluate import evaluate as validate
    from simmim.tasks.evaluate import evaluate_encoder

    if config is None:
        validate(run, overrides, best=best, data=data)
        return 0
    if best is not None:
        raise ValueError("--best and --last choose a checkpoint of a run: leave --config out.")
    evaluate_encoder(run, config, overrides, data=data)
    return 0


@app.command(sort_key=4)
def probe(*overrides: Overrides, options: Annotated[RecipeOptions, FLAT] = RecipeOptions()) -> int:
    """Compare frozen features, pretrained and random, by kNN and a linear classifier."""
    from simmim.recipe import load, read_values
    from simmim.tasks.all_tasks import check_command
    from simmim.tasks.probe.recipe import ProbeRecipe

    config = options.recipe_file(overrides)
    check_command("probe", read_values(config).get("task"), config)
    recipe = load(ProbeRecipe, config, overrides, options.names())
    import torch  # only once the recipe is right

    from simmim.tasks.probe.probe import compare, table

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    print(table(compare(recipe, device or "cpu")))
    return 0


@dataclass(frozen=True, kw_only=True)
class LabelsOptions(RecipeOptions):
    """Options of `simmim labels`."""

    init: str | None = None
    """Pretrained run or encoder directory. (required)"""
    folder: Path = Path("runs/labels")
    """Folder of all runs."""
    fractions: Annotated[tuple[Fraction, ...], MANY] = (0.01, 0.1, 1.0)
    """Fractions of the labels."""
    seeds: Annotated[tuple[Seed, ...], MANY] = (0, 1, 2)
    """Training seeds."""


@app.command(sort_key=5)
def labels(
    *overrides: Overrides,
    options: Annotated[LabelsOptions, FLAT] = LabelsOptions(),
) -> int:
    """Compare pretrained and random weights, from few labels to all.

    Both are fine-tuned for each fraction of the labels and each seed, and labels.html has a table
    and a plot. Runs that are complete are not repeated.
    """
    from simmim.tasks.label_efficiency import compare_labels

    config = options.recipe_file(overrides)
    if options.init is None:
        raise ValueError("--init is missing: give a pretrained run or an encoder directory.")
    text = compare_labels(
        config,
        options.init,
        options.folder,
        fractions=options.fractions,
        seeds=options.seeds,
        overrides=overrides,
    )
    if text is None:
        print("Stopped. Resume with the same command.")
        return STOPPED
    print(f"{text}\n{options.folder / 'labels.html'}")
    return 0


@app.command(sort_key=8)
def report(run: Path, /) -> int:
    """Write the HTML report of a run.

    report.html has figures, reconstructions, recipe and machine in one file. Training writes it
    too, whenever it draws reconstructions.

    Args:
        run: Run folder.
    """
    from simmim.engine.run import RunFolder
    from simmim.tasks.train import report_run

    print(report_run(RunFolder(path=run)))
    return 0


app.command(export, sort_key=6)
app.command(import_, name="import", sort_key=7)
app.command(doctor, sort_key=9)
app.command(bench)
