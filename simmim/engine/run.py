"""The run folder: where a training keeps its recipe, metrics, checkpoints, pictures and encoder."""

import errno
import fcntl
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.format.atomic import atomic_write_text
from simmim.disk import append_whole, goes_on_without
from simmim.engine.checkpoint.directory import RECIPE_FILE, discard_all, remove_later_checkpoints
from simmim.recipe import differences, read_values, to_values, to_yaml

LOCK = ".lock"
"""File in the run folder that the process which writes there has locked."""

FREE_TO_CHANGE = (
    "data.shards",  # they may have moved; `saving.fitting_state` compares what they hold
    "data.workers",
    "data.max_bad_share",
    "data.remote",
    "data.cache_dir",
    "data.cache_bytes",
    "data.attempts",
    "data.allow_pipe",
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
"""Recipe keys and sections that may differ on resume: they change no batch and no schedule."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The paths of one run, and what may be done with them."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe, every default written out."""
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, a line for each logged step."""
        return self.path / "metrics.jsonl"

    @property
    def bad_samples(self) -> Path:
        """One JSON object a line, a line for each sample that was replaced or left out."""
        return self.path / "bad_samples.jsonl"

    @property
    def anomalies(self) -> Path:
        """One JSON object a line: the steps that were skipped, and the samples in them."""
        return self.path / "anomalies.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of `step-00001000/` folders."""
        return self.path / "checkpoints"

    @property
    def reconstructions(self) -> Path:
        """The folder of `step-….png` pictures."""
        return self.path / "reconstructions"

    @property
    def environment(self) -> Path:
        """The machine and the versions of what it is trained with."""
        return self.path / "environment.json"

    @property
    def report(self) -> Path:
        """The page that shows all of the run."""
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
    ) -> dict[str, str]:
        """Refuse to mix runs, before anything is written.

        Args:
            recipe: what is to be trained.
            resume: whether to go on with what is there.
            checkpoint: from which, where there is one; its recipe is the one to compare with.
            allow_changes: let the recipe differ in anything.

        Returns:
            What differs from the saved recipe and was let pass: dotted key → `old → new`.

        Raises:
            ValueError: the folder holds something and `resume` was not asked for, or the recipe
                differs from the saved one in what changes the weights.
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
        changed = differences(read_values(saved), to_values(recipe))
        refused = [f"{key}: {text}" for key, text in changed.items() if not _is_free(key)]
        if refused and not allow_changes:
            listed = "\n  ".join(refused)
            raise ValueError(
                f"the recipe differs from the one that {self.path} was started with:\n  {listed}\n"
                f"Resume with {saved}, start another run, or accept this with "
                "--allow-recipe-changes."
            )
        return changed

    def _is_empty(self) -> bool:
        return all(path.name == LOCK for path in self.path.iterdir())

    def lock(self, patience: float = 10.0) -> None:
        """Keep every other process from writing into the run, until this one ends.

        Args:
            patience: seconds to wait for another to end: ranks outlive a kill by a moment.

        Raises:
            ValueError: another process still writes into the run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + patience
        # Never closed: it is open, and so locked, as long as the process lives.
        file = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return  # a file system without locks
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"another process is writing into {self.path}: wait for it, stop it, or "
                        "choose another folder with --folder."
                    ) from None
                time.sleep(0.1)
            else:
                return

    def begin(self, recipe: Any, *, step: int) -> None:
        """Write the recipe, and drop what is of steps after `step`, which will be taken again."""
        self.path.mkdir(parents=True, exist_ok=True)
        discard_all(self.checkpoints)
        remove_later_checkpoints(self.checkpoints, step)
        atomic_write_text(self.recipe, to_yaml(recipe))
        if self.metrics.is_file():
            # Before the first step nothing is kept: what stands at step 0 is written again too.
            kept = [line for line in self._metric_lines() if 0 < step >= line["step"]]
            atomic_write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def _metric_lines(self) -> list[dict[str, Any]]:
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        # A line without its end is one that a kill cut short, or that is being written.
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the logged lines; empty if there are none yet."""
        return self._metric_lines() if self.metrics.is_file() else []

    def log(self, metrics: dict[str, float | int | str]) -> None:
        """Append one line to `metrics.jsonl`, without what is no finite number: JSON has none."""
        metrics = {
            name: value
            for name, value in metrics.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        with (
            goes_on_without("a line of metrics", self.metrics),
            self.metrics.open("ab", buffering=0) as file,
        ):
            append_whole(file, json.dumps(metrics).encode() + b"\n")


def _is_free(key: str) -> bool:
    """Tell whether the dotted key, or a section around it, is in FREE_TO_CHANGE."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)
