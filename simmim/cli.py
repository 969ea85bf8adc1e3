"""The command line: `simmim COMMAND`, from quickstart and pretrain to doctor and bench.

The parser of a command is built, and what it needs imported, only where that command is asked for:
`simmim --help` and a mistyped command answer without loading torch.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from data_prep.format.terminal import ExitCode, flush_output
from data_prep.format.text import printable_lines
from simmim.data.loader.lost_workers import lost_worker
from simmim.engine.exit_codes import BAD_INPUT, LOST, STOPPED, RankLostError, out_of_memory
from simmim.environment import process_environment
from simmim.recipe import describe, load, read_values
from simmim.start import TRAINING, start_process
from simmim.stop_signals import ProcessExit, ignore_stop_signals

if TYPE_CHECKING:
    from simmim.tasks.task import Task


class CommandParser(argparse.ArgumentParser):
    """A parser whose help may end with details that are only put together when it is printed."""

    details: Callable[[], str] | None = None

    def format_help(self) -> str:
        """Return the help text."""
        details = "" if self.details is None else f"\n{self.details()}\n"
        return super().format_help() + details

    def error(self, message: str) -> NoReturn:
        """Exit with a message on a mistake in the arguments."""
        super().error(printable_lines(message))


EXIT_CODES = f"""exit codes:
  0    done
  {BAD_INPUT}    fix the input first: command, recipe, shards, disk, or training diverged
  {STOPPED}   stopped by SIGTERM, SIGINT or SIGUSR1, or SIGHUP (not under nohup), with a checkpoint
       (on a full disk: the previous one, and a warning): resume with --resume auto
  {LOST}   a process hung or was lost (training.rank_timeout), or a data worker was killed, usually
       because memory ran out: resume with --resume auto
accelerate launch and torchrun turn all of these except 0 into 1, and accelerate launch may not wait
for the checkpoint of a stop. `python -m simmim.launch` and `python -m simmim.launch torchrun` take
the same options, wait, and pass the exit code on.
"""


def run() -> None:
    """Run the command of this process and exit with its code; see EXIT_CODES."""
    from simmim.engine.distributed.launcher import run_as_rank  # noqa: PLC0415

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
    parser = build_parser(argv[:1])
    arguments, overrides = parser.parse_known_args(argv)
    if overrides and not arguments.takes_overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    arguments.ends_process = ends_process
    try:
        code: int = arguments.handler(arguments, overrides)
    except RankLostError as error:
        print(f"simmim {arguments.command}: {printable_lines(error)}", file=sys.stderr)
        return LOST
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        lost = lost_worker(error) if isinstance(error, RuntimeError) else None
        reason = lost or out_of_memory(error)
        if reason is None and isinstance(error, RuntimeError):
            raise
        resume = " Resume with --resume auto." if reason and arguments.command in TRAINING else ""
        text = f"{printable_lines(reason or error)}{resume}"
        print(f"simmim {arguments.command}: {text}", file=sys.stderr)
        return LOST if reason else BAD_INPUT
    except KeyboardInterrupt:
        print(f"simmim {arguments.command}: interrupted", file=sys.stderr)
        return 128 + 2
    return code


def build_parser(names: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Build the parser of all commands.

    Args:
        names: the commands whose arguments are needed; the others are only listed. None for all.
    """
    parser = CommandParser(
        prog="simmim",
        description="Pretrain a Swin Transformer V2 on unlabelled images with SimMIM, and use its "
        "encoder.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=CommandParser
    )
    for name, (summary, add_arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, allow_abbrev=False)
        command.set_defaults(takes_overrides=False)
        if names is None or name in names:
            add_arguments(command)
    return parser


def add_quickstart(command: CommandParser) -> None:
    """Add the arguments of `simmim quickstart`."""
    command.description = "Images → shards → pretraining → encoder → comparison with a random one."
    command.add_argument(
        "--images", type=Path, help="folder, zip or tar of images (default: draw some)"
    )
    command.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/quickstart"),
        help="output folder (default: %(default)s)",
    )
    command.set_defaults(handler=run_quickstart)


