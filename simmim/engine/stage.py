"""The interface between a task and the training loop."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from simmim.data.loader.bad_samples import BadSamples
from simmim.data.loader.batch import Batch
from simmim.data.order.order import Order
from simmim.data.order.source import SampleSource
from simmim.engine.monitor.observers import Watch
from simmim.engine.run import RunFolder


class TrainingStage(Protocol):
    """Model, data and observers that a task supplies to the training loop."""

    @property
    def recipe(self) -> Any:
        """The recipe, with a `training: TrainingSettings`."""

    @property
    def module(self) -> nn.Module:
        """The trained module: takes a Batch on its device, returns the mean loss, a scalar.

        It contains an encoder (`simmim.method.encoder_protocol`), whose blocks are sharded and
        whose layers have learning rates of their own.

        If the stage has `normalisers`, it also takes those of the whole optimiser batch as a second
        argument, and returns its part of the mean loss over that batch.
        """

    @property
    def checkpoint_notes(self) -> Mapping[str, str]:
        """Further text files about the model to write into checkpoints, by name."""

    @property
    def order(self) -> Order:
        """Order of the samples."""

    @property
    def training_shards(self) -> SampleSource[Any]:
        """The shards that are trained on: what an address in a batch counts in."""

    @property
    def bad_samples(self) -> BadSamples:
        """Record of samples that could not be read."""

    def batches(self, *, rank: int, world: int, start: int, end: int) -> Iterable[Batch]:
        """Yield a rank's micro-batches of samples `start` to `end` of the global stream."""

    def normalisers(self, batch: Batch) -> Tensor | None:
        """Return what each term of the loss is divided by on a micro-batch, float32 (terms,).

        For example the number of labelled pixels, or of objects. Their sums over all micro-batches
        and ranks are what the module divides by, so that the loss does not depend on how a batch is
        cut. None if the loss is a mean over samples, of which every micro-batch has equally many.
        """

    def fresh(self) -> "TrainingStage":
        """Return a stage of the same recipe with initial weights on the CPU."""

    def export_encoder(self, run: RunFolder, step: int, samples: int) -> None:
        """Write the encoder directory of the run; called on the main process, at the end."""

    @property
    def watch(self) -> Watch:
        """What is watched besides the loss: validation, probes, pictures, baselines."""
