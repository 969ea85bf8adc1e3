"""Swin Transformer V2 for clips: windows and shifts in three dimensions, weights of images.

What attends to what, and to where, is as for images, with time as a third axis before rows and
columns: windows reach over frames, and position offsets have a log-spaced coordinate of time.
Merging joins neighbours in space alone, so that a clip keeps its frames.

The weights are those of an image encoder, and start as what it does: of a clip of one frame over
and over, every frame has the features of the image. A query meets T equal copies of each key, and a
softmax over copies mixes as one over originals does; the coordinate of time has no weight at first;
and a patch of several frames takes their mean.

Source: Swin Transformer V2, arXiv 2111.09883, section 4 (Kinetics-400) and Video Swin Transformer,
arXiv 2106.13230, section 3.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from swinv2.config import VideoConfig, video_config
from swinv2.encoder import SwinV2
from swinv2.hierarchy import Hierarchy
from swinv2.position_bias import PositionBias


class VideoSwinV2(Hierarchy):
    """A hierarchical encoder of clips, with windows and shifts in time and space."""

    config: VideoConfig

    def __init__(self, config: VideoConfig) -> None:
        super().__init__(config)
        for module in self.modules():
            if isinstance(module, PositionBias):
                nn.init.zeros_(module.expand.weight[:, 0])  # the coordinate of time

    def embed(self, clips: Tensor) -> Tensor:
        """Turn clips into tokens.

        Floating-point (batch, frames, channels, height, width) becomes (batch, frames/frame_patch,
        height/patch, width/patch, embed_dim), height and width rounded up.

        Raises:
            ValueError: the clips have another shape, number of channels, a number of frames that
                patches do not divide, or integer values.
        """
        channels, depth = self.config.in_channels, self.config.frame_patch
        if clips.ndim != 5 or clips.shape[2] != channels or clips.shape[1] % depth:
            multiple = f"a multiple of {depth} " if depth > 1 else ""
            raise ValueError(
                f"clips have shape {tuple(clips.shape)}; this encoder takes (batch, {multiple}"
                f"frames, {channels}, height, width)"
            )
        if not clips.is_floating_point():
            raise ValueError(
                f"clips are {clips.dtype}; make them floating point and normalise them first"
            )
        # A patch of several frames is one of an image with the channels of all of them.
        images = rearrange(
            clips,
            "batch (frames t) channels height width -> (batch frames) (t channels) height width",
            t=depth,
        )
        tokens: Tensor = self.patch_embed(images)
        return rearrange(
            tokens,
            "(batch frames) rows columns dim -> batch frames rows columns dim",
            batch=len(clips),
        )

    def encode(self, tokens: Tensor, chances: Tensor | None = None) -> Tensor:
        """Turn the tokens of `embed` into the normalised tokens of the last stage.

        (batch, frames, rows, columns, embed_dim) becomes (batch, frames, rows/8, columns/8,
        8·embed_dim) for four stages, rounded up. For chances see `SwinV2.encode`.

        Raises:
            ValueError: the tokens, or the chances, have another shape.
        """
        return self.stage_outputs(tokens, chances)[-1]

    def forward(self, clips: Tensor, chances: Tensor | None = None) -> Tensor:
        """Embed clips, then encode them."""
        return self.encode(self.embed(clips), chances)

    def features(self, clips: Tensor, chances: Tensor | None = None) -> list[Tensor]:
        """Give a map of each stage, (batch, channels, frames, rows, columns); see `SwinV2`."""
        outputs = self.stage_outputs(self.embed(clips), chances)
        return [tokens.permute(0, 4, 1, 2, 3) for tokens in outputs]


def inflate(
    encoder: SwinV2, *, frames: int = 8, frame_patch: int = 1, window_frames: int = 8
) -> VideoSwinV2:
    """Make a video encoder of an image encoder: on a still clip it gives the image's features.

    Sizes within a frame are the image encoder's, and change with it: `load_encoder` and `set_input`
    take it to larger ones first.

    Args:
        encoder: of images; it is left as it is.
        frames: nominal length of a clip.
        frame_patch: frames of a patch; its weights are those of the image, divided by it.
        window_frames: attention window along time, in tokens.

    Raises:
        ValueError: a size cannot work.
    """
    config = video_config(
        encoder.config, frames=frames, frame_patch=frame_patch, window_frames=window_frames
    )
    with torch.random.fork_rng(devices=[]):
        video = VideoSwinV2(config)
    tensors = dict(encoder.state_dict())
    for name, tensor in tensors.items():
        if name.endswith("position_bias.expand.weight"):
            tensors[name] = torch.cat((torch.zeros_like(tensor[:, :1]), tensor), dim=1)
    patches = "patch_embed.projection.weight"
    tensors[patches] = tensors[patches].repeat(1, frame_patch, 1, 1) / frame_patch
    video.load_state_dict(tensors)
    first = next(encoder.parameters())
    return video.to(first.device, first.dtype).train(encoder.training)
