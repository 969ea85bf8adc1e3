"""From a clip to model input: which frames, and which part of them; pure functions of the sample.

A view is eight frames, say, of one place of the picture. Frames are taken evenly over the whole
clip: it is cut into as many equal segments as frames are asked for, and each gives one. A clip of
fewer frames than that shows some of them more than once.

A view travels as an image of frames · 3 channels, so that batches of clips are batches of images;
several views of a clip lie one behind the other. `unfolded` is the way back.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simmim.data.datasets.clips import RawClip
from simmim.data.order.order import Address
from simmim.data.order.randomness import numpy_stream
from simmim.data.transforms.cropping import Box, central_box, random_box, resize
from simmim.data.transforms.frames import Video
from simmim.data.transforms.image_transforms import Sample
from simmim.data.transforms.pillow_decoding import MAX_PIXELS

CHANNELS = 3


def frame_numbers(length: int, phases: np.ndarray) -> list[int]:
    """Return the number of the frame that each segment of a clip gives.

    Args:
        length: frames of the clip.
        phases: where in its segment each frame is taken, from 0 to below 1.
    """
    segments = np.arange(len(phases))
    numbers = np.floor((segments + phases) * length / len(phases)).astype(np.int64)
    return [min(int(number), length - 1) for number in numbers]


def spatial_boxes(shape: tuple[int, ...], size: tuple[int, int], views: int) -> list[Box]:
    """Return the parts of frames of this shape, (rows, columns, …), that so many views show.

    They are as large as the frames and the shape of `size` allow, and lie evenly along the longer
    axis, from border to border; one view is in the middle.
    """
    middle = central_box(shape, size, crop_pct=1.0)
    room = (shape[0] - middle.height, shape[1] - middle.width)
    places = [0.5] if views == 1 else [view / (views - 1) for view in range(views)]
    return [
        middle._replace(top=round(room[0] * place), left=round(room[1] * place)) for place in places
    ]


def unfolded(images: Tensor, frames: int) -> Tensor:
    """Return batches of clips (batch, frames, 3, rows, columns) as they travelled.

    Images are (batch, views · frames · 3, rows, columns); views count as clips of the batch.
    """
    return images.reshape(-1, frames, CHANNELS, *images.shape[2:])


def shown(frames: list[np.ndarray], box: Box, size: tuple[int, int]) -> Tensor:
    """Return a part of the frames, resized: uint8 (frames · 3, rows, columns)."""
    return torch.cat([resize(frame, box, size) for frame in frames])


@dataclass(frozen=True, kw_only=True)
class TrainClip:
    """A random frame of each segment, all cropped and mirrored alike.

    A clip looks different in each epoch, but always the same.
    """

    size: tuple[int, int]
    """Height and width, pixels."""
    frames: int
    seed: int
    scale: tuple[float, float]
    """Least and greatest share of a frame's area."""
    ratio: tuple[float, float]
    """Least and greatest width-to-height ratio."""
    flip: float
    """Probability of mirroring."""
    max_pixels: int = MAX_PIXELS
    """Pixels of the largest frame that is decoded."""

    def __call__(self, raw: RawClip, address: Address) -> Sample:
        """Return the clip as this epoch shows it."""
        video = Video(raw.path, max_pixels=self.max_pixels)
        rng = numpy_stream("clip", self.seed, address.epoch, raw.name)
        frames = video.frames(frame_numbers(len(video), rng.random(self.frames)))
        box = random_box(frames[0].shape, rng, scale=self.scale, ratio=self.ratio)
        flip = bool(rng.random() < self.flip)
        return Sample(shown(frames, box, self.size), None, raw.label, flip)


@dataclass(frozen=True, kw_only=True)
class EvaluationClip:
    """So many views of a clip in time, times so many in space; one is the middle of each segment.

    Views in time take frames at evenly spaced places of the segments; those in space lie evenly
    along the longer axis. Without randomness: the same in every epoch.
    """

    size: tuple[int, int]
    """Height and width, pixels."""
    frames: int
    temporal: int = 1
    spatial: int = 1
    max_pixels: int = MAX_PIXELS
    """Pixels of the largest frame that is decoded."""

    def __call__(self, raw: RawClip, address: Address) -> Sample:  # noqa: ARG002
        """Return the clip as evaluation sees it, views in space fastest."""
        video = Video(raw.path, max_pixels=self.max_pixels)
        numbers = [
            frame_numbers(len(video), np.full(self.frames, (view + 0.5) / self.temporal))
            for view in range(self.temporal)
        ]
        decoded = video.frames([number for view in numbers for number in view])
        boxes = spatial_boxes(decoded[0].shape, self.size, self.spatial)
        views = [
            shown(decoded[start : start + self.frames], box, self.size)
            for start in range(0, len(decoded), self.frames)
            for box in boxes
        ]
        return Sample(torch.cat(views), None, raw.label)
