"""Fine-tuning on clips: an image encoder inflated in time, average pool and a linear head."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from simmim.data.batches import Batch, TrainingBatches, evaluation_batches
from simmim.data.clip_settings import ClipData
from simmim.data.clip_views import CHANNELS, EvaluationClip, TrainClip, unfolded
from simmim.data.clips import ClipSet
from simmim.data.frames import require_decoder
from simmim.data.order import SampleOrder
from simmim.engine.run import RunFolder
from simmim.engine.settings import TrainingSettings
from simmim.recipe import recipe_hash, settings
from simmim.stages.batches import check_slots
from simmim.stages.chances import drop_path_chances
from simmim.stages.classification import SCRATCH
from simmim.stages.classifier import Classifier, Scores, save_head, score
from simmim.stages.encoder_settings import EncoderSettings, ExecutionSettings
from simmim.stages.normalisation import Normalise
from simmim.stages.starting import HEAD_FOLDER
from swinv2 import (
    Provenance,
    VideoConfig,
    VideoSwinV2,
    inflate,
    load_encoder,
    load_video_encoder,
    read_encoder_config,
    read_video_config,
    save_video_encoder,
)
from swinv2.flops import forward_flops
from swinv2.video import video_config
from swinv2.video_weights import holds_video_encoder


@settings
class VideoEncoderSettings(EncoderSettings):
    """A Swin Transformer V2 encoder of clips."""

    frame_patch: int = 1
    """Frames of a patch; data.frames is a multiple of it."""
    window_frames: int = 8
    """Attention window along time in tokens; clamped where a clip has fewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("frame_patch", "window_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.in_channels != CHANNELS:
            raise ValueError(f"in_channels is {self.in_channels}; clips have {CHANNELS}.")

    def video_config(self, image_size: int, frames: int) -> VideoConfig:
        """Return the encoder's configuration for clips of square frames.

        Raises:
            ValueError: the sizes cannot work together.
        """
        return video_config(
            self.config(image_size),
            frames=frames,
            frame_patch=self.frame_patch,
            window_frames=self.window_frames,
        )


@settings
class VideoRecipe:
    """Classification of clips on a Swin Transformer V2 with windows in time and space."""

    task: Literal["video"]
    """What this recipe does."""
    init: str = SCRATCH
    """`scratch`, or an encoder directory to start from: of images, whose weights are inflated so
    that a still clip gives the features of its image, or of clips. A directory brings its
    architecture and its mean and std: of `encoder` only `window_size`, `window_frames`,
    `frame_patch` (for images) and `drop_path` then apply, and data.mean and data.std do not."""
    encoder: VideoEncoderSettings
    """The encoder."""
    data: ClipData
    """The clips."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over all classes, 0 to below 1."""
    execution: ExecutionSettings = ExecutionSettings()
    """How the encoder is computed."""
    training: TrainingSettings
    """The training."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}; it must be 0 or more and below 1."
            )
        check_slots(self.data.slots, self.training)
        # Raises where sizes cannot work.
        config = self.encoder.video_config(self.data.image_size, self.data.frames)
        if self.init == SCRATCH:
            self.execution.check_stages(len(config.depths))


@dataclass(frozen=True, kw_only=True)
class VideoStart:
    """What training starts from."""

    encoder: VideoSwinV2
    mean: tuple[float, ...]
    std: tuple[float, ...]
    inflated_from: Provenance | None
    """Where the weights of images come from that those of the encoder began as."""


def starting_point(recipe: VideoRecipe) -> VideoStart:
    """Build the encoder that `recipe.init` asks for, with the normalisation that goes with it.

    Fresh weights depend on the recipe's seed alone.

    Raises:
        ValueError: `recipe.init` is no encoder directory, or its encoder cannot take the sizes.
    """
    wanted, data = recipe.encoder, recipe.data
    if recipe.init == SCRATCH:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.training.seed)
            encoder = VideoSwinV2(wanted.video_config(data.image_size, data.frames))
        return VideoStart(encoder=encoder, mean=data.mean, std=data.std, inflated_from=None)
    if holds_video_encoder(recipe.init):
        clips = read_video_config(recipe.init)
        encoder = load_video_encoder(
            recipe.init,
            image_size=data.image_size,
            window_size=wanted.window_size,
            frames=data.frames,
            window_frames=wanted.window_frames,
            drop_path=wanted.drop_path,
        )
        return VideoStart(
            encoder=encoder, mean=clips.mean, std=clips.std, inflated_from=clips.inflated_from
        )
    images = read_encoder_config(recipe.init)
    if images.config.in_channels != CHANNELS:
        raise ValueError(
            f"the encoder {recipe.init} takes images of {images.config.in_channels} channels, and "
            f"clips have {CHANNELS}; start from another."
        )
    of_images = load_encoder(
        recipe.init,
        image_size=data.image_size,
        window_size=wanted.window_size,
        drop_path=wanted.drop_path,
    )
    encoder = inflate(
        of_images,
        frames=data.frames,
        frame_patch=wanted.frame_patch,
        window_frames=wanted.window_frames,
    )
    return VideoStart(
        encoder=encoder, mean=images.mean, std=images.std, inflated_from=images.provenance
    )


class VideoModule(nn.Module):
    """Cross entropy with label smoothing over batches of clips as they travelled."""

    def __init__(
        self,
        model: Classifier,
        start: VideoStart,
        *,
        frames: int,
        label_smoothing: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.frames = frames
        self.seed = seed
        self.normalise = Normalise(start.mean, start.std)
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean loss over a batch."""
        assert batch.labels is not None
        clips = self.clips(batch.images, batch.flips)
        logits = self.model(clips, drop_path_chances(self.model.encoder, batch, self.seed))
        return F.cross_entropy(logits.float(), batch.labels, label_smoothing=self.label_smoothing)

    def clips(self, images: Tensor, flips: Tensor | None = None) -> Tensor:
        """Return normalised clips (batch · views, frames, 3, height, width), mirrored by flips."""
        clips = unfolded(images, self.frames)
        of_frames = None if flips is None else flips.repeat_interleave(self.frames)
        normal: Tensor = self.normalise(clips.flatten(0, 1), of_frames)
        return normal.view(clips.shape)


class VideoStage:
    """Classification of clips, as the training loop sees it.

    Raises:
        ValueError: there are no clips, too few of them, or the start cannot be loaded.
    """

    def __init__(self, recipe: VideoRecipe) -> None:
        require_decoder()
        self.recipe = recipe
        data, seed = recipe.data, recipe.training.seed
        self.bad_samples = data.bad_samples()
        self.training_shards, self.validation_shards = data.open()
        self.classes = self.training_shards.classes
        self.order = SampleOrder(self.training_shards.sizes, seed=seed, slots=data.slots)
        self.samples_per_epoch = self.order.samples_per_epoch
        self.data_digest = self.training_shards.digest
        self.start = starting_point(recipe)
        recipe.execution.apply(self.start.encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Classifier(self.start.encoder, len(self.classes))
        self.module = VideoModule(
            self.model,
            self.start,
            frames=data.frames,
            label_smoothing=recipe.label_smoothing,
            seed=seed,
        )
        self.depths = self.start.encoder.config.depths

    @property
    def flops_per_sample(self) -> int:
        """Operations of encoder and head; see `simmim.engine.stage.Stage`."""
        config = self.start.encoder.config
        return forward_flops(config) + 2 * config.num_features * len(self.classes)

    @property
    def best_metric(self) -> str | None:
        """Top-1 of the single view tells the best checkpoint."""
        return "top1"

    @property
    def probe_every(self) -> int | None:
        """No probe: there are labels already."""
        return None

    def probe(self, accelerator: Accelerator) -> dict[str, float]:
        """Return nothing."""
        del accelerator
        return {}

    def baselines(self) -> dict[str, float]:
        """Return the loss of holding every class for as likely as any other."""
        return {"uniform_loss": math.log(len(self.classes))}

    def batches(self, *, rank: int, world: int, start: int, end: int) -> Iterable[Batch]:
        """Yield this rank's micro-batches; see `simmim.engine.stage.Stage`."""
        data, training = self.recipe.data, self.recipe.training
        transform = TrainClip(
            size=data.size,
            frames=data.frames,
            seed=training.seed,
            scale=data.scale,
            ratio=data.ratio,
            flip=data.flip,
            max_pixels=data.max_pixels,
        )
        return TrainingBatches(
            self.training_shards,
            self.order,
            transform,
            batch_size=training.batch_size,
            start_position=start,
            end_position=end,
            accumulation=training.accumulation,
            rank=rank,
            world=world,
            workers=data.workers,
            pin_memory=torch.cuda.is_available(),
            bad_samples=self.bad_samples,
        )

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return top-1 and top-5 in percent and the mean cross entropy on held-out clips.

        Those of one view of each, and top-1 and top-5 of `data.views` where these are more.
        """
        if self.validation_shards is None:
            return {}
        figures = self._figures(self.validation_shards, accelerator, (1, 1))
        views = self.recipe.data.views
        if figures and views != (1, 1):
            of_views = self._figures(self.validation_shards, accelerator, views)
            figures |= {f"views_{name}": of_views[name] for name in ("top1", "top5")}
        return figures

    @torch.no_grad()
    def _figures(
        self, clips: ClipSet, accelerator: Accelerator, views: tuple[int, int]
    ) -> dict[str, float]:
        """Return figures over all ranks for so many views in time and space of each clip."""
        data, training = self.recipe.data, self.recipe.training
        transform = EvaluationClip(
            size=data.size,
            frames=data.frames,
            temporal=views[0],
            spatial=views[1],
            max_pixels=data.max_pixels,
        )
        at_a_time = training.batch_size // training.accumulation // math.prod(views)
        batches = evaluation_batches(
            clips,
            transform,
            batch_size=max(accelerator.num_processes, at_a_time),
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=data.workers,
            bad_samples=self.bad_samples,
        )
        total = Scores()
        for batch in batches:
            assert batch.labels is not None
            with accelerator.autocast():
                logits = self.model(self.module.clips(batch.images.to(accelerator.device)))
            # Views of a clip lie one behind the other, and their probabilities are averaged.
            of_views = logits.float().log_softmax(-1).unflatten(0, (len(batch), -1))
            means = of_views.logsumexp(1) - math.log(math.prod(views))
            total += score(means, batch.labels.to(accelerator.device))
        sums = torch.tensor([total.top1, total.top5, total.loss, total.samples])
        top1, top5, loss, count = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
        if not count:
            return {}
        return {
            "top1": 100 * top1 / count,
            "top5": 100 * top5 / count,
            "validation_loss": loss / count,
        }

    def fresh(self) -> "VideoStage":
        """Return a stage of the same recipe, with initial weights on the CPU."""
        return VideoStage(self.recipe)

    def look(self, accelerator: Accelerator, run: RunFolder, step: int) -> Path | None:
        """Draw nothing: classification has no pictures."""
        del accelerator, run, step
        return None

    def hand_on(self, run: RunFolder, step: int, samples: int) -> None:
        """Write the encoder directory and the classifier's head into the run."""
        save_video_encoder(
            self.start.encoder,
            run.encoder,
            mean=self.start.mean,
            std=self.start.std,
            provenance=Provenance(
                step=step, samples_seen=samples, recipe_hash=recipe_hash(self.recipe)
            ),
            inflated_from=self.start.inflated_from,
        )
        save_head(self.model.head, run.path / HEAD_FOLDER, self.classes)
