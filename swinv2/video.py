"""Swin Transformer V2 for clips: windows and shifts in three dimensions, inflated image weights.

Attention works as for images, with time as a third axis before rows and columns: windows span
frames, and position offsets have a log-spaced coordinate of time. Merging joins neighbours in space
only, so that a clip keeps its frames.

Weights are inflated from an image encoder, so that each frame of a clip that repeats one image has
the features of that image: a query attends to T equal copies of each key, and a softmax over copies
mixes as one over originals does; the time coordinate starts with zero weight; and a patch of
several frames takes their mean.

Source: Swin Transformer V2, arXiv 2111.09883, section 4 (Kinetics-400) and Video Swin Transformer,
arXiv 2106.13230, section 3.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from swinv2.config import VideoConfig, video_config
from swinv2.encoder import HierarchicalEncoder, SwinV2, check_pixels
from swinv2.position_bias import PositionBias


class VideoSwinV2(HierarchicalEncoder):
    """A hierarchical encoder of clips, with windows and shifts in time and space."""

    CONFIG = VideoConfig
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
            ValueError: the clips have a wrong shape or number of channels, a number of frames that
                is not a multiple of `frame_patch`, or are integers.
        """
        channels, depth = self.config.in_channels, self.config.frame_patch
        check_pixels("clips", clips)
        wrong = clips.ndim != 5 or clips.shape[2] != channels or clips.shape[1] % depth
        if wrong or not (clips.shape[1] and clips.shape[3:].numel()):
            multiple = f"a multiple of {depth} " if depth > 1 else ""
            raise ValueError(
                f"clips have shape {tuple(clips.shape)}; this encoder takes (batch, {multiple}"
                f"frames, {channels}, height, width)."
            )
        # A patch of several frames is a patch of an image with the channels of all of them.
        images = rearrange(
            clips,
            "batch (frames t) channels height width -> (batch frames) (t channels) height width",
            t=depth,
        )
        tokens: Tensor = self.patch_embed(self.in_weight_precision(images))
        return rearrange(
            tokens,
            "(batch frames) rows columns dim -> batch frames rows columns dim",
            frames=clips.shape[1] // depth,
        )

    def encode(self, tokens: Tensor, drop_path_noise: Tensor | None = None) -> Tensor:
        """Turn the tokens of `embed` into the normalised tokens of the last stage.

        (batch, frames, rows, columns, embed_dim) becomes (batch, frames, rows/8, columns/8,
        8·embed_dim) for four stages, rounded up. For `drop_path_noise` see `SwinV2.encode`.

        Raises:
            ValueError: the tokens or the noise have a wrong shape.
        """
        return self.stage_outputs(tokens, drop_path_noise)[-1]

    def forward(self, clips: Tensor, drop_path_noise: Tensor | None = None) -> Tensor:
        """Embed clips, then encode them."""
        return self.encode(self.embed(clips), drop_path_noise)

    def features(self, clips: Tensor, drop_path_noise: Tensor | None = None) -> list[Tensor]:
        """Return a map of each stage, (batch, channels, frames, rows, columns); see `SwinV2`."""
        outputs = self.stage_outputs(self.embed(clips), drop_path_noise)
        return [tokens.permute(0, 4, 1, 2, 3) for tokens in outputs]


def inflate(
    encoder: SwinV2, *, frames: int = 8, frame_patch: int = 1, window_frames: int = 8
) -> VideoSwinV2:
    """Turn an image encoder into a video encoder; on a still clip it has the image's features.

    Sizes within a frame are those of the image encoder: to change them, use `load_encoder` or
    `set_input` first.

    Args:
        encoder: image encoder, which is not changed.
        frames: nominal length of a clip.
        frame_patch: frames of a patch; its weights are those of the image divided by this number.
        window_frames: attention window along time, in tokens.

    Raises:
        ValueError: a size cannot work.
        TypeError: `encoder` is not an image encoder.
    """
    if not isinstance(encoder, SwinV2):
        raise TypeError(f"encoder is a {type(encoder).__name__}; give an image encoder, a SwinV2.")
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
