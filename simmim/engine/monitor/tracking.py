"""Trackers: where metrics go beside `metrics.jsonl`, through accelerate's classes.

A tracker is a convenience: what it raises is said once, and never ends training.
"""

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image

from data_prep.format.atomic import atomic_write_text
from simmim.engine.run import RunFolder
from simmim.engine.settings import Trackers
from simmim.recipe import to_values, to_yaml

PROJECT = "simmim"
"""What runs are gathered under, where a tracker has such a thing."""
PACKAGES = {"tensorboard": "'simmim[track]'", "comet_ml": "comet-ml"}
"""What pip calls the packages that have another name."""
FAILURES = 5
"""Failures in a row after which a tracker is left alone: each may have waited for a network."""


def chosen_trackers(trackers: Trackers) -> tuple[str, ...]:
    """Return the names of the trackers to use; `auto` is TensorBoard where it is installed.

    Raises:
        ValueError: one that was asked for by name is not installed.
    """
    installed = [str(name) for name in get_available_trackers()]
    if trackers == "auto":
        return ("tensorboard",) if "tensorboard" in installed else ()
    for name in trackers:
        if name not in installed:
            raise ValueError(
                f"training.trackers names {name}, which is not installed: "
                f"pip install {PACKAGES.get(name, name)}, or leave it out."
            )
    return tuple(dict.fromkeys(trackers))


class Tracking:
    """The trackers of one run, on its main process.

    Args:
        run: its folder, where TensorBoard writes and the names of series at services are kept.
        names: of trackers that are installed.
        recipe: what they show as the run's configuration.
        step: that training begins after: series go on from there.
        say: is told what goes wrong.
    """

    def __init__(
        self,
        run: RunFolder,
        names: Sequence[str],
        *,
        recipe: Any,
        step: int,
        say: Callable[[str], None],
    ) -> None:
        self._say = say
        self._failures: dict[str, int] = {}
        self._trackers: dict[str, Any] = {}
        ids = _Ids(run.path / "trackers.json")
        for name in names:
            self._try(name, partial(self._open, name, run, ids, recipe, step))

    def _open(self, name: str, run: RunFolder, ids: "_Ids", recipe: Any, step: int) -> None:
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        match name:
            case "tensorboard":
                # Events of later steps, which will be taken again, are hidden.
                tracker = tracker_class("tensorboard", run.path, purge_step=step + 1)
            case "wandb":
                series = ids.get(name, uuid.uuid4().hex[:12])
                tracker = tracker_class(
                    PROJECT, name=run.path.name, id=series, resume="allow", dir=str(run.path)
                )
            case "mlflow":
                tracker = tracker_class(PROJECT, run_name=run.path.name, run_id=ids.known(name))
            case "aim":
                tracker = tracker_class(PROJECT, run.path)
            case _:
                tracker = tracker_class(PROJECT)
        tracker.start()
        self._trackers[name] = tracker
        if name == "mlflow":
            ids.get(name, tracker.tracker.info.run_id)
        if name == "tensorboard":  # its table of parameters would make a folder at each resume
            tracker.writer.add_text("recipe", f"```yaml\n{to_yaml(recipe)}```", step)
        else:
            tracker.store_init_configuration(dict(flattened(to_values(recipe))))

    def log(self, figures: Mapping[str, float | int | str], step: int) -> None:
        """Hand on the numbers among some figures."""
        numbers = {key: value for key, value in figures.items() if not isinstance(value, str)}
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(tracker.log, numbers, step=step))

    def show(self, title: str, picture: Path, step: int) -> None:
        """Hand on a picture, to trackers that take some."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(_show, name, tracker, title, picture, step))

    def close(self) -> None:
        """Let the trackers finish what they hold."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.finish)

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # each tracker has its own, networks all of them
            count = self._failures[name] = self._failures.get(name, 0) + 1
            text = (str(error).splitlines() or [""])[0]
            if count == 1:
                self._say(
                    f"tracker {name} failed, and training goes on: {type(error).__name__}: {text}"
                )
            if count >= FAILURES and self._trackers.pop(name, None) is not None:
                self._say(f"tracker {name} failed {count} times in a row and is left alone now.")
        else:
            self._failures[name] = min(self._failures.get(name, 0), 1)  # said once, counted anew


def _show(name: str, tracker: Any, title: str, picture: Path, step: int) -> None:
    match name:
        case "tensorboard":
            with Image.open(picture) as image:
                pixels = np.asarray(image.convert("RGB"))
            tracker.log_images({title: pixels[None]}, step=step, dataformats="NHWC")
        case "wandb" | "swanlab" | "clearml":
            with Image.open(picture) as image:
                tracker.log_images({title: [np.asarray(image.convert("RGB"))]}, step=step)
        case "mlflow":
            tracker.log_artifact(str(picture), artifact_path=title)
        case _:
            return


class _Ids:
    """Names of a run's series at services, which a resumed run goes on with."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._ids = {
                str(key): str(value) for key, value in json.loads(path.read_text()).items()
            }
        except (OSError, ValueError, AttributeError):
            self._ids = {}

    def known(self, name: str) -> str | None:
        return self._ids.get(name)

    def get(self, name: str, new: str) -> str:
        if name not in self._ids:
            self._ids[name] = new
            atomic_write_text(self._path, json.dumps(self._ids) + "\n")
        return self._ids[name]


def flattened(values: Any, prefix: str = "") -> Iterator[tuple[str, float | int | str | bool]]:
    """Yield a recipe's values under dotted keys; what is no number or text is written as text."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from flattened(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values if isinstance(values, float | int | str | bool) else json.dumps(values)
