"""Fine-tuning on clips: an image encoder inflated in time, average pool and a linear head."""

import math
from pathlib import Path

import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from data_prep.channels import RGB
from simmim.data.datasets.clips import ClipSet
from simmim.data.loader.batch import Batch
from simmim.data.transforms.clip_transforms import (
    EvalClipTransform,
    TrainClipTransform,
    unfold_frames,
)
from simmim.data.transforms.frames import require_decoder
from simmim.engine.generators import seeded
from simmim.tasks.classification.classifier import Classifier
from simmim.tasks.classification.stage import ClassifierStage
from simmim.tasks.features import Normalise, sample_drop_path_noise
from simmim.tasks.pretrained import InitialEncoder, find_weights, load_initial_encoder
from simmim.tasks.recipe import SCRATCH
from simmim.tasks.video.recipe import CHANNELS, VideoRecipe
from swinv2 import (
    Provenance,
    VideoSwinV2,
    inflate,
    load_video_encoder,
    read_encoder_config,
    read_video_config,
    save_video_encoder,
)
from swinv2.config_file import is_video_encoder


class VideoModule(nn.Module):
    """Cross-entropy with label smoothing over stored batches of clips."""

    def __init__(
        self,
        model: Classifier,
        initial: InitialEncoder[VideoSwinV2],
        *,
        frames: int,
        label_smoothing: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.frames = frames
        self.seed = seed
        self.normalise = Normalise(initial.mean, initial.std)
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean loss over a batch."""
        assert batch.labels is not None
        clips = self.clips(batch.images, batch.flips)
        logits = self.model(clips, sample_drop_path_noise(self.model.encoder, batch, self.seed))
        return F.cross_entropy(logits.float(), batch.labels, label_smoothing=self.label_smoothing)

    def clips(self, images: Tensor, flips: Tensor | None = None) -> Tensor:
        """Return normalised, flipped clips (batch · views, frames, 3, height, width)."""
        clips = unfold_frames(images, self.frames)
        of_frames = None if flips is None else flips.repeat_interleave(self.frames)
        normal: Tensor = self.normalise(clips.flatten(0, 1), of_frames)
        return normal.view(clips.shape)


class VideoStage(ClassifierStage[VideoRecipe, ClipSet]):
    """Classification of clips; single-view top-1 selects the best checkpoint.

    Raises:
        ValueError: there are no or too few clips, or `init` cannot be loaded.
    """

    initial: InitialEncoder[VideoSwinV2]
    module: VideoModule

    def __init__(self, recipe: VideoRecipe) -> None:
        require_decoder()
        training, validation = recipe.data.open()
        super().__init__(recipe, training, validation, training.classes)
        self.module = VideoModule(
            self.model,
            self.initial,
            frames=recipe.data.frames,
            label_smoothing=recipe.label_smoothing,
            seed=recipe.training.seed,
        )

    @staticmethod
    def load_initial(recipe: VideoRecipe) -> InitialEncoder[VideoSwinV2]:
        """Load the encoder that `init` names, inflating one of images, or build a random one.

        Raises:
            ValueError: `init` is neither an encoder directory nor a finished run, or its encoder
                does not fit the sizes.
        """
        init, wanted, data, seed = recipe.init, recipe.encoder, recipe.data, recipe.training.seed
        if init == SCRATCH:
            with seeded(seed):
                encoder = VideoSwinV2(wanted.video_config(data.image_size, data.frames))
            mean, std = data.normalisation
            return InitialEncoder(encoder=encoder, mean=mean, std=std)
        source = find_weights(init)
        if is_video_encoder(source.encoder):
            clips = read_video_config(source.encoder)
            encoder = load_video_encoder(
                source.encoder,
                image_size=data.image_size,
                window_size=wanted.window_size,
                frames=data.frames,
                window_frames=wanted.window_frames,
                drop_path=wanted.drop_path,
            )
            return InitialEncoder(
                encoder=encoder,
                mean=clips.mean,
                std=clips.std,
                head=source.head,
                inflated_from=clips.inflated_from,
            )
        images = read_encoder_config(source.encoder)
        if images.config.in_channels != CHANNELS and data.channels is None:  # else by name
            raise ValueError(
                f"the encoder {init} has {images.config.in_channels} input channels, clips "
                f"have {CHANNELS}; start from another encoder."
            )
        initial = load_initial_encoder(init, wanted, data, seed)
        encoder = inflate(
            initial.encoder,
            frames=data.frames,
            frame_patch=wanted.frame_patch,
            window_frames=wanted.window_frames,
        )
        return InitialEncoder(
            encoder=encoder, mean=initial.mean, std=initial.std, inflated_from=images.provenance
        )

    @staticmethod
    def class_names(recipe: VideoRecipe) -> tuple[str, ...]:
        """Return the names of the classes of clips."""
        return recipe.data.open()[0].classes

    def class_counts(self) -> dict[str, int]:
        """Return the number of training clips of each class, which each have a shard."""
        found = self.training_shards
        return dict(zip(found.classes, found.sizes, strict=True))

    def training_transform(self) -> TrainClipTransform:
        """Return the transform: frame sampling, crop and flip."""
        data = self.recipe.data
        return TrainClipTransform(data=data, frames=data.frames, seed=self.recipe.training.seed)

    def validation_transform(self, views: tuple[int, int] = (1, 1)) -> EvalClipTransform:
        """Return the transform to this many views in time and space."""
        data = self.recipe.data
        return EvalClipTransform(data=data, frames=data.frames, temporal=views[0], spatial=views[1])

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return top-1 and top-5 accuracy in percent and the mean cross-entropy on held-out clips.

        Of a single view, plus multi-view top-1 and top-5 if `data.views` has more than one.
        """
        if self.validation_shards is None:
            return {}
        figures = self._figures(accelerator, (1, 1))
        views = self.recipe.data.views
        if figures and views != (1, 1):
            of_views = self._figures(accelerator, views)
            accuracies = [name for name in ("top1", "top5") if name in of_views]
            figures |= {f"views_{name}": of_views[name] for name in accuracies}
        return figures

    def _figures(self, accelerator: Accelerator, views: tuple[int, int]) -> dict[str, float]:
        """Return metrics over all ranks for this many views in time and space."""
        training, count = self.recipe.training, math.prod(views)
        batches = self.held_out(
            self.validation_transform(views),
            at_a_time=training.batch_size // training.accumulation // count,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )

        def logits(images: Tensor) -> Tensor:
            # Views of a clip are consecutive, and their probabilities are averaged.
            found: Tensor = self.model(self.module.clips(images)).float().log_softmax(-1)
            return found.view(-1, count, found.shape[-1]).logsumexp(1) - math.log(count)

        return self.figures(batches, accelerator, logits)

    def save_encoder(self, path: Path, provenance: Provenance) -> None:
        """Write the encoder directory."""
        initial = self.initial
        save_video_encoder(
            initial.encoder,
            path,
            mean=initial.mean,
            std=initial.std,
            channels=RGB,
            provenance=provenance,
            inflated_from=initial.inflated_from,
        )
