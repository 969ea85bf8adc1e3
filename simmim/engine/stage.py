"""What a job brings to the training loop."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn

from simmim.data.loader.bad_samples import BadSamples
from simmim.data.loader.batch import Batch
from simmim.data.order.source import SampleSource
from simmim.engine.run import RunFolder


class Stage(Protocol):
    """What a job brings to the training loop."""

    @property
    def recipe(self) -> Any:
        """The recipe, with a `training: TrainingSettings`."""

    @property
    def module(self) -> nn.Module:
        """Takes a Batch on its device and returns the mean loss over it, a scalar."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each encoder stage, for layer-wise learning rates."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples that the data order visits in one epoch."""

    @property
    def flops_per_sample(self) -> int:
        """Operations of the matrix products in a forward pass over one sample."""

    @property
    def data_digest(self) -> str:
        """Digest of the shards that are trained on."""

    @property
    def training_shards(self) -> SampleSource[Any]:
        """The shards that are trained on: what an address in a batch counts in."""

    @property
    def bad_samples(self) -> BadSamples:
        """The account of samples that could not be read."""

    def batches(self, *, rank: int, world: int, start: int, end: int) -> Iterable[Batch]:
        """Yield this rank's micro-batches, from `start` to `end` samples of the global stream."""

    def baselines(self) -> Mapping[str, float]:
        """Return losses that need no learning, to be seen beside that of training.

        Called on the main process alone, when the module is on its device.
        """

    def fresh(self) -> "Stage":
        """Return a stage of the same recipe, with initial weights on the CPU."""

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return figures on held-out data, the same on every rank; empty if there is none."""

    @property
    def best_metric(self) -> str | None:
        """Name of the figure of `validate` that tells the best checkpoint: the higher the better.

        None where no figure does.
        """

    @property
    def probe_every(self) -> int | None:
        """Steps between probes; None for no probe."""

    def probe(self, accelerator: Accelerator) -> dict[str, float]:
        """Return how well frozen features tell classes apart, the same on every rank."""

    def look(self, accelerator: Accelerator, run: RunFolder, step: int) -> Path | None:
        """Draw pictures into the run, and return the file; None where there is nothing to see.

        Called on the main process alone.
        """

    def hand_on(self, run: RunFolder, step: int, samples: int) -> None:
        """Write the encoder into the run; called on the main process, at the end."""