def run_quickstart(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim quickstart`."""
    from simmim.quickstart import quickstart  # noqa: PLC0415

    del overrides
    # Once training has ended, the probe follows, which a signal may stop.
    process_exit: ProcessExit = "if stopped" if arguments.ends_process else "no"
    outcome = quickstart(arguments.images, arguments.folder, process_exit=process_exit)
    if outcome.text:
        print(outcome.text)
    return STOPPED if outcome.stopped else 0


def add_pretrain(command: CommandParser) -> None:
    """Add the arguments of `simmim pretrain`."""
    _add_training(command, "Pretrain an encoder on unlabelled images.", ["pretrain"])


def add_finetune(command: CommandParser) -> None:
    """Add the arguments of `simmim finetune`."""
    from simmim.tasks.all_tasks import fine_tuning_tasks  # noqa: PLC0415

    summary = (
        "Fine-tune an encoder on the task of a recipe: --init PATH names the encoder directory or "
        "the finished run to start from."
    )
    _add_training(command, summary, fine_tuning_tasks())


def _add_training(command: CommandParser, summary: str, task_names: Sequence[str]) -> None:
    command.description = f"{summary} --KEY VALUE overrides any field of the recipe."
    command.details = lambda: "\n".join([EXIT_CODES, *(fields_of(name) for name in task_names)])
    command.add_argument("--config", required=True, type=Path, help="recipe, a YAML file")
    command.add_argument("--folder", help="run folder (default: runs/ and the recipe's name)")
    command.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="resume from the last complete checkpoint, or from a given one",
    )
    command.add_argument(
        "--init-from",
        metavar="PATH",
        type=Path,
        help="start from the weights of a run, checkpoint or encoder directory, with a new "
        "optimiser and from the first image; with --resume auto only if there is no checkpoint yet",
    )
    command.add_argument(
        "--allow-recipe-changes",
        action="store_true",
        help="resume although the recipe differs from the one the run was started with",
    )
    command.add_argument(
        "--ignore-memory",
        action="store_true",
        help="train although the memory counted for a step is more than this machine has",
    )
    command.add_argument(
        "--compile",
        action="store_true",
        help="compile the encoder's blocks, as is the default on a GPU",
    )
    command.set_defaults(handler=run_training, takes_overrides=True)


def fields_of(task_name: str) -> str:
    """Return every field of a task's recipe, for help."""
    from simmim.tasks.all_tasks import task_named  # noqa: PLC0415

    fields = describe(task_named(task_name, "help").recipe)
    return f"fields of a recipe with task {task_name}:\n{fields}"


def run_training(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim pretrain` or `simmim finetune`."""
    if arguments.compile:
        overrides = [*overrides, "--execution.compile", "true"]
    task = task_of(arguments)
    recipe = load(task.recipe, arguments.config, overrides)
    from simmim.doctor.fits import check_fits  # noqa: PLC0415 (imports torch)
    from simmim.tasks.train import run_folder, train_recipe  # noqa: PLC0415

    result = train_recipe(
        task.stage,
        recipe,
        run=run_folder(arguments.folder, arguments.config),
        resume=arguments.resume,
        allow_changes=arguments.allow_recipe_changes,
        init_from=arguments.init_from,
        check_memory=None if arguments.ignore_memory else check_fits,
        process_exit="always" if arguments.ends_process else "no",
    )
    return STOPPED if result.stopped else 0


def task_of(arguments: argparse.Namespace) -> "Task":
    """Return the task that `simmim pretrain` or `simmim finetune` is to train.

    Raises:
        RecipeError: the recipe is for another command.
    """
    from simmim.tasks.all_tasks import fine_tuning_named, task_named  # noqa: PLC0415

    if arguments.command == "pretrain":
        return task_named("pretrain", arguments.config)
    return fine_tuning_named(read_values(arguments.config).get("task"), arguments.config)


def add_evaluate(command: CommandParser) -> None:
    """Add the arguments of `simmim evaluate`."""
    command.description = (
        "Validate a checkpoint as training does, and add a line to evaluations.jsonl in the run. "
        "--KEY VALUE overrides any field of its recipe: --data.validation SHARDS uses other data."
    )
    command.add_argument(
        "source", metavar="RUN", type=Path, help="run folder (its best checkpoint) or checkpoint"
    )
    _add_which(command)
    command.add_argument(
        "--data",
        metavar="DATA",
        help="other validation data: shards or a folder of images, clips, a folder of images and "
        "annotations, or a COCO file",
    )
    command.set_defaults(handler=run_evaluate, takes_overrides=True)


def _add_which(command: CommandParser) -> None:
    choice = command.add_mutually_exclusive_group()
    choice.add_argument(
        "--best",
        action="store_const",
        const=True,
        help="use the best checkpoint of the run: the default, but an error where none is known",
    )
    choice.add_argument(
        "--last",
        dest="best",
        action="store_const",
        const=False,
        help="use the last checkpoint of the run, not the best",
    )


def run_evaluate(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim evaluate`."""
    from simmim.tasks.evaluate import evaluate  # noqa: PLC0415

    evaluate(arguments.source, overrides, best=arguments.best, data=arguments.data)
    return 0


def add_probe(command: CommandParser) -> None:
    """Add the arguments of `simmim probe`."""
    command.description = (
        "Fit nearest neighbours and a linear classifier on frozen features, pretrained and random, "
        "and print their accuracies. --KEY VALUE overrides any field of the recipe."
    )
    command.details = _probe_fields
    command.add_argument("--config", required=True, type=Path, help="recipe, a YAML file")
    command.set_defaults(handler=run_probe, takes_overrides=True)


def _probe_fields() -> str:
    from simmim.tasks.probe.recipe import ProbeRecipe  # noqa: PLC0415

    return f"fields of the recipe:\n{describe(ProbeRecipe)}"


def run_probe(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim probe`."""
    from simmim.tasks.probe.recipe import ProbeRecipe  # noqa: PLC0415

    recipe = load(ProbeRecipe, arguments.config, overrides)
    import torch  # noqa: PLC0415 (only once the recipe is right)

    from simmim.tasks.probe.probe import compare, table  # noqa: PLC0415

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    print(table(compare(recipe, device or "cpu")))
    return 0


def add_labels(command: CommandParser) -> None:
    """Add the arguments of `simmim labels`."""
    command.description = (
        "Fine-tune from pretrained and from random weights, for each fraction of the labels and "
        "each seed, and write labels.html with a table and a plot. Runs that are complete are not "
        "repeated. --KEY VALUE overrides any field of the recipe."
    )
    command.add_argument("--config", required=True, type=Path, help="fine-tuning recipe")
    command.add_argument("--init", required=True, help="pretrained run or encoder directory")
    command.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/labels"),
        help="folder of all runs (default: %(default)s)",
    )
    command.add_argument(
        "--fractions",
        metavar="F",
        type=float,
        nargs="+",
        default=[0.01, 0.1, 1.0],
        help="fractions of the labels (default: 0.01 0.1 1)",
    )
    command.add_argument(
        "--seeds",
        metavar="N",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="training seeds (default: 0 1 2)",
    )
    command.set_defaults(handler=run_labels, takes_overrides=True)


def run_labels(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim labels`."""
    from simmim.tasks.label_efficiency import compare_labels  # noqa: PLC0415

    text = compare_labels(
        arguments.config,
        arguments.init,
        arguments.folder,
        fractions=arguments.fractions,
        seeds=arguments.seeds,
        overrides=overrides,
    )
    if text is None:
        print("Stopped. Resume with the same command.")
        return STOPPED
    print(f"{text}\n{arguments.folder / 'labels.html'}")
    return 0


def add_export(command: CommandParser) -> None:
    """Add the arguments of `simmim export`."""
    from simmim.export.cli import add_export_arguments  # noqa: PLC0415

    add_export_arguments(command)
    _add_which(command)


def add_import(command: CommandParser) -> None:
    """Add the arguments of `simmim import`."""
    from simmim.export.cli import add_import_arguments  # noqa: PLC0415

    add_import_arguments(command)


def add_report(command: CommandParser) -> None:
    """Add the arguments of `simmim report`."""
    command.description = (
        "Write report.html into a run: figures, reconstructions, recipe and machine in one file. "
        "Training writes it too, whenever it draws reconstructions."
    )
    command.add_argument("run", metavar="RUN", type=Path, help="run folder")
    command.set_defaults(handler=run_report)


def run_report(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim report`."""
    from simmim.engine.run import RunFolder  # noqa: PLC0415
    from simmim.tasks.train import report_run  # noqa: PLC0415

    del overrides
    print(report_run(RunFolder(path=arguments.run)))
    return 0


def add_doctor(command: CommandParser) -> None:
    """Add the arguments of `simmim doctor`."""
    from simmim.doctor.cli import add_arguments  # noqa: PLC0415

    add_arguments(command)


def add_bench(command: CommandParser) -> None:
    """Add the arguments of `simmim bench`."""
    from simmim.bench.cli import add_arguments  # noqa: PLC0415

    add_arguments(command)


COMMANDS: dict[str, tuple[str, Callable[[CommandParser], None]]] = {
    "quickstart": ("run the whole pipeline on a small set, in minutes", add_quickstart),
    "pretrain": ("pretrain an encoder on unlabelled images", add_pretrain),
    "finetune": ("fine-tune an encoder on the task of a recipe", add_finetune),
    "evaluate": ("validate a trained run, on its data or on other data", add_evaluate),
    "probe": ("compare frozen features, pretrained and random, by kNN and linearly", add_probe),
    "labels": ("compare pretrained and random weights, from few labels to all", add_labels),
    "export": ("export a run's encoder, for other libraries too", add_export),
    "import": ("convert a third-party checkpoint", add_import),
    "report": ("write the HTML report of a run", add_report),
    "doctor": ("check a training setup before it starts", add_doctor),
    "bench": ("estimate and measure the memory that training needs", add_bench),
}
"""Commands: name → summary, and the function that adds the arguments."""
