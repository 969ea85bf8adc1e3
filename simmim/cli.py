"""The command line: `simmim COMMAND`, from quickstart and pretrain to doctor and bench."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from simmim.bench.cli import add_bench
from simmim.doctor.cli import add_doctor
from simmim.engine.distributed.launcher import is_rank, run_as_rank
from simmim.engine.distributed.signals import STOPPED, StopRequest
from simmim.engine.distributed.watchdog import LOST, RankLostError
from simmim.engine.run import RunFolder
from simmim.export.export import FORMATS, export
from simmim.export.import_encoder import IMPORT_FORMATS, Known, import_encoder
from simmim.quickstart import DEFAULT_FOLDER, quickstart
from simmim.recipe import describe, load, read_values
from simmim.report.page import write_report
from simmim.tasks.all_tasks import FINE_TUNING, Task, fine_tuning_named, task_named
from simmim.tasks.evaluate import evaluate
from simmim.tasks.labels import compare_labels
from simmim.tasks.probe.probe import ProbeRecipe, compare, table
from simmim.tasks.training import launch, run_folder
from swinv2.bridges.sizes import PretrainedWindows

BAD_INPUT = 2

EXIT_CODES = f"""exit codes:
  0    done
  {BAD_INPUT}    something is to be changed first: input, recipe, shards, disk, or training diverged
  {STOPPED}   stopped by SIGTERM, SIGINT or SIGUSR1, with a checkpoint (on a full disk: the one
       before, and a warning): go on with --resume auto
  {LOST}   a process hung or was lost (training.rank_timeout): go on with --resume auto
