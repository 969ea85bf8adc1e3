"""Recipe of the classification of clips."""

from dataclasses import replace
from typing import ClassVar, Literal

from data_prep.bounds import Count
from simmim.data.settings import ClipDataSettings
from simmim.recipe import settings
from simmim.tasks.classification.recipe import ClassifierRecipe
from simmim.tasks.recipe import SCRATCH, EncoderSettings
from swinv2.config import VideoConfig, video_config

CHANNELS = 3
"""Channels of a frame: clips are RGB."""


@settings
class VideoEncoderSettings(EncoderSettings):
    """A Swin Transformer V2 encoder of clips."""

    frame_patch: Count = 1
    """Frames per patch; data.frames has to be a multiple of it."""
    window_frames: Count = 8
    """Attention window along time in tokens; clamped to the length of a clip."""

    def __post_init__(self) -> None:
        if self.in_channels != CHANNELS:
            raise ValueError(f"in_channels is {self.in_channels}; it must be {CHANNELS} for clips.")

    def video_config(self, image_size: int, frames: int) -> VideoConfig:
        """Return the encoder's configuration for clips of square frames.

        Raises:
            ValueError: the sizes do not fit together.
        """
        return video_config(
            self.config(image_size),
            frames=frames,
            frame_patch=self.frame_patch,
            window_frames=self.window_frames,
        )


@settings
class VideoRecipe(ClassifierRecipe):
    """Classification of clips on a Swin Transformer V2 with windows in time and space."""

    SAMPLES: ClassVar[str] = "clips"
    VALIDATION: ClassVar[str] = "--data.validation CLIPS"
    task: Literal["video"]
    init: str = SCRATCH
    """`scratch` for random weights, an encoder directory (of an image encoder, which is inflated so
    that a still clip has the features of its image; or of a video encoder), or the folder of a
    finished run. Trained weights come with their architecture, mean and std: then only
    `window_size`, `window_frames`, `frame_patch` (of image encoders) and `drop_path` of `encoder`
    apply, which may be left out, and data.mean and data.std do not; the recipe in the run records
    what was trained. For the head see `init_head`."""
    encoder: VideoEncoderSettings = VideoEncoderSettings()
    """The encoder; trained weights bring theirs."""
    data: ClipDataSettings
    """The clips."""

    def __post_init__(self) -> None:
        encoder = self.encoder
        if encoder.window_size is None:  # that of the trained weights
            encoder = replace(encoder, window_size=1)
        encoder.video_config(self.data.image_size, self.data.frames)  # raises if sizes do not fit

    @property
    def input_text(self) -> str:
        """Size of the input and of the attention windows, for a person."""
        frames, window = self.data.frames, self.encoder.window_frames
        return f"{frames} frames of {super().input_text} and {window} frames"
