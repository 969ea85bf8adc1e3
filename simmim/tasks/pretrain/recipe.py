"""Recipe of SimMIM pretraining."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from typing_extensions import Self

from data_prep.bounds import Count, Span
from data_prep.channels import ChannelNames, describe
from data_prep.format.text import count_noun
from simmim.data.datasets.image_set import ImageSet
from simmim.data.datasets.mixture import MixedShards, NoImages, StreamedShards
from simmim.data.datasets.opening import ShardsSetting, weights_of
from simmim.data.datasets.stream import StreamSettings, open_stream
from simmim.data.order.source import SampleSource
from simmim.data.settings import MEASURED, AugmentedDataSettings, DrawnSettings
from simmim.engine.settings import TrainingSettings
from simmim.method.settings import LossSettings
from simmim.method.strategies import MaskSettings
from simmim.recipe import settings
from simmim.tasks.probe.recipe import OnlineProbeSettings
from simmim.tasks.recipe import EncoderSettings, ExecutionSettings, TaskRecipe, check_slots
from swinv2.config import SwinV2Config, record_windows
from swinv2.config_file import EncoderDescription


@settings
class PretrainData(AugmentedDataSettings, DrawnSettings):
    """Unlabelled shards or streams of tars, and their augmentation."""

    shards: ShardsSetting = ()
    """Folder of shards made by data-prep (tars, indexes and manifest.json), or its URL (s3, gs,
    http or https); or a pattern of shards in it, `DIR/train-{000..099}.tar` or `DIR/train-*.tar`;
    or a local folder of images; or a list of {shards: any of these, weight: number}, from which
    every batch samples in proportion. Not needed with `stream`, and mixed with it (a single one has
    weight 1)."""
    stream: StreamSettings | None = None
    """Third-party tars without a manifest, read in sequence; null for none."""
    image_size: Count = 192
    """Side of the square images in pixels."""
    scale: Annotated[tuple[float, float], Span(most=1)] = (0.67, 1.0)
    """Random crop: range of its area, as a fraction of the image's."""

    def __post_init__(self) -> None:
        if self.stream is not None and MEASURED in (self.mean, self.std):
            raise ValueError(
                "mean and std cannot be measured of a stream: give numbers, or measure a set made "
                f"by `{self.stream.index_command}`."
            )
        chosen = {
            "include": self.include != (),
            "exclude": self.exclude != (),
            "fraction": self.fraction != 1,
            "classes": self.classes is not None and self.validation is None,
        }
        given = [name for name, is_given in chosen.items() if is_given]
        if self.stream is not None and not self.shards and given:
            raise ValueError(
                f"{given[0]} chooses from indexed datasets, and a stream is read whole: remove it, "
                f"or make an indexed set by `{self.stream.index_command}`."
            )

    def check_sources(self) -> None:
        """Raise ValueError unless there are images to train on."""
        if not self.shards and self.stream is None:
            raise ValueError(
                "shards is missing: give a folder, or a list of them, or tars without a manifest "
                "as data.stream."
            )

    def open_images(self) -> tuple[SampleSource[Any], SampleSource[Any]]:
        """Open the datasets, and the stream, and return (training, validation)."""
        if self.stream is None:
            return self.split_shards()
        validation: SampleSource[Any] = NoImages()
        indexed: Sequence[ImageSet] = ()
        if self.shards:
            training, validation = self.split_shards()
            indexed = training.sets if isinstance(training, MixedShards) else (training,)
        elif self.validation is not None:
            validation = self.open_validation(self.validation)
        stream = open_stream(self.stream, self.remote_reading)
        return StreamedShards(indexed, weights_of(self.shards), stream), validation


@settings
class PretrainEncoderSettings(EncoderSettings):
    """A Swin Transformer V2 encoder that is pretrained."""

    pretrained_window_sizes: tuple[tuple[int, int], ...] | None = None
    """Windows (rows, columns) of each stage that position offsets are relative to, in tokens: those
    of an earlier training. null is the windows of this one; with --init-from, the windows that the
    encoder there records, which the recipe in the run then has."""

    def config(self, image_size: int) -> SwinV2Config:
        """Return the encoder's configuration; see `EncoderSettings.config`."""
        config = super().config(image_size)
        if self.pretrained_window_sizes is None:
            return config
        return replace(config, pretrained_window_sizes=self.pretrained_window_sizes)


