"""`simmim labels`: fine-tuning with few labels, from pretrained and from random weights.

Both initialisations get the same recipe and train the same architecture, that of the pretrained
encoder, on images of the same mean and std; both start with a random head. Each seed draws its own
subset of the labels, the same one for both initialisations. Finished runs are not repeated; stopped
ones are resumed.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from data_prep.format.atomic import atomic_write_text, remove_leftovers
from data_prep.format.text import count_noun
from simmim.engine.exit_codes import LOST, STOPPED, RankLostError
from simmim.engine.folder_lock import locked_folder
from simmim.engine.run import RunFolder
from simmim.recipe import load, read_values
from simmim.report.labels_page import LabelScores, labels_page, scores_svg, table_of
from simmim.stop_signals import StopRelay
from simmim.tasks.all_tasks import fine_tuning_named, fine_tuning_tasks, head_folders
from simmim.tasks.loading import with_recorded_slots
from simmim.tasks.other_encoder import other_class
from simmim.tasks.recipe import SCRATCH, FineTuningRecipe

Start = Literal["pretrained", "scratch"]


@dataclass(frozen=True, kw_only=True)
class LabelRun:
    """One fine-tuning run of the comparison."""

    start: Start
    fraction: float
    """Fraction of the labels."""
    seed: int
    """Seed of the training and of the subset of labels."""

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.start}-{100 * self.fraction:g}-seed{self.seed}"


def compare_labels(
    config: Path,
    init: str,
    folder: Path,
    *,
    fractions: Sequence[float],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
) -> str | None:
    """Train all runs that are not finished, and write labels.html, labels.svg and labels.json.

    Args:
        config: a fine-tuning recipe of any task, with validation data. A length in steps is the
            same for all fractions; in epochs, smaller fractions train for fewer steps.
        init: the pretrained weights; see `ClassificationRecipe.init`.
        folder: output folder of all runs and the report.
        fractions: fractions of the labels, above 0 and at most 1.
        seeds: seeds of the runs.
        overrides: `--key value` for every run.

    Returns:
        The table as text; None if a signal stopped a run, which wrote a checkpoint.

    Raises:
        ValueError: the recipe cannot be used, a run in the folder has a different one, or a run
            failed.
        RankLostError: a run lost a process, and is worth retrying.
    """
    task = fine_tuning_named(read_values(config, overrides).get("task"), config)
    planned = {
        run: _arguments(run, init, overrides, task.recipe) for run in _runs(fractions, seeds)
    }
    recipes: dict[LabelRun, FineTuningRecipe] = {
        run: load(task.recipe, config, arguments) for run, arguments in planned.items()
    }  # reports mistakes in a recipe before the first run
    trained = {run: task.stage.resolve(recipe) for run, recipe in recipes.items()}
    _check_runs(recipes, trained, folder)
    notes = _notes(config, init, next(iter(trained.values())))
    with locked_folder(folder):
        remove_leftovers(folder)
        metric = _check_runs(recipes, trained, folder)  # others may have run meanwhile
        if not _train_all(config, folder, metric, planned, notes):
            return None
    table = table_of(_scores(folder, list(planned), metric), metric)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = (
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        for row in table
    )
    return "\n".join(line.rstrip() for line in lines)


def _train_all(
    config: Path,
    folder: Path,
    metric: str,
    planned: Mapping[LabelRun, Sequence[str]],
    notes: Sequence[str],
) -> bool:
    """Train the runs that are not finished; return whether all reached their end."""
    runs = list(planned)
    for note in notes[1:]:
        sys.stderr.write(f"{note}\n")
    for number, run in enumerate(runs, start=1):
        place = RunFolder(path=folder / run.name)
        if _score(place, metric) is None:
            sys.stderr.write(f"run {number} of {len(runs)}: {run.name}\n")
            if not _train(config, place, metric, planned[run]):
                return False
        _write(folder, notes, metric, _scores(folder, runs, metric))
    return True


def _check_runs(
    recipes: Mapping[LabelRun, FineTuningRecipe],
    trained: Mapping[LabelRun, FineTuningRecipe],
    folder: Path,
) -> str:
    """Check the runs that are finished; return the metric that is compared.

    Raises:
        ValueError: a run in the folder has a different recipe.
    """
    metric = ""
    for run, recipe in recipes.items():
        metric = recipe.best_metric
        place = RunFolder(path=folder / run.name)
        if _score(place, metric) is not None:
            given, recorded = (
                with_recorded_slots(one, place, "auto") for one in (recipe, trained[run])
            )
            place.check(recorded, resume=True, given=given)
    return metric


def _runs(fractions: Sequence[float], seeds: Sequence[int]) -> Iterator[LabelRun]:
    """Yield all runs; one seed's comparison is complete before the next seed starts."""
    starts: tuple[Start, ...] = ("pretrained", "scratch")
    for seed in seeds:
        for fraction in fractions:
            for start in starts:
                yield LabelRun(start=start, fraction=fraction, seed=seed)


