"""Transforms of clips: sampling of frames and their crops, as pure functions of the sample.

A view is a number of frames of one crop. Frames are sampled evenly over the clip: it is divided
into as many equal segments as there are frames, and one frame is taken from each. Shorter clips
repeat frames.

A view is stored as an image of frames · 3 channels, so that batches of clips are batches of images;
the views of a clip are concatenated. `unfold_frames` restores the frame axis.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simmim.data.datasets.clips import RawClip
from simmim.data.order.order import Address
from simmim.data.order.randomness import numpy_stream
from simmim.data.transforms.cropping import Box, central_box, random_box, resize
from simmim.data.transforms.frames import Video
from simmim.data.transforms.image_transforms import Sample
from simmim.data.transforms.settings import CropSettings, RandomCropSettings

CHANNELS = 3


def frame_numbers(length: int, phases: NDArray[np.float64]) -> list[int]:
    """Return the index of the frame taken from each segment of a clip.

    Args:
        length: number of frames of the clip.
        phases: relative position within each segment, 0 to below 1.
    """
    segments = np.arange(len(phases))
    numbers = np.floor((segments + phases) * length / len(phases)).astype(np.int64)
    return [min(int(number), length - 1) for number in numbers]


def spatial_boxes(shape: tuple[int, ...], size: tuple[int, int], views: int) -> list[Box]:
    """Return the crops of spatial views, for frames of this shape, (rows, columns, …).

    They are as large as the aspect ratio of `size` allows, and evenly spaced along the longer axis
    from border to border; a single view is centred.
    """
    middle = central_box(shape, size, crop_pct=1.0)
    room = (shape[0] - middle.height, shape[1] - middle.width)
    places = [0.5] if views == 1 else [view / (views - 1) for view in range(views)]
    return [
        middle._replace(top=round(room[0] * place), left=round(room[1] * place)) for place in places
    ]


def unfold_frames(images: Tensor, frames: int) -> Tensor:
    """Return clips (batch · views, frames, 3, rows, columns) of stored batches.

    Images are (batch, views · frames · 3, rows, columns); each view becomes a clip of the batch.
    """
    return images.reshape(-1, frames, CHANNELS, *images.shape[2:])


def crop_frames(frames: list[NDArray[np.uint8]], box: Box, size: tuple[int, int]) -> Tensor:
    """Return a crop of the frames, resized: uint8 (frames · 3, rows, columns)."""
    return torch.cat([resize(frame, box, size) for frame in frames])


@dataclass(frozen=True, kw_only=True)
class TrainClipTransform:
    """A random frame of each segment, with the same random crop and flip for all frames.

    They differ between epochs but are reproducible.
    """

    data: RandomCropSettings
    """The crop."""
    frames: int
    seed: int

    def __call__(self, raw: RawClip, address: Address) -> Sample:
        """Return the clip of this epoch."""
        video = Video(raw.path, max_pixels=self.data.max_pixels)
        rng = numpy_stream("clip", self.seed, address.epoch, raw.name)
        frames = video.frames(frame_numbers(len(video), rng.random(self.frames)))
        box = random_box(frames[0].shape, rng, scale=self.data.scale, ratio=self.data.ratio)
        flip = bool(rng.random() < self.data.flip)
        return Sample(crop_frames(frames, box, self.data.size), None, raw.label, flip)


@dataclass(frozen=True, kw_only=True)
class EvalClipTransform:
    """Temporal views times spatial views of a clip; a single one is the centre of each.

    Temporal views take frames at evenly spaced positions within the segments, spatial views are
    evenly spaced along the longer axis. The same in every epoch.
    """

    data: CropSettings
    """The size of frames."""
    frames: int
    temporal: int = 1
    spatial: int = 1

    def __call__(self, raw: RawClip, address: Address) -> Sample:  # noqa: ARG002
        """Return the clip for evaluation, with spatial views varying fastest."""
        video = Video(raw.path, max_pixels=self.data.max_pixels)
        numbers = [
            frame_numbers(len(video), np.full(self.frames, (view + 0.5) / self.temporal))
            for view in range(self.temporal)
        ]
        decoded = video.frames([number for view in numbers for number in view])
        boxes = spatial_boxes(decoded[0].shape, self.data.size, self.spatial)
        views = [
            crop_frames(decoded[start : start + self.frames], box, self.data.size)
            for start in range(0, len(decoded), self.frames)
            for box in boxes
        ]
        return Sample(torch.cat(views), None, raw.label)
