"""The command `simmim bench gpu`; it uses argparse, as it also runs without cyclopts."""

import argparse
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from data_prep.format.atomic import atomic_write_text
from data_prep.format.text import count_noun
from simmim.bench.gpu.cells import Results
from simmim.bench.gpu.command import run_plan
from simmim.bench.gpu.report import write_report
from simmim.bench.gpu.scale import FULL

DESCRIPTION = (
    "Check that training works correctly on this GPU, then measure its speed. Writes results.json "
    "after every check and measurement, and report.md at the end. The most informative ones come "
    "first; those that do not fit into the time limit are left to a further call with --continue, "
    "which repeats nothing. A failure is recorded, the rest still runs, and the exit code is 1. "
    "`python -m simmim.bench.gpu` does the same where packages that only training needs, such as "
    "pydantic, cyclopts or simplejpeg, are not installed: checks that need them are skipped."
)


def _add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--minutes", type=_minutes, default=8.0, help="time limit (default: %(default)s)"
    )
    command.add_argument(
        "--continue",
        dest="earlier",
        type=Path,
        metavar="FILE",
        help="results.json of an earlier call: run what is left, and add to it",
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="run everything on a CPU at tiny sizes: the figures mean nothing",
    )
    command.add_argument(
        "--output",
        type=Path,
        default=Path("runs/bench-gpu"),
        metavar="DIR",
        help="folder of results.json and report.md (default: %(default)s)",
    )


def _minutes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def main(argv: Sequence[str], program: str = "python -m simmim.bench.gpu") -> int:
    """Run the command without the rest of simmim, and return its exit code."""
    parser = argparse.ArgumentParser(prog=program, description=DESCRIPTION, allow_abbrev=False)
    _add_arguments(parser)
    try:
        arguments, unknown = parser.parse_known_args(argv)
        if unknown:
            parser.error(f"unknown: {unknown[0]}.{_suggestion(unknown[0])}")
        return run_gpu(arguments)
    except (ValueError, OSError) as error:
        print(f"simmim bench gpu: {error}", file=sys.stderr)
        return 2


def _suggestion(given: str) -> str:
    """Return a suggestion for an unknown option; empty if none is close."""
    options = ("--minutes", "--continue", "--dry-run", "--output", "--help")
    close = get_close_matches(given.partition("=")[0], options, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def run_gpu(arguments: argparse.Namespace) -> int:
    """Run the cells that are left, write the report, and return the exit code."""
    deadline = time.time() + 60 * arguments.minutes
    results = _continued(arguments) if arguments.earlier else _begun(arguments)
    interrupted = False
    try:
        finished = run_plan(results, deadline=deadline)
    except KeyboardInterrupt:
        interrupted, finished = True, False
    results = Results.load(results.path)
    if results.running is not None:
        results.postpone(results.running)
    report = results.path.parent / "report.md"
    atomic_write_text(report, write_report(results.document))
    statuses = [one["status"] for one in results.cells.values()]
    failed, skipped = statuses.count("failed"), statuses.count("skipped")
    print(f"{count_noun(len(statuses), 'cell')} done: {failed} failed, {skipped} skipped. {report}")
    if not finished:
        dry = " --dry-run" if arguments.dry_run else ""
        print(f"To do the rest: simmim bench gpu{dry} --continue {results.path}")
    if interrupted:
        return 128 + 2
    return 1 if failed else 0


def _begun(arguments: argparse.Namespace) -> Results:
    path = arguments.output / "results.json"
    if path.exists():
        raise ValueError(
            f"{path} exists: add --continue {path} to do what is left, or choose another --output."
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    return Results.begin(
        path, {"dry run": arguments.dry_run, "seed": FULL.seed, "command": _command(arguments)}
    )


def _continued(arguments: argparse.Namespace) -> Results:
    results = Results.load(arguments.earlier)
    if results.document["settings"]["dry run"] != arguments.dry_run:
        raise ValueError(
            f"{arguments.earlier} was begun {'without' if arguments.dry_run else 'with'} "
            "--dry-run: continue it in the same way."
        )
    return results


def _command(arguments: argparse.Namespace) -> str:
    dry = " --dry-run" if arguments.dry_run else ""
    return f"simmim bench gpu --minutes {arguments.minutes:g}{dry}"
