"""Run folder: recipe, metrics, checkpoints, pictures and encoder of a training."""

import json
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.format.atomic import atomic_write_text, remove_leftovers
from data_prep.validation import parse_json
from simmim.disk import append_line, skip_if_unwritable
from simmim.engine.checkpoint.directory import (
    RECIPE_FILE,
    discard_all,
    remove_later_checkpoints,
)
from simmim.engine.folder_lock import LOCK, locked_folder
from simmim.engine.metrics_file import keep_lines_up_to, read_lines
from simmim.recipe import differences, read_values, to_values, to_yaml

IDENTITY = "run.json"
"""File in the run folder with the identity of the run."""

FREE_TO_CHANGE = (
    "data.shards",  # they may have moved; `resumable_state` compares their digest
    "data.include",
    "data.exclude",
    "data.workers",
    "data.max_bad_share",
    "data.remote",
    "data.cache_dir",
    "data.cache_bytes",
    "data.attempts",
    "data.allow_pipe",
    "data.picture_bands",
    "data.stream.tars",  # as data.shards
    "data.stream.shuffle",  # a resumed run starts a new shuffle in any case
    "execution",
    "training.accumulation",
    "training.log_every",
    "training.checkpoint_every",
    "training.keep_last",
    "training.keep_every",
    "training.keep_best",
    "training.validate_every",
    "training.look_every",
    "training.max_nonfinite",
    "training.rank_timeout",
    "training.trackers",
    "probe",
)
"""Recipe keys and sections that may change on resume: they affect neither batches nor schedule."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Paths and files of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe, with all defaults."""
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        """Figures of each logged step, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def bad_samples(self) -> Path:
        """Samples that were replaced or left out, one JSON object per line."""
        return self.path / "bad_samples.jsonl"

    @property
    def anomalies(self) -> Path:
        """Skipped steps and their samples, one JSON object per line."""
        return self.path / "anomalies.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints `step-00001000/`."""
        return self.path / "checkpoints"

    @property
    def reconstructions(self) -> Path:
        """Folder of the pictures `step-….png`."""
        return self.path / "reconstructions"

    @property
    def environment(self) -> Path:
        """Machine and versions that the run was trained with."""
        return self.path / "environment.json"

    @property
    def report(self) -> Path:
        """HTML report of the run."""
        return self.path / "report.html"

    @property
    def encoder(self) -> Path:
        """The encoder directory, the latest export."""
        return self.path / "encoder"

    def check(
        self,
        recipe: Any,
        *,
        resume: bool,
        checkpoint: Path | None = None,
        allow_changes: bool = False,
        given: Any = None,
    ) -> dict[str, str]:
        """Check, before anything is written, that this folder can be used.

        Args:
            recipe: the recipe to train.
            resume: whether to resume the run that is there.
            checkpoint: checkpoint to resume from, if any; its recipe is the one to compare with.
            allow_changes: accept any change of the recipe.
            given: the recipe before the architecture that is trained was filled in, as earlier
                versions saved it; None if it is the same.

        Returns:
            The accepted changes from the saved recipe: dotted key → `old → new`.

        Raises:
            ValueError: the folder is not empty and `resume` is false, or a change of the recipe
                would change the weights.
        """
        if not resume:
            if self.path.exists() and not (self.path.is_dir() and self._is_empty()):
                raise ValueError(
                    f"run folder {self.path} is not empty. Continue that run with --resume auto, "
                    "or choose another with --folder."
                )
            return {}
        saved = self.recipe if checkpoint is None else checkpoint / RECIPE_FILE
        if not saved.is_file():
            return {}
        before, now = read_values(saved), to_values(recipe)
        asked = now if given is None else to_values(given)
        names = [values.get("data", {}).get("channels") for values in (before, now)]
        if asked.get("data", {}).get("channels") is None and None in names:
            before, now = _without_channels(before), _without_channels(now)
        changed = differences(before, now)
        if given is not None:
            as_before = differences(before, to_values(given))
            changed = as_before if all(map(_is_free, as_before)) else changed
        refused = [f"{key}: {text}" for key, text in changed.items() if not _is_free(key)]
        if refused and not allow_changes:
            listed = "\n  ".join(refused)
            raise ValueError(
                f"the recipe differs from the one that {self.path} was started with:\n  {listed}\n"
                f"Resume with {saved}, start another run, or accept this with "
                "--allow-recipe-changes."
            )
        return changed

    def identity(self) -> str:
        """Return the random identity of the run, which its checkpoints carry; empty without one.

        Raises:
            ValueError: the file that holds it is damaged.
        """
        file = self.path / IDENTITY
        try:
            return parse_json(file.read_bytes(), dict[str, str])["run"]
        except FileNotFoundError:
            return ""  # a new run, or one of an earlier version
        except (ValueError, KeyError):
            raise ValueError(
                f"{file} is damaged: remove it, and the run takes the identity of the checkpoint "
                "that it resumes from."
            ) from None

    def set_identity(self, identity: str) -> None:
        """Write the identity of the run, unless it is written already."""
        if self.identity() != identity:
            atomic_write_text(self.path / IDENTITY, json.dumps({"run": identity}) + "\n")

    def _is_empty(self) -> bool:
        return all(path.name == LOCK for path in self.path.iterdir())

    def locked(self, timeout: float = 10.0) -> AbstractContextManager[None]:
        """Return a context in which the run folder is locked; see `locked_folder`."""
        return locked_folder(self.path, timeout)

    def begin(self, recipe: Any, *, step: int) -> None:
        """Write the recipe, and remove checkpoints, metrics and anomalies of steps after `step`."""
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.reconstructions):
            remove_leftovers(folder)
        discard_all(self.checkpoints)
        remove_later_checkpoints(self.checkpoints, step)
        atomic_write_text(self.recipe, to_yaml(recipe))
        for file in (self.metrics, self.anomalies):
            keep_lines_up_to(file, step)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the figures of the logged lines by step, without damaged lines."""
        lines = [line.figures for line in read_lines(self.metrics) if line.step is not None]
        return sorted(lines, key=lambda line: int(line["step"]))

    def log(self, metrics: dict[str, float | int | str]) -> None:
        """Append a line to `metrics.jsonl`, without non-finite numbers, which JSON lacks."""
        metrics = {
            name: value
            for name, value in metrics.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        with (
            skip_if_unwritable("a line of metrics", self.metrics),
            self.metrics.open("ab", buffering=0) as file,
        ):
            append_line(file, json.dumps(metrics).encode() + b"\n")


def _without_channels(values: dict[str, Any]) -> dict[str, Any]:
    """Return values without the channel names.

    Earlier versions did not record them, and they are not known before the data are read.
    """
    data = {name: value for name, value in values.get("data", {}).items() if name != "channels"}
    return values | {"data": data}


def _is_free(key: str) -> bool:
    """Return whether the dotted key, or a section that contains it, is in FREE_TO_CHANGE."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)
