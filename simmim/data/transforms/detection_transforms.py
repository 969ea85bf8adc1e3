"""Transforms for detection: large-scale jitter (random scale and crop), and whole images.

Pure functions of seed, epoch and sample. Source: Simple Copy-Paste (CVPR 2021), as used by
Mask2Former and Swin V2.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.images.decoding import Decoded
from simmim.data.datasets.coco import CocoImage
from simmim.data.order.order import Address
from simmim.data.order.randomness import numpy_stream
from simmim.data.transforms.decoding import decode_image
from simmim.data.transforms.image_transforms import Instances, Sample
from simmim.data.transforms.segmentation_transforms import draw_crop, fill_values, pad, scale_image
from simmim.data.transforms.settings import (
    CropSettings,
    DecodeSettings,
    DetectionCropSettings,
)
from simmim.data.transforms.turned import size_error, unsure_frame

MIN_SIDE = 1.0
"""Smallest width and height of an object in a crop, in pixels."""


@dataclass(frozen=True, kw_only=True)
class TrainDetectionTransform:
    """Random scale, crop and flip of an image and its objects."""

    data: DetectionCropSettings
    seed: int
    mean: tuple[float, ...]
    labels: dict[int, int]
    """Class index of each category id."""
    masks: bool
    """Whether to return masks, or only boxes."""
    channels: int = 3

    def __call__(self, raw: CocoImage, address: Address) -> Sample:
        """Return the sample of this epoch."""
        decoded = _decoded(raw, self.channels, self.data)
        height, width = raw.size
        side = self.data.image_size
        rng = numpy_stream("dense crop", self.seed, address.epoch, raw.name)
        factor = side / max(height, width) * rng.uniform(*self.data.scale)
        crop = draw_crop(raw.size, side, factor, rng)
        image = crop.image(decoded.pixels)
        objects = [one for one in raw.objects if not one.get("iscrowd", 0)]
        boxes = np.array([one["bbox"] for one in objects], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        stretch = [crop.size[1] / crop.box.width, crop.size[0] / crop.box.height] * 2
        boxes = (boxes - [crop.box.left, crop.box.top] * 2) * stretch
        boxes = boxes.clip(0, [crop.size[1], crop.size[0]] * 2)
        masks = np.zeros((len(objects), 0, 0), dtype=bool)
        if self.masks:
            whole_masks = [mask_of(one, raw.size) for one in objects]
            masks = np.stack([crop.nearest(one) for one in whole_masks]) if objects else masks
            boxes = np.array([box_of(one) for one in masks], dtype=np.float64).reshape(-1, 4)
        if rng.random() < self.data.flip:
            image, masks = image.flip(-1), masks[..., ::-1]
            boxes[:, [0, 2]] = crop.size[1] - boxes[:, [2, 0]]
        kept = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(axis=1)
        labels = np.array([self.labels[one["category_id"]] for one in objects], dtype=np.int64)
        targets = Instances(
            labels=torch.from_numpy(labels[kept]),
            boxes=torch.from_numpy(boxes[kept].astype(np.float32)),
            masks=pad(torch.from_numpy(masks[kept].copy()), side, [0] * int(kept.sum()))
            if self.masks
            else torch.zeros(int(kept.sum()), 0, 0, dtype=torch.bool),
            image=torch.tensor([raw.number, *raw.size]),
        )
        image = pad(image, side, fill_values(self.mean, image.dtype))
        turned = unsure_frame(raw.image, raw.size) if raw.objects else None
        return Sample(image, None, -1, repaired=decoded.repaired, turned=turned, targets=targets)


@dataclass(frozen=True, kw_only=True)
class EvalDetectionTransform:
    """The whole image, as large as fits the square, in its upper left corner."""

    data: CropSettings
    mean: tuple[float, ...]
    channels: int = 3

    def __call__(self, raw: CocoImage, address: Address) -> Sample:
        """Return the sample for evaluation; its targets identify the image."""
        del address
        side = self.data.image_size
        decoded = _decoded(raw, self.channels, self.data)
        image = scale_image(decoded.pixels, side / max(raw.size))
        targets = Instances(
            labels=torch.zeros(0, dtype=torch.int64),
            boxes=torch.zeros(0, 4),
            masks=torch.zeros(0, 0, 0, dtype=torch.bool),
            image=torch.tensor([raw.number, *raw.size]),
        )
        image = pad(image, side, fill_values(self.mean, image.dtype))
        turned = unsure_frame(raw.image, raw.size) if raw.objects else None
        return Sample(image, None, -1, repaired=decoded.repaired, turned=turned, targets=targets)


def _decoded(raw: CocoImage, channels: int, data: DecodeSettings) -> Decoded:
    decoded = decode_image(raw, channels=channels, settings=data)
    if decoded.pixels.shape[:2] != raw.size:
        rows, columns = decoded.pixels.shape[:2]
        raise size_error(
            raw.image,
            (rows, columns),
            raw.size,
            of="entry in the JSON file",
            remedy="use the image that was annotated, or correct height and width in the JSON file",
        )
    return decoded


def mask_of(annotation: dict[str, Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the mask of an object checked by `CocoSet.require_masks`: bool (rows, columns)."""
    from pycocotools import mask  # noqa: PLC0415 - an optional dependency

    encoded = annotation["segmentation"]
    if isinstance(encoded, list):
        encoded = mask.merge(mask.frPyObjects(encoded, *size))
    elif isinstance(encoded["counts"], list):
        encoded = mask.frPyObjects(encoded, *size)
    decoded: NDArray[np.bool_] = mask.decode(encoded).astype(bool)
    return decoded


def box_of(mask: NDArray[np.bool_]) -> list[float]:
    """Return the bounding box of a mask: left, top, right, bottom; zeros if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return [0.0, 0.0, 0.0, 0.0]
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]
