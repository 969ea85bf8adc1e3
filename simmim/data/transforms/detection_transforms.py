"""Large-scale jitter for detection: random scale and crop, a pure function of seed and sample.

Source: Simple Copy-Paste (CVPR 2021), as Mask2Former and Swin V2 take it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from simmim.data.datasets.coco import CocoImage
from simmim.data.order.errors import BadSampleError
from simmim.data.order.order import Address
from simmim.data.order.randomness import numpy_stream
from simmim.data.transforms.decoding import Decoded, decode_pixels
from simmim.data.transforms.image_transforms import Sample
from simmim.data.transforms.pillow_decoding import MAX_PIXELS
from simmim.data.transforms.segmentation_transforms import draw_cut, filling_of, pad, whole
from simmim.data.transforms.targets import Instances

SMALLEST = 1.0
"""Pixels of width and height that must be left of an object in a crop."""


@dataclass(frozen=True, kw_only=True)
class JitterTransform:
    """Random scale, crop and mirroring of an image and its objects."""

    side: int
    """Of the square that the model sees, pixels."""
    seed: int
    mean: tuple[float, ...]
    labels: dict[int, int]
    """Class number of each category id."""
    masks: bool
    """Whether masks are wanted, or boxes alone."""
    scale: tuple[float, float] = (0.1, 2.0)
    """Factor of the size at which the image just fits the square."""
    flip: float = 0.5
    channels: int = 3
    max_pixels: int = MAX_PIXELS

    def __call__(self, raw: CocoImage, address: Address) -> Sample:
        """Return the sample as this epoch shows it."""
        decoded = _decoded(raw, self.channels, self.max_pixels)
        height, width = raw.size
        rng = numpy_stream("dense crop", self.seed, address.epoch, raw.name)
        factor = self.side / max(height, width) * rng.uniform(*self.scale)
        cut = draw_cut(raw.size, self.side, factor, rng)
        image = cut.image(decoded.pixels)
        objects = [one for one in raw.objects if not one.get("iscrowd", 0)]
        boxes = np.array([one["bbox"] for one in objects], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        stretch = [cut.size[1] / cut.box.width, cut.size[0] / cut.box.height] * 2
        boxes = (boxes - [cut.box.left, cut.box.top] * 2) * stretch
        boxes = boxes.clip(0, [cut.size[1], cut.size[0]] * 2)
        masks = np.zeros((len(objects), 0, 0), dtype=bool)
        if self.masks:
            whole_masks = [mask_of(one, raw.size) for one in objects]
            masks = np.stack([cut.nearest(one) for one in whole_masks]) if objects else masks
            boxes = np.array([box_of(one) for one in masks], dtype=np.float64).reshape(-1, 4)
        if rng.random() < self.flip:
            image, masks = image.flip(-1), masks[..., ::-1]
            boxes[:, [0, 2]] = cut.size[1] - boxes[:, [2, 0]]
        kept = ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all(axis=1)
        labels = np.array([self.labels[one["category_id"]] for one in objects], dtype=np.int64)
        targets = Instances(
            labels=torch.from_numpy(labels[kept]),
            boxes=torch.from_numpy(boxes[kept].astype(np.float32)),
            masks=pad(torch.from_numpy(masks[kept].copy()), self.side, [0] * int(kept.sum()))
            if self.masks
            else torch.zeros(int(kept.sum()), 0, 0, dtype=torch.bool),
            image=torch.tensor([raw.number, *raw.size]),
        )
        image = pad(image, self.side, filling_of(self.mean, image.dtype))
        return Sample(image, None, -1, repaired=decoded.repaired, targets=targets)


@dataclass(frozen=True, kw_only=True)
class DetectionView:
    """The whole image, as large as fits the square, in its upper left corner."""

    side: int
    mean: tuple[float, ...]
    channels: int = 3
    max_pixels: int = MAX_PIXELS

    def __call__(self, raw: CocoImage, address: Address) -> Sample:
        """Return the sample as evaluation sees it; its targets say which image it is."""
        del address
        decoded = _decoded(raw, self.channels, self.max_pixels)
        image = whole(decoded.pixels, self.side / max(raw.size))
        targets = Instances(
            labels=torch.zeros(0, dtype=torch.int64),
            boxes=torch.zeros(0, 4),
            masks=torch.zeros(0, 0, 0, dtype=torch.bool),
            image=torch.tensor([raw.number, *raw.size]),
        )
        image = pad(image, self.side, filling_of(self.mean, image.dtype))
        return Sample(image, None, -1, repaired=decoded.repaired, targets=targets)


def _decoded(raw: CocoImage, channels: int, max_pixels: int) -> Decoded:
    decoded = decode_pixels(raw.image, raw.extension, channels=channels, max_pixels=max_pixels)
    if decoded.pixels.shape[:2] != raw.size:
        rows, columns = decoded.pixels.shape[:2]
        raise BadSampleError(
            f"the image has {columns}x{rows} pixels, its annotations are for {raw.size[1]}x"
            f"{raw.size[0]}: correct height and width in the JSON file"
        )
    return decoded


def mask_of(annotation: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Return an object's pixels, which `CocoSet.require_masks` has looked at: bool, of the size."""
    from pycocotools import mask  # noqa: PLC0415 - an optional part

    described = annotation["segmentation"]
    if isinstance(described, list):
        described = mask.merge(mask.frPyObjects(described, *size))
    elif isinstance(described["counts"], list):
        described = mask.frPyObjects(described, *size)
    decoded: np.ndarray = mask.decode(described).astype(bool)
    return decoded


def box_of(mask: np.ndarray) -> list[float]:
    """Return left, top, right and bottom of what a mask covers; zeros where it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return [0.0, 0.0, 0.0, 0.0]
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]