torchrun and accelerate launch end with 1 instead of all of these but 0, and accelerate launch may
not wait for the checkpoint of a stop. With the same options
`python -m simmim.engine.distributed.torchrun` and `python -m simmim.launch` do the same, wait, and
the code arrives.
"""

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def run() -> None:
    """Run the command of this process and exit with its code; see EXIT_CODES."""
    StopRequest.ends_process = True
    if is_rank():
        run_as_rank(main)
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` and return its exit code."""
    parser = build_parser()
    arguments, overrides = parser.parse_known_args(argv)
    if overrides and not arguments.takes_overrides:
        parser.error(f"not understood: {' '.join(overrides)}")
    try:
        code: int = arguments.handler(arguments, overrides)
    except (ValueError, OSError) as error:
        print(f"simmim {arguments.command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except RankLostError as error:
        print(f"simmim {arguments.command}: {error}", file=sys.stderr)
        return LOST
    except RuntimeError as error:
        # torch raises this wherever the main thread happens to be when a data worker is killed.
        if "DataLoader worker" not in str(error):
            raise
        print(f"simmim {arguments.command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"simmim {arguments.command}: interrupted", file=sys.stderr)
        return 128 + 2
    return code


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(prog="simmim", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_quickstart(commands)
    add_training(commands, "pretrain", "pretrain an encoder on unlabelled shards", ("pretrain",))
    add_training(commands, "finetune", "train the task of a recipe on an encoder", FINE_TUNING)
    add_evaluate(commands)
    add_probe(commands)
    add_labels(commands)
    add_export(commands)
    add_import(commands)
    add_report(commands)
    add_doctor(commands)
    add_bench(commands)
    return parser


def add_quickstart(commands: Commands) -> None:
    """Add `simmim quickstart`."""
    command = commands.add_parser(
        "quickstart",
        help="run the whole pipeline on a small set, in minutes",
        description="Images → shards → pretraining → encoder → comparison with a random encoder.",
        allow_abbrev=False,
    )
    command.add_argument(
        "--images", type=Path, help="folder, zip or tar of images (default: draw some)"
    )
    command.add_argument(
        "--folder", type=Path, default=DEFAULT_FOLDER, help="where to write (default: %(default)s)"
    )
    command.set_defaults(handler=run_quickstart, takes_overrides=False)


def run_quickstart(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim quickstart`."""
    del overrides
    outcome = quickstart(arguments.images, arguments.folder)
    print(outcome.text)
    return STOPPED if outcome.stopped else 0


def add_training(commands: Commands, name: str, summary: str, tasks: Sequence[str]) -> None:
    """Add a command that trains from a recipe, of one of some tasks."""
    fields = "\n".join(
        f"fields of a recipe with task {task}:\n{describe(task_named(task, name).recipe)}"
        for task in tasks
    )
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary.capitalize()}. Any field of the recipe is replaced by --KEY VALUE.",
        epilog=f"{EXIT_CODES}\n{fields}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--config", required=True, type=Path, help="the recipe, a YAML file")
    command.add_argument("--folder", help="run folder (default: runs/ and the recipe's name)")
    command.add_argument(
        "--resume", metavar="auto|PATH", help="go on from the last complete checkpoint, or from one"
    )
    command.add_argument(
        "--init-from",
        metavar="PATH",
        type=Path,
        help="start from the weights of a run, a checkpoint or an encoder directory, with a new "
        "optimiser and from the first image; with --resume auto only where nothing was saved yet",
    )
    command.add_argument(
        "--allow-recipe-changes",
        action="store_true",
        help="resume although the recipe differs from the one the run was started with",
    )
    command.add_argument(
        "--compile",
        action="store_true",
        help="compile the encoder's blocks, as --execution.compile true does",
    )
    command.set_defaults(handler=run_training, takes_overrides=True)


def run_training(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim pretrain` or `simmim finetune`."""
    folder = run_folder(arguments.folder, arguments.config)
    resume, changes = arguments.resume, arguments.allow_recipe_changes
    if arguments.compile:
        overrides = [*overrides, "--execution.compile", "true"]
    task = task_of(arguments)
    result = launch(
        task.stage,
        load(task.recipe, arguments.config, overrides),
        run=folder,
        resume=resume,
        allow_changes=changes,
        init_from=arguments.init_from,
    )
    return STOPPED if result.stopped else 0


def task_of(arguments: argparse.Namespace) -> Task:
    """Return what `simmim pretrain` or `simmim finetune` is to train.

    Raises:
        RecipeError: the recipe is for another command.
    """
    if arguments.command == "pretrain":
        return task_named("pretrain", arguments.config)
    return fine_tuning_named(read_values(arguments.config).get("task"), arguments.config)


def add_evaluate(commands: Commands) -> None:
    """Add `simmim evaluate`."""
    command = commands.add_parser(
        "evaluate",
        help="validate what a run has trained, on its data or on other data",
        description="Validate a checkpoint as its training does, and add a line to "
        "evaluations.jsonl in the run. Any field of its recipe is replaced by --KEY VALUE: "
        "--data.validation SHARDS for other images.",
        allow_abbrev=False,
    )
    command.add_argument(
        "source", metavar="RUN", type=Path, help="run folder (its last checkpoint) or checkpoint"
    )
    command.add_argument(
        "--best", action="store_true", help="take the best checkpoint of the run, not its last"
    )
    command.add_argument(
        "--data", metavar="SHARDS", help="other data, short for --data.validation SHARDS"
    )
    command.set_defaults(handler=run_evaluate, takes_overrides=True)


def run_evaluate(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim evaluate`."""
    if arguments.data is not None:
        overrides = [*overrides, "--data.validation", arguments.data]
    evaluate(arguments.source, overrides, best=arguments.best)
    return 0


def add_probe(commands: Commands) -> None:
    """Add `simmim probe`."""
    command = commands.add_parser(
        "probe",
        help="compare frozen features, pretrained and random, by kNN and a linear classifier",
        description="Train nothing but a classifier on frozen features, and print its accuracy. "
        "Any field of the recipe is replaced by --KEY VALUE.",
        epilog=f"fields of the recipe:\n{describe(ProbeRecipe)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--config", required=True, type=Path, help="the recipe, a YAML file")
    command.set_defaults(handler=run_probe, takes_overrides=True)


def run_probe(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim probe`."""
    recipe = load(ProbeRecipe, arguments.config, overrides)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    print(table(compare(recipe, device or "cpu")))
    return 0


def add_labels(commands: Commands) -> None:
    """Add `simmim labels`."""
    command = commands.add_parser(
        "labels",
        help="fine-tune from pretrained and from random weights, with few labels and with all",
        description="Run a fine-tuning recipe from both starts, for each share of the labels and "
        "each seed, and write labels.html with table and plot. Runs that have ended are not "
        "repeated. Any field of the recipe is replaced by --KEY VALUE.",
        allow_abbrev=False,
    )
    command.add_argument("--config", required=True, type=Path, help="recipe of a fine-tuning")
    command.add_argument("--init", required=True, help="the pretrained run or encoder directory")
    command.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/labels"),
        help="of all runs (default: %(default)s)",
    )
    command.add_argument(
        "--fractions",
        metavar="F",
        type=float,
        nargs="+",
        default=[0.01, 0.1, 1.0],
        help="shares of the labels (default: 0.01 0.1 1)",
    )
    command.add_argument(
        "--seeds", metavar="N", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)"
    )
    command.set_defaults(handler=run_labels, takes_overrides=True)


def run_labels(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim labels`."""
    text = compare_labels(
        arguments.config,
        arguments.init,
        arguments.folder,
        fractions=arguments.fractions,
        seeds=arguments.seeds,
        overrides=overrides,
    )
    print(f"{text}\n{arguments.folder / 'labels.html'}")
    return 0


def add_export(commands: Commands) -> None:
    """Add `simmim export`."""
    command = commands.add_parser(
        "export",
        help="write a run's encoder for others to load",
        description="Write the encoder of a run's last checkpoint, or of an encoder directory; "
        "native has the head of a fine-tuning too.",
        allow_abbrev=False,
    )
    command.add_argument(
        "source", metavar="RUN", type=Path, help="run folder, checkpoint or encoder directory"
    )
    command.add_argument("destination", metavar="DST", type=Path, help="folder to write")
    command.add_argument(
        "--format",
        choices=FORMATS,
        default="native",
        help="native is an encoder directory with any head, transformers and timm what these "
        "libraries load, reference a checkpoint of the published code, onnx and torch-export a "
        "graph that runs without this code (default: %(default)s)",
    )
    command.add_argument(
        "--any-size",
        action="store_true",
        help="onnx and torch-export: leave height and width open (default: the encoder's size)",
    )
    command.add_argument(
        "--best", action="store_true", help="take the best checkpoint of the run, not its last"
    )
    command.set_defaults(handler=run_export, takes_overrides=False)


def run_export(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim export`."""
    del overrides
    lines = export(
        arguments.source,
        arguments.destination,
        arguments.format,
        any_size=arguments.any_size,
        best=arguments.best,
    )
    print("\n".join(lines))
    return 0


def add_import(commands: Commands) -> None:
    """Add `simmim import`."""
    command = commands.add_parser(
        "import",
        help="make an encoder directory of a checkpoint of others",
        description="Write the encoder of a Swin Transformer V2 checkpoint as an encoder "
        "directory. The sizes below are looked for in the file, and asked for where it does not "
        "tell them. Nothing in the file is run.",
        allow_abbrev=False,
    )
    command.add_argument("source", metavar="SRC", type=Path, help="checkpoint file or folder")
    command.add_argument("destination", metavar="DST", type=Path, help="folder to write")
    command.add_argument(
        "--format",
        required=True,
        choices=IMPORT_FORMATS,
        help="reference is the published code's (Swin Transformer, SimMIM), timm its swinv2 "
        "models, transformers a folder that save_pretrained of a Swinv2 class wrote",
    )
    command.add_argument(
        "--architecture", metavar="NAME", help="timm's name of the model, which tells all sizes"
    )
    command.add_argument(
        "--image-size", metavar="N|H,W", type=_size, help="that it was trained at, in pixels"
    )
    command.add_argument("--window-size", metavar="N|H,W", type=_size, help="in tokens")
    command.add_argument(
        "--pretrained-windows",
        metavar="same|N,N,...",
        type=_windows,
        help="window of each stage in pretraining, in tokens; same where it was trained at these",
    )
    for name in ("mean", "std"):
        command.add_argument(
            f"--{name}",
            metavar="X,X,...",
            type=_numbers,
            help=f"{name} of each channel, for images in [0, 1] (default: what the file says, "
            "or ImageNet's)",
        )
    command.set_defaults(handler=run_import, takes_overrides=False)


def run_import(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim import`."""
    del overrides
    known = Known(
        architecture=arguments.architecture,
        image_size=arguments.image_size,
        window_size=arguments.window_size,
        pretrained_window_sizes=arguments.pretrained_windows,
        mean=arguments.mean,
        std=arguments.std,
    )
    lines = import_encoder(arguments.source, arguments.destination, arguments.format, known)
    print("\n".join(lines))
    return 0


def add_report(commands: Commands) -> None:
    """Add `simmim report`."""
    command = commands.add_parser(
        "report",
        help="write the page of a run",
        description="Write report.html into a run: figures, reconstructions, recipe and machine in "
        "one file. Training writes it too, whenever it draws pictures.",
        allow_abbrev=False,
    )
    command.add_argument("run", metavar="RUN", type=Path, help="run folder")
    command.set_defaults(handler=run_report, takes_overrides=False)


def run_report(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run `simmim report`."""
    del overrides
    print(write_report(RunFolder(path=arguments.run)))
    return 0


def _size(text: str) -> int | tuple[int, int]:
    match [int(part) for part in text.split(",")]:
        case [side]:
            return side
        case [height, width]:
            return height, width
    raise argparse.ArgumentTypeError(f"{text!r} is no size: give a number, or height,width")


def _windows(text: str) -> PretrainedWindows:
    return "same" if text == "same" else [int(part) for part in text.split(",")]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]