@settings
class PretrainRecipe(TaskRecipe):
    """SimMIM pretraining of a Swin Transformer V2."""

    task: Literal["pretrain"]
    """Task of the recipe."""
    encoder: PretrainEncoderSettings
    """The encoder."""
    data: PretrainData
    """The images."""
    mask: MaskSettings = MaskSettings()
    """The mask."""
    loss: LossSettings = LossSettings()
    """The loss."""
    execution: ExecutionSettings = ExecutionSettings()
    """Execution of the encoder: affects time and memory only."""
    probe: OnlineProbeSettings | None = None
    """Evaluation of frozen features on labelled images during training; null for none."""
    training: TrainingSettings
    """Length, batch size, optimiser and schedule."""

    def __post_init__(self) -> None:
        size = self.data.image_size
        # Raises unless cells consist of patches, tile the image, and some stay visible.
        self.mask.grid((size, size), self.encoder.patch_size)
        names, count = self.data.wanted_channels, self.encoder.in_channels
        if names is not None and len(names) != count:
            raise ValueError(
                f"data.channels names {count_noun(len(names), 'channel')}, {describe(names)}, and "
                f"encoder.in_channels is {count}: set it to {len(names)}, or name {count}."
            )
        self.encoder.check_channels(self.data.mean, measurable=True)
        self.data.check_bands(self.encoder.in_channels)
        check_slots(self.data, self.training)
        if self.training.optimizer.layer_decay != 1.0:
            raise ValueError("training.optimizer.layer_decay belongs to fine-tuning; leave it 1.")
        if self.training.optimizer.freeze is not None:
            raise ValueError("training.optimizer.freeze belongs to fine-tuning; leave it null.")
        config = self.encoder.config(size)  # raises if the sizes do not fit together
        self.execution.check_stages(len(config.depths))

    def starting_from(self, start: EncoderDescription) -> Self:
        """Return the recipe with the pretraining windows of the encoder that it starts from."""
        windows = start.config.pretrained_window_sizes
        present = self.encoder.config(self.data.image_size)
        if self.encoder.pretrained_window_sizes is not None or windows == record_windows(present):
            return self
        return replace(self, encoder=replace(self.encoder, pretrained_window_sizes=windows))

    def differences_from(self, start: EncoderDescription, target: str | None) -> list[str]:
        """Return warnings of how images and target differ from those that it starts from."""
        (mean, std), warnings = self.data.normalisation, []
        for name, ours, trained in (("mean", mean, start.mean), ("std", std, start.std)):
            theirs = self._in_own_order(trained, ours, start.channels)
            if ours != theirs:
                warnings.append(
                    f"data.{name} is {list(ours)}; to keep the features of the encoder of "
                    f"--init-from, set it to {list(theirs)}"
                )
        wanted = self.loss.target_name
        if target not in (None, wanted):
            warnings.append(
                f"the decoder of --init-from was trained for {target}, and the recipe trains it "
                f"for {wanted}"
            )
        return warnings

    def _in_own_order(
        self, trained: tuple[float, ...], ours: tuple[float, ...], names: ChannelNames | None
    ) -> tuple[float, ...]:
        """Return the trained numbers in the order of the images; new channels keep ours."""
        wanted = self.data.wanted_channels
        if names is None or wanted is None:
            return trained if len(trained) == len(ours) else ours
        known = dict(zip(names, trained, strict=True))
        return tuple(known.get(name, value) for name, value in zip(wanted, ours, strict=True))

    @property
    def step_for_estimate(self) -> tuple[MaskSettings, LossSettings]:
        """Mask and loss of the training; pixels for features, whose encoder is counted apart."""
        if self.frozen_encoder is not None:
            return self.mask, replace(self.loss, target=None, target_encoder=None)
        return self.mask, self.loss

    @property
    def frozen_encoder(self) -> str | None:
        """Path of the encoder whose features are the target; None if the target is pixels."""
        return self.loss.target_encoder

    @property
    def start_note(self) -> str | None:
        """That there are no pictures, if the target is not pixels."""
        if self.frozen_encoder is None:
            return None
        return "no reconstructions are drawn: loss.target is features, which are not pixels"

    @property
    def probed_per_step(self) -> float:
        """Images that online probes encode, averaged over the training steps."""
        probe = self.probe
        return 0.0 if probe is None else (probe.samples + probe.validation_samples) / probe.every
