"""The progress bar of training, and the clock behind its rates."""

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Clock:
    """Measures images a second and the share of time spent waiting for data, between logs."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._images = 0
        self._waited = 0.0

    def add(self, images: int, waited: float) -> None:
        """Count one step: its images over all ranks, and seconds waited for its data."""
        self._images += images
        self._waited += waited

    def read(self) -> tuple[float, float]:
        """Return (images a second, share of time waited for data) since the last reading."""
        now = time.perf_counter()
        elapsed = max(now - self._start, 1e-9)
        rates = (self._images / elapsed, min(1.0, self._waited / elapsed))
        self._start, self._images, self._waited = now, 0, 0.0
        return rates

    def skip(self) -> None:
        """Leave out the time since the last reading: validation and checkpoints are no training."""
        self._start = time.perf_counter()
        self._images, self._waited = 0, 0.0


class Bar:
    """A bar over optimiser steps with loss, learning rate, images/s, data wait and time left."""

    def __init__(self, total: int, initial: int, *, visible: bool, label: str) -> None:
        self._bar: tqdm[Any] = tqdm(
            total=total,
            initial=initial,
            desc=label,
            unit="step",
            disable=not visible,
            dynamic_ncols=True,
            # A log file wants a line now and then, not ten a second.
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            smoothing=0.05,
        )

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def advance(self) -> None:
        """Count one step."""
        self._bar.update(1)

    def show(self, loss: float, lr: float, images_per_second: float, data_wait: float) -> None:
        """Show the figures of the last log behind the bar."""
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, lr {lr:.2e}, {images_per_second:.0f} images/s, "
            f"data wait {data_wait:.0%}",
            refresh=False,
        )

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            tqdm.write(text, file=sys.stderr)
