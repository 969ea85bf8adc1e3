"""Watching a training: figures, pictures, probes and baselines, to wherever someone looks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from simmim.disk import goes_on_without
from simmim.engine.distributed.parallelism import gathered
from simmim.engine.monitor.environment import write_environment
from simmim.engine.monitor.memory import memory_in_use
from simmim.engine.monitor.progress import Bar, Clock, Forecast, duration
from simmim.engine.monitor.tracking import Tracking, chosen_trackers
from simmim.engine.monitor.utilisation import Peak, device_peak, utilisation
from simmim.engine.run import RunFolder
from simmim.engine.stage import Stage
from simmim.report.page import write_report

GIB = 2**30

Figures = dict[str, float | int | str]


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where training stands."""

    step: int
    """Optimiser steps taken."""
    epoch: float
    """Passes over the data."""
    samples: int
    """Samples seen, over all ranks."""


class Watcher:
    """Tells what happens in a training: in the bar, `metrics.jsonl`, trackers and the report.

    The ranks call it together; the main process alone writes.

    Args:
        stage: what is trained.
        run: where it is written.
        accelerator: devices and processes.
        begin: takes note, on every rank, of a step and what is begun at it.
    """

    def __init__(
        self,
        stage: Stage,
        run: RunFolder,
        accelerator: Accelerator,
        *,
        begin: Callable[[int, str], None] = lambda _step, _doing: None,
    ) -> None:
        self.stage, self.run, self.accelerator = stage, run, accelerator
        self.begin = begin
        self.training = stage.recipe.training
        self.clock = Clock()
        self.figures: dict[str, float] = {}
        """The last validation."""
        self._baselines: dict[str, float] = {}
        self.total: int
        self._bar: Bar
        self._forecast: Forecast
        self._tracking: Tracking | None = None
        self._peak: Peak | None = None

    @contextmanager
    def watch(self, step: int, *, total: int) -> Iterator["Watcher"]:
        """Watch from `step` on, of `total`, until the context ends."""
        self.total = total
        main = self.accelerator.is_main_process
        self._bar = Bar(self.total, step, visible=main, label=self.run.path.name)
        try:
            if main:
                self._begin(step)
            if step == 0 and self._probes:
                with gathered(self.stage.module):
                    self._probe(step)  # what random weights reach
            self._forecast = Forecast(step, self.total)
            yield self
        finally:
            self._bar.close()
            if self._tracking is not None:
                self._tracking.close()
            if main:
                self._report()

    def _begin(self, step: int) -> None:
        """Do what is done once, on the main process."""
        self._tracking = Tracking(
            self.run,
            chosen_trackers(self.training.trackers),
            recipe=self.stage.recipe,
            step=step,
            say=self.say,
        )
        self._peak = device_peak(self.accelerator.device, self.training.precision)
        write_environment(self.run, self.accelerator, self._peak)
        self._baselines = dict(self.stage.baselines())
        for name, value in self._baselines.items():
            self.say(f"{name} {value:.4f}: the loss of an answer that takes no learning")

    @property
    def _probes(self) -> bool:
        return self.stage.probe_every is not None

    def say(self, text: str) -> None:
        """Print a line above the bar, on the main process."""
        self._bar.say(text)

    def advance(self) -> None:
        """Count one step."""
        self._bar.advance()

    def log(
        self,
        position: Position,
        *,
        loss: float,
        lr: float,
        norm: float,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Write the figures of the steps since the last line.

        Args:
            position: after them.
            loss: mean over them.
            lr: learning rate of the last.
            norm: of the gradient of the last, before clipping.
            counts: of what went wrong in them, by name.
        """
        rates = self.clock.read()
        wait, device_peak_memory, host = self._worst_rank(rates.data_wait)
        if not self.accelerator.is_main_process:
            return
        assert self._peak is not None
        devices = self.accelerator.num_processes
        eta = self._forecast.seconds_left(position.step)
        share = utilisation(
            self.stage.flops_per_sample, rates.images_per_second, self._peak, devices=devices
        )
        figures: Figures = {
            "step": position.step,
            "epoch": round(position.epoch, 4),
            "samples": position.samples,
            "loss": loss,
            **self._baselines,
            "lr": lr,
            "grad_norm": norm,
            "images_per_second": round(rates.images_per_second, 2),
            "data_wait": round(wait, 4),
            "mfu": round(share, 4),
            "mfu_peak": self._peak.source,
            "device_memory_gib": round(device_peak_memory, 3),
            "host_memory_gib": round(host, 3),
            "eta_seconds": round(eta),
            "processes": devices,
            **(counts or {}),
        }
        beside = "".join(f" (baseline {value:.4f})" for value in self._baselines.values())
        self._bar.show(
            f"loss {loss:.4f}{beside}, lr {lr:.2e}, {rates.images_per_second:.0f} images/s, "
            f"data wait {wait:.0%}, MFU {share:.0%}, {duration(eta)} left"
        )
        self._write(figures, "train")

    def _worst_rank(self, wait: float) -> tuple[float, float, float]:
        """Return data wait and memory of the device and the process, in GiB, of the worst rank."""
        memory = memory_in_use(self.accelerator.device)
        mine = torch.tensor(
            [[wait, memory.device_peak / GIB, memory.host / GIB]], device=self.accelerator.device
        )
        of_all: torch.Tensor = self.accelerator.gather(mine)
        first, second, third = of_all.amax(dim=0).tolist()
        return first, second, third

    def look(self, step: int, weights: AbstractContextManager[None]) -> dict[str, float]:
        """Validate, probe and draw, where that is due after `step`.

        Args:
            step: the last one taken.
            weights: entered for it, to look at others than those that are trained.

        Returns:
            The figures of the validation; empty where none is due.
        """
        validates = self._due(step, self.training.validate_every)
        probes = self._probes and self._due(step, self.stage.probe_every or 1)
        draws = self._due(step, self.training.look_every)
        if not (validates or probes or draws):
            return {}
        with self.clock.paused(), weights, gathered(self.stage.module):
            if validates:
                self._validate(step)
            if probes:
                self._probe(step)
            if draws:
                self._draw(step)
        return self.figures if validates else {}

    def _draw(self, step: int) -> None:
        self.begin(step, "drawing pictures, on rank 0")
        if not self.accelerator.is_main_process:
            return
        with goes_on_without("a picture", self.run.reconstructions):
            picture = self.stage.look(self.accelerator, self.run, step)
            if self._tracking is not None and picture is not None:
                self._tracking.show("reconstructions", picture, step)
        self._report()

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.total

    def _validate(self, step: int) -> None:
        self.begin(step, "validating")
        self.stage.module.eval()
        with torch.no_grad():
            self.figures = self.stage.validate(self.accelerator)
        for name in self._baselines.keys() & self.figures.keys():
            self._baselines[name] = self.figures[name]  # over all held-out samples
        self._tell(step, self.figures, "validation")

    def _probe(self, step: int) -> None:
        self.begin(step, "probing")
        self.stage.module.eval()
        with torch.no_grad():
            self._tell(step, self.stage.probe(self.accelerator), "probe")

    def _tell(self, step: int, figures: Mapping[str, float], group: str) -> None:
        if figures:
            self.say(f"step {step}: " + ", ".join(f"{key} {figures[key]:.4f}" for key in figures))
            if self.accelerator.is_main_process:
                self._write({"step": step, **figures}, group)

    def _write(self, figures: Figures, group: str) -> None:
        self.run.log(figures)
        if self._tracking is not None:
            step = int(figures["step"])
            shown = {f"{group}/{key}": value for key, value in figures.items() if key != "step"}
            self._tracking.log(shown, step)

    def _report(self) -> None:
        try:
            write_report(self.run)
        except (OSError, ValueError) as error:  # a full disk, or files that someone has edited
            self.say(f"the report was not written: {error}")
