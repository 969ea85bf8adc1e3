"""Object detectors of transformers: Mask2Former for instances, RT-DETR for boxes.

Sources: Mask2Former (CVPR 2022), RT-DETR (CVPR 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.data.transforms.image_transforms import Instances
from simmim.tasks.detection.box_loss import box_loss
from simmim.tasks.detection.denoising import BoxTargets
from simmim.tasks.detection.recipe import DetectionHead
from simmim.tasks.segmentation.heads import (
    backbone_config_of,
    build_mask2former,
    last_maps,
    names_of_labels,
)
from simmim.tasks.segmentation.mask_loss import MaskTargets, mask_loss, mask_normalisers
from simmim.tasks.segmentation.matching import image_of_targets
from swinv2 import SwinV2
from swinv2.bridges.transformers_backbone import fill_backbone


@dataclass(frozen=True, kw_only=True)
class Detections:
    """Detections in one image, in the coordinates of the padded square."""

    labels: Tensor
    """int64 (objects,)."""
    scores: Tensor
    """float32 (objects,), highest first."""
    boxes: Tensor | None
    """float32 (objects, 4): left, top, right, bottom in pixels; None if there are masks."""
    masks: Tensor | None
    """float32 (objects, rows, columns), logits at any resolution; None if there are boxes."""


class InstanceMask2Former(nn.Module):
    """Mask2Former for instance segmentation."""

    has_masks = True

    def __init__(self, encoder: SwinV2, names: Sequence[str], head: DetectionHead) -> None:
        super().__init__()
        self.detections = head.detections
        self.net = build_mask2former(
            encoder,
            names,
            channels=head.channels,
            queries=head.queries,
            decoder_layers=head.decoder_layers or 10,
            points=head.points,
        )

    @property
    def backbone(self) -> Any:
        """The encoder in the model."""
        return self.net.model.pixel_level_module.encoder

    def normalisers(self, targets: Sequence[Instances]) -> Tensor:
        """Return those of `mask_normalisers`."""
        return mask_normalisers(self.net, [len(one.labels) for one in targets])

    def loss(
        self,
        images: Tensor,
        targets: Sequence[Instances],
        *,
        seeds: Sequence[int],
        normalisers: Tensor,
    ) -> Tensor:
        """Return the loss over normalised images (batch, channels, side, side)."""
        counts = [len(one.labels) for one in targets]
        found = MaskTargets(
            masks=torch.cat([one.masks for one in targets]),
            labels=torch.cat([one.labels for one in targets]),
            images=image_of_targets(counts, images.device),
            counts=counts,
        )
        return mask_loss(self.net, images, found, seeds=seeds, normalisers=normalisers)

    def find(self, images: Tensor) -> list[Detections]:
        """Return the detections in each image, scored by class and mean mask probability."""
        output = self.net(pixel_values=images)
        found = []
        classes = output.class_queries_logits.float().softmax(dim=-1)[..., :-1]
        for scores, logits in zip(classes, output.masks_queries_logits.float(), strict=True):
            best = scores.flatten().topk(min(self.detections, scores.numel()))
            masks = logits[best.indices // scores.shape[1]]
            inside = (masks > 0).float()
            certain = (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
            total, order = (best.values * certain).sort(descending=True)
            labels = (best.indices % scores.shape[1])[order]
            found.append(Detections(labels=labels, scores=total, boxes=None, masks=masks[order]))
        return found


class RTDetr(nn.Module):
    """RT-DETR on the last three feature maps of the encoder."""

    has_masks = False

    def __init__(self, encoder: SwinV2, names: Sequence[str], head: DetectionHead) -> None:
        super().__init__()
        self.detections = head.detections
        backbone = backbone_config_of(encoder, last_maps(encoder, 3))
        from transformers import (  # noqa: PLC0415 - an optional part
            RTDetrConfig,
            RTDetrForObjectDetection,
        )

        config = RTDetrConfig(
            backbone_config=backbone,
            encoder_in_channels=list(encoder.config.stage_dims[-3:]),
            feat_strides=list(encoder.strides[-3:]),
            encoder_hidden_dim=head.channels,
            encoder_ffn_dim=4 * head.channels,
            d_model=head.channels,
            decoder_in_channels=[head.channels] * 3,
            decoder_ffn_dim=4 * head.channels,
            num_queries=head.queries,
            decoder_layers=head.decoder_layers or 6,
            freeze_backbone_batch_norms=False,  # there are none
            **names_of_labels(names),
        )
        net = RTDetrForObjectDetection(config)
        fill_backbone(net.model.backbone.model, encoder)
        self.net = net

    @property
    def backbone(self) -> Any:
        """The encoder in the model."""
        return self.net.model.backbone.model

    def normalisers(self, targets: Sequence[Instances]) -> Tensor:
        """Return the number of boxes, float32 (1,)."""
        return torch.tensor([float(sum(len(one.labels) for one in targets))])

    def loss(
        self,
        images: Tensor,
        targets: Sequence[Instances],
        *,
        seeds: Sequence[int],
        normalisers: Tensor,
    ) -> Tensor:
        """Return the loss over normalised images (batch, channels, side, side)."""
        counts = [len(one.labels) for one in targets]
        left_top, right_bottom = torch.cat([one.boxes for one in targets]).chunk(2, dim=1)
        centred = torch.cat([(left_top + right_bottom) / 2, right_bottom - left_top], dim=1)
        found = BoxTargets(
            boxes=centred / images.shape[-1],
            labels=torch.cat([one.labels for one in targets]),
            images=image_of_targets(counts, images.device),
            counts=counts,
        )
        return box_loss(self.net, images, found, seeds=seeds, boxes=normalisers[0])

    def find(self, images: Tensor) -> list[Detections]:
        """Return the detections in each image."""
        output = self.net(pixel_values=images)
        size = images.new_tensor([images.shape[-1], images.shape[-2]] * 2)
        found = []
        for logits, boxes in zip(output.logits.float(), output.pred_boxes.float(), strict=True):
            scores = logits.sigmoid()
            best = scores.flatten().topk(min(self.detections, scores.numel()))
            centres, extents = boxes[best.indices // scores.shape[1]].split(2, dim=1)
            corners = torch.cat([centres - extents / 2, centres + extents / 2], dim=1) * size
            labels = best.indices % scores.shape[1]
            found.append(Detections(labels=labels, scores=best.values, boxes=corners, masks=None))
        return found


def build_detector(
    encoder: SwinV2, names: Sequence[str], head: DetectionHead
) -> InstanceMask2Former | RTDetr:
    """Build the model of a recipe, with a randomly initialised head.

    Raises:
        ValueError: a package is not installed, or the encoder does not fit the head.
    """
    match head.kind:
        case "mask2former":
            return InstanceMask2Former(encoder, names, head)
        case "rt_detr":
            return RTDetr(encoder, names, head)


def masks_at(logits: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """Resize masks of the padded square to the image: bool (objects, *size).

    Args:
        logits: (objects, rows, columns) over the square.
        side: side of the square in pixels, with the image in the upper left.
        size: rows and columns of the image.
    """
    if not len(logits):
        return logits.new_zeros(0, *size, dtype=torch.bool)
    factor = side / max(size)
    rows, columns = (max(1, round(length * factor)) for length in size)
    square = F.interpolate(logits[None], (side, side), mode="bilinear", align_corners=False)
    part = square[..., :rows, :columns]
    return F.interpolate(part, size, mode="bilinear", align_corners=False)[0] > 0
