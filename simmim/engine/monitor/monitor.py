"""Monitor of a training: metrics and observations, to bar, files and trackers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from simmim.engine.distributed.sharding import gathered
from simmim.engine.monitor.hardware import (
    DevicePeak,
    device_peak,
    memory_in_use,
    utilisation,
    write_environment,
)
from simmim.engine.monitor.observers import Observer
from simmim.engine.monitor.progress import Bar, Clock, Forecast, duration
from simmim.engine.monitor.tracking import Tracking, chosen_trackers
from simmim.engine.run import RunFolder
from simmim.engine.stage import TrainingStage

GIB = 2**30

Figures = dict[str, float | int | str]
ReportWriter = Callable[[RunFolder], object]
"""Writes the report of a run; see `simmim.report.page.write_report`."""


@dataclass(frozen=True, kw_only=True)
class TrainingPosition:
    """How far training has come."""

    step: int
    """Optimiser steps taken."""
    epoch: float
    """Passes over the data."""
    samples: int
    """Samples seen, over all ranks."""


class Monitor:
    """Watches a training: writes to the bar, `metrics.jsonl`, trackers and the report.

    All ranks call it together; only the main process writes.

    Args:
        stage: the trained stage.
        run: folder of the run.
        accelerator: devices and processes.
        begin: called on every rank with a step and the activity that begins at it.
        write_report: called at the end and after what it shows has changed; None writes no report.
    """

    def __init__(
        self,
        stage: TrainingStage,
        run: RunFolder,
        accelerator: Accelerator,
        *,
        begin: Callable[[int, str], None] = lambda _step, _activity: None,
        write_report: ReportWriter | None = None,
    ) -> None:
        self.stage, self.run, self.accelerator = stage, run, accelerator
        self.begin, self.write_report = begin, write_report
        self.training = stage.recipe.training
        self.watch = stage.watch
        self.clock = Clock()
        self.figures: dict[str, dict[str, float]] = {}
        """Last figures of each observer, by its name."""
        self._baselines: dict[str, float] = {}
        self.total: int
        self._bar: Bar
        self._forecast: Forecast
        self._tracking: Tracking | None = None
        self._peak: DevicePeak | None = None

    @contextmanager
    def monitoring(self, step: int, *, total: int) -> Iterator["Monitor"]:
        """Monitor a training from `step` to `total` within this context."""
        self.total = total
        main = self.accelerator.is_main_process
        self._bar = Bar(self.total, step, visible=main, label=self.run.path.name)
        try:
            if main:
                self._begin(step)
            first = [one for one in self.watch.observers if one.before_first_step]
            if step == 0 and first:
                self._run(first, step)
            self._forecast = Forecast(step, self.total)
            yield self
        finally:
            self._bar.close()
            if self._tracking is not None:
                self._tracking.close()
            if main:
                self._report()

    def _begin(self, step: int) -> None:
        """Open the trackers and describe machine and baselines, once, on the main process."""
        self._tracking = Tracking(
            self.run,
            chosen_trackers(self.training.trackers),
            recipe=self.stage.recipe,
            step=step,
            warn=self.print,
        )
        self._peak = device_peak(self.accelerator.device, self.training.precision)
        write_environment(self.run.environment, self.accelerator, self._peak)
        self._baselines = dict(self.watch.baselines())
        for line in self.run.read_metrics():  # a resumed run has those of its last validation
            self._baselines |= {name: line[name] for name in self._baselines.keys() & line.keys()}
        for name, value in self._baselines.items():
            self.print(f"{name} {value:.4f}: baseline loss, reached without learning")

    def print(self, text: str) -> None:
        """Print a line above the bar, on the main process."""
        self._bar.print(text)

    def advance(self) -> None:
        """Count one step."""
        self._bar.advance()

    def log_training(
        self,
        position: TrainingPosition,
        *,
        loss: float,
        lr: float,
        norm: float,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Log the figures of the steps since the last call.

        Args:
            position: position after these steps.
            loss: their mean loss.
            lr: learning rate of the last one.
            norm: gradient norm of the last one, before clipping.
            counts: numbers of skipped steps and the like, by name.
        """
        rates = self.clock.read()
        wait, device_memory, host_memory = self._worst_rank(rates.data_wait)
        if not self.accelerator.is_main_process:
            return
        assert self._peak is not None
        devices = self.accelerator.num_processes
        eta = self._forecast.seconds_left(position.step)
        mfu = utilisation(
            self.watch.flops_per_sample, rates.images_per_second, self._peak, devices=devices
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
            "mfu": round(mfu, 4),
            "mfu_peak": self._peak.source,
            "device_memory_gib": round(device_memory, 3),
            "host_memory_gib": round(host_memory, 3),
            "eta_seconds": round(eta),
            "processes": devices,
            **(counts or {}),
        }
        baselines = "".join(f" (baseline {value:.4f})" for value in self._baselines.values())
        self._bar.show(
            f"loss {loss:.4f}{baselines}, lr {lr:.2e}, {rates.images_per_second:.0f} images/s, "
            f"data wait {wait:.0%}, MFU {mfu:.0%}, {duration(eta)} left"
        )
        self._write(figures, "train")

    def _worst_rank(self, wait: float) -> tuple[float, float, float]:
        """Return the maxima over ranks of data wait, device memory and host memory in GiB."""
        memory = memory_in_use(self.accelerator.device)
        own = torch.tensor(
            [[wait, memory.device_peak / GIB, memory.host / GIB]], device=self.accelerator.device
        )
        of_all: torch.Tensor = self.accelerator.gather(own)
        first, second, third = of_all.amax(dim=0).tolist()
        return first, second, third

    def observe(self, step: int, weights: AbstractContextManager[None]) -> dict[str, float]:
        """Run the observers that are due after `step`.

        Args:
            step: the last step taken.
            weights: entered meanwhile, to look at averaged weights for example.

        Returns:
            Their figures; empty if none was due.
        """
        due = [one for one in self.watch.observers if one.is_due(step, self.total)]
        if not due:
            return {}
        with self.clock.paused(), weights:
            self._run(due, step)
        found = [self.figures.get(one.name, {}) for one in due]
        return {name: value for figures in found for name, value in figures.items()}

    @torch.no_grad()
    def _run(self, observers: Sequence[Observer], step: int) -> None:
        with gathered(self.stage.module):
            for observer in observers:
                self.begin(step, observer.activity)
                self.stage.module.eval()
                if self.accelerator.is_main_process or not observer.main_process_only:
                    self._observe(observer, step)

    def _observe(self, observer: Observer, step: int) -> None:
        found = observer.observe(self.accelerator, self.run, step)
        if found.warning is not None:
            self.print(f"WARNING: {found.warning}")
        for name in self._baselines.keys() & found.figures.keys():
            self._baselines[name] = found.figures[name]  # over all validation samples
        self.figures[observer.name] = dict(found.figures)
        self._log(step, found.figures, observer.name)
        if self._tracking is not None and found.picture is not None:
            self._tracking.log_picture(observer.name, found.picture, step)
        if observer.main_process_only:
            self._report()

    def _log(self, step: int, figures: Mapping[str, float], group: str) -> None:
        if figures:
            self.print(f"step {step}: " + ", ".join(f"{key} {figures[key]:.4f}" for key in figures))
            if self.accelerator.is_main_process:
                self._write({"step": step, **figures}, group)

    def _write(self, figures: Figures, group: str) -> None:
        self.run.log(figures)
        if self._tracking is not None:
            step = int(figures["step"])
            shown = {f"{group}/{key}": value for key, value in figures.items() if key != "step"}
            self._tracking.log(shown, step)

    def _report(self) -> None:
        if self.write_report is None:
            return
        try:
            self.write_report(self.run)
        except Exception as error:  # a full disk, or files that someone has edited: never the end
            self.print(f"WARNING: the report was not written: {error}")
