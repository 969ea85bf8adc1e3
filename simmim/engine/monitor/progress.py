"""Progress bar of training, and the clock behind its rates."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from data_prep.format.text import printable_lines


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Speed of training between two readings of the clock."""

    images_per_second: float
    """Over all ranks."""
    data_wait: float
    """Fraction of the time that this rank waited for data."""


class Clock:
    """Measures images per second and the fraction of time spent waiting for data, between logs."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._images = 0
        self._waited = 0.0

    def add(self, images: int, waited: float) -> None:
        """Count one step: its images over all ranks, and the seconds waited for its data."""
        self._images += images
        self._waited += waited

    def read(self) -> Rates:
        """Return the rates since the last reading and start the next interval."""
        now = time.perf_counter()
        elapsed = max(now - self._start, 1e-9)
        rates = Rates(
            images_per_second=self._images / elapsed, data_wait=min(1.0, self._waited / elapsed)
        )
        self._start, self._images, self._waited = now, 0, 0.0
        return rates

    def restart(self) -> None:
        """Discard the interval since the last reading, with its steps."""
        self._start = time.perf_counter()
        self._images, self._waited = 0, 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent within this context, in validation for example."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - began


class Forecast:
    """Estimate of the time left, from the wall-clock time of all steps so far.

    It includes validation, pictures and checkpoints.
    """

    def __init__(self, step: int, total: int) -> None:
        self._first, self._total = step, total
        self._start = time.perf_counter()

    def seconds_left(self, step: int) -> float:
        """Return the seconds until the last step, after at least one step up to `step`."""
        return (time.perf_counter() - self._start) / (step - self._first) * (self._total - step)


class Bar:
    """Progress bar over optimiser steps that also shows the figures logged last."""

    def __init__(self, total: int, initial: int, *, visible: bool, label: str) -> None:
        self._bar: tqdm[Any] = tqdm(
            total=total,
            initial=initial,
            desc=label,
            unit="step",
            disable=not visible,
            dynamic_ncols=True,
            # In a log file one line now and then is enough.
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            smoothing=0.05,
        )

    def close(self) -> None:
        """Stop updating the bar."""
        self._bar.close()

    def advance(self) -> None:
        """Count one step."""
        self._bar.update(1)

    def show(self, text: str) -> None:
        """Show figures behind the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            tqdm.write(printable_lines(text), file=sys.stderr)


def duration(seconds: float) -> str:
    """Return a duration as readable text: `3 d 4 h`, `2 h 05 min`, `7 min`, `42 s`."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24} h"