def _arguments(
    run: LabelRun, init: str, overrides: Sequence[str], recipe: type[FineTuningRecipe]
) -> list[str]:
    """Return the recipe overrides of a run."""
    if run.start == SCRATCH:
        start = {"init": SCRATCH, "like": init}
    else:
        # A head may have been trained on all labels; and the other initialisation has none.
        start = {"init": init, **recipe.without_head(init)}
    own = {
        **start,
        "data.fraction": f"{run.fraction:g}",
        "data.fraction_seed": str(run.seed),
        "training.seed": str(run.seed),
    }
    return [*overrides, *(text for key, value in own.items() for text in (f"--{key}", value))]


def _train(config: Path, place: RunFolder, metric: str, arguments: Sequence[str]) -> bool:
    """Train one run in a process of its own; return whether it reached its end."""
    command = [sys.executable, "-m", "simmim", "finetune", "--config", str(config)]
    command += ["--folder", str(place.path), "--resume", "auto", *arguments]
    with StopRelay() as relay:
        code = subprocess.run(command, check=False).returncode
    if code == STOPPED or (code and relay.asked):
        return False
    if code == LOST:
        raise RankLostError(
            f"{place.path} lost a process: see its output above; the same command resumes here."
        )
    if code != 0 or _score(place, metric) is None:
        raise ValueError(
            f"{place.path} ended with exit code {code}"
            + ("" if code else f" and without a validation {metric}: give validation data")
            + ". See its output above; the same command resumes from here."
        )
    return True


def _score(place: RunFolder, metric: str) -> float | None:
    """Return the last validation score of a finished run, not its best: that is selected on it."""
    if not place.encoder.is_dir():
        return None
    found = [line[metric] for line in place.read_metrics() if metric in line]
    return float(found[-1]) if found else None


def _scores(folder: Path, runs: Sequence[LabelRun], metric: str) -> list[LabelScores]:
    """Return the scores of the finished runs, by initialisation and fraction."""
    values: dict[tuple[str, float], list[float]] = {}
    for run in runs:
        score = _score(RunFolder(path=folder / run.name), metric)
        if score is not None:
            values.setdefault((run.start, run.fraction), []).append(score)
    return [
        LabelScores(start=start, fraction=fraction, values=tuple(found))
        for (start, fraction), found in values.items()
    ]


def _notes(config: Path, init: str, trained: FineTuningRecipe) -> list[str]:
    """Return paragraphs on what is compared: the protocol, the architecture, and any doubt."""
    encoder = trained.encoder
    protocol = (
        f"Fine-tuning with {config} from both initialisations; pretrained is {init}. Mean and "
        "standard deviation over seeds, each with its own subset of the labels; last validation "
        "of each run."
    )
    places = (Path(init), RunFolder(path=Path(init)).encoder)
    other = next(filter(None, map(other_class, places)), None)
    what = f"the architecture of {init} ({encoder.architecture}) on {trained.input_text}"
    if other is not None:  # the sizes in the recipe are those of a SwinV2
        what = f"a {other}, as in {init}, on {trained.data.image_size} pixels"
    architecture = (
        f"Both initialisations train {what}, {count_noun(encoder.in_channels, 'channel')}, with "
        "its mean and std, and start with a random head."
    )
    notes = [protocol, architecture]
    if saw_labels(init):
        notes.append(
            f"WARNING: {init} was fine-tuned with labels. Its head is not used, but its encoder "
            "has learned from them: if they are these labels, the comparison shows more than "
            "pretraining gives."
        )
    return notes


def saw_labels(init: str) -> bool:
    """Return whether an encoder is known to have been fine-tuned: a run, or an export with a head.

    The encoder directory in a run counts as the run.
    """
    path = Path(init)
    for recipe in (path / "recipe.yaml", path.parent / "recipe.yaml"):
        if recipe.is_file() and read_values(recipe).get("task") in fine_tuning_tasks():
            return True
    return any((path / name).is_dir() for name in head_folders())


def _write(folder: Path, notes: Sequence[str], metric: str, scores: Sequence[LabelScores]) -> None:
    page = labels_page("Accuracy with few labels", scores, metric, notes)
    atomic_write_text(folder / "labels.html", page)
    atomic_write_text(folder / "labels.svg", scores_svg(scores) + "\n")
    text = json.dumps([asdict(one) for one in scores], indent=1)
    atomic_write_text(folder / "labels.json", text + "\n")
