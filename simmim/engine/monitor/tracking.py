"""TensorBoard, wandb and mlflow: they receive what `metrics.jsonl` does, by accelerate's classes.

An error of a tracker is printed once and never ends training.
"""

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.format.atomic import atomic_write_text
from data_prep.validation import parse_json
from simmim.engine.run import RunFolder
from simmim.engine.settings import TrackerName, Trackers
from simmim.recipe import to_values, to_yaml

PROJECT = "simmim"
"""Project name in trackers that group runs."""
PACKAGES: dict[TrackerName, str] = {
    "tensorboard": "'simmim[track]'",
    "wandb": "wandb",
    "mlflow": "mlflow",
}
"""What pip installs for each tracker."""
FAILURES = 5
"""Consecutive failures after which a tracker is dropped: each may have waited for a network."""


def chosen_trackers(trackers: Trackers) -> tuple[TrackerName, ...]:
    """Return the names of the trackers to use; `auto` is TensorBoard if it is installed.

    Raises:
        ValueError: a tracker that is requested by name is not installed.
    """
    from accelerate.tracking import get_available_trackers  # noqa: PLC0415 (imports torch)

    installed = [str(name) for name in get_available_trackers()]
    if trackers == "auto":
        return ("tensorboard",) if "tensorboard" in installed else ()
    for name in trackers:
        if name not in installed:
            raise ValueError(
                f"training.trackers names {name}, which is not installed: "
                f"pip install {PACKAGES[name]}, or leave it out."
            )
    return tuple(dict.fromkeys(trackers))


class Tracking:
    """The trackers of one run, on its main process.

    Args:
        run: the run folder, which also holds TensorBoard's events and the ids at services.
        names: names of installed trackers.
        recipe: recipe to store as the configuration of the run.
        step: step after which training begins and series continue.
        warn: prints a warning.
    """

    def __init__(
        self,
        run: RunFolder,
        names: Sequence[TrackerName],
        *,
        recipe: Any,
        step: int,
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._failures: dict[TrackerName, int] = {}
        self._trackers: dict[TrackerName, Any] = {}
        ids = _Ids(run.path / "trackers.json")
        for name in names:
            self._try(name, partial(self._open, name, run, ids, recipe, step))

    def _open(self, name: TrackerName, run: RunFolder, ids: "_Ids", recipe: Any, step: int) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # noqa: PLC0415 (imports torch)

        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        match name:
            case "tensorboard":
                # Events of later steps, which will be trained again, are hidden.
                tracker = tracker_class("tensorboard", run.path, purge_step=step + 1)
            case "wandb":
                series = ids.get(name, uuid.uuid4().hex[:12])
                tracker = tracker_class(
                    PROJECT, name=run.path.name, id=series, resume="allow", dir=str(run.path)
                )
            case "mlflow":
                tracker = tracker_class(PROJECT, run_name=run.path.name, run_id=ids.known(name))
        tracker.start()
        self._trackers[name] = tracker
        if name == "mlflow":
            if ids.known(name) is not None:
                return  # its parameters cannot be changed, as a resumed run's recipe may be
            ids.get(name, tracker.tracker.info.run_id)
        if name == "tensorboard":  # its hyperparameters would create a folder on each resume
            tracker.writer.add_text("recipe", f"```yaml\n{to_yaml(recipe)}```", step)
        else:
            tracker.store_init_configuration(dict(flattened(to_values(recipe))))

    def log(self, figures: Mapping[str, float | int | str], step: int) -> None:
        """Log the figures that are numbers."""
        numbers = {key: value for key, value in figures.items() if not isinstance(value, str)}
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(tracker.log, numbers, step=step))

    def log_picture(self, title: str, picture: Path, step: int) -> None:
        """Log a picture."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(_show, name, tracker, title, picture, step))

    def close(self) -> None:
        """Finish all trackers."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.finish)

    def _try(self, name: TrackerName, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # trackers raise errors of their own and of the network
            count = self._failures[name] = self._failures.get(name, 0) + 1
            text = (str(error).splitlines() or [""])[0]
            if count == 1:
                self._warn(
                    f"WARNING: tracker {name} failed: {type(error).__name__}: {text}. Training "
                    "continues."
                )
            if count >= FAILURES and self._trackers.pop(name, None) is not None:
                self._warn(
                    f"WARNING: tracker {name} failed {count} times in a row and is no longer used."
                )
        else:
            self._failures[name] = min(self._failures.get(name, 0), 1)  # counted again


def _show(name: TrackerName, tracker: Any, title: str, picture: Path, step: int) -> None:
    match name:
        case "tensorboard":
            with Image.open(picture) as image:
                pixels = np.asarray(image.convert("RGB"))
            tracker.log_images({title: pixels[None]}, step=step, dataformats="NHWC")
        case "wandb":
            with Image.open(picture) as image:
                tracker.log_images({title: [np.asarray(image.convert("RGB"))]}, step=step)
        case "mlflow":
            tracker.log_artifact(str(picture), artifact_path=title)


class _Ids:
    """Ids of a run at tracking services, which a resumed run continues."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._ids = parse_json(path.read_bytes(), dict[str, str])
        except (OSError, ValueError):
            self._ids = {}

    def known(self, name: str) -> str | None:
        return self._ids.get(name)

    def get(self, name: str, new: str) -> str:
        if name not in self._ids:
            self._ids[name] = new
            atomic_write_text(self._path, json.dumps(self._ids) + "\n")
        return self._ids[name]


def flattened(values: Any, prefix: str = "") -> Iterator[tuple[str, float | int | str | bool]]:
    """Yield a recipe's values under dotted keys; lists and null are converted to text."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from flattened(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values if isinstance(values, float | int | str | bool) else json.dumps(values)
