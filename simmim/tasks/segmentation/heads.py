"""Semantic segmentation models: UperNet and Mask2Former of transformers.

Both take normalised images and return a loss, or scores (batch, classes, rows, columns).
Sources: UperNet (ECCV 2018), Mask2Former (CVPR 2022).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.data.loader.batch import Batch
from simmim.data.order.randomness import stream_seed
from simmim.data.transforms.image_transforms import ClassMap
from simmim.data.transforms.labels import IGNORED
from simmim.tasks.segmentation.mask_loss import MaskTargets, mask_loss, mask_normalisers
from simmim.tasks.segmentation.matching import image_of_targets
from simmim.tasks.segmentation.recipe import SegmentationHead
from swinv2 import SwinV2
from swinv2.bridges.transformers_backbone import (
    backbone_config,
    fill_backbone,
    register_backbone,
)
from swinv2.bridges.verification import quiet_transformers


def check_installed(*, packages: Sequence[str] = ("transformers",)) -> None:
    """Raise ValueError unless these optional packages are installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"segmentation and detection need {' and '.join(missing)}: pip install "
            "'simmim[finetune]'."
        )


def last_maps(encoder: SwinV2, count: int) -> list[str]:
    """Return the names of the last feature maps of an encoder, for transformers.

    Raises:
        ValueError: the encoder has fewer stages.
    """
    stages = len(encoder.config.depths)
    if stages < count:
        raise ValueError(
            f"the head needs {count} feature maps, and the encoder has {stages} stages: choose an "
            "encoder with more, or another head."
        )
    return [f"stage{number + 1}" for number in range(stages - count, stages)]


def backbone_config_of(encoder: SwinV2, maps: Sequence[str]) -> Any:
    """Return the backbone config of an encoder with these feature maps, for a head's config.

    Raises:
        ValueError: transformers is not installed.
    """
    check_installed()
    register_backbone()
    return backbone_config(encoder.config, out_features=maps)


@contextmanager
def passing_noise(backbone: nn.Module, drop_path_noise: Tensor | None) -> Iterator[None]:
    """Pass `drop_path_noise` to a backbone through heads that do not take it."""

    def with_noise(
        module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        del module
        return arguments, named | {"drop_path_noise": drop_path_noise}

    handle = backbone.register_forward_pre_hook(with_noise, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def seeds_of(batch: Batch, seed: int) -> list[int]:
    """Return a seed for each image, from seed, epoch and sample, for what heads draw at random."""
    addresses = batch.addresses.tolist()
    return [stream_seed("dense head", seed, *address) % 2**63 for address in addresses]


class UperNet(nn.Module):
    """UperNet: pyramid pooling on the last map, a feature pyramid over all, an auxiliary head.

    Batch norms are synchronised over GPUs. On CPUs, or on one GPU, a process should have two images
    or more per micro-batch: for a single one, the batch norm of the 1x1 pooling uses its running
    statistics.
    """

    def __init__(self, encoder: SwinV2, names: Sequence[str], head: SegmentationHead) -> None:
        super().__init__()
        maps = last_maps(encoder, len(encoder.config.depths))
        backbone = backbone_config_of(encoder, maps)
        from transformers import (  # noqa: PLC0415 - an optional part
            UperNetConfig,
            UperNetForSemanticSegmentation,
        )

        config = UperNetConfig(
            backbone_config=backbone,
            hidden_size=head.channels or 512,
            use_auxiliary_head=head.auxiliary_weight > 0,
            auxiliary_loss_weight=head.auxiliary_weight,
            auxiliary_channels=head.auxiliary_channels,
            auxiliary_in_channels=encoder.config.stage_dims[-2] if len(maps) > 1 else None,
            loss_ignore_index=IGNORED,
            **names_of_labels(names),
        )
        net = UperNetForSemanticSegmentation(config)
        if net.auxiliary_head is not None:
            net.auxiliary_head.in_index = max(0, len(maps) - 2)
        fill_backbone(net.backbone, encoder)
        self.net = net
        self.auxiliary_weight = head.auxiliary_weight

    @property
    def backbone(self) -> Any:
        """The encoder."""
        return self.net.backbone

    def normalisers(self, targets: Sequence[ClassMap]) -> Tensor:
        """Return the number of pixels that are not ignored, float32 (1,)."""
        return (_stacked(targets) != IGNORED).sum().view(1).float()

    def loss(
        self,
        images: Tensor,
        targets: Sequence[ClassMap],
        *,
        seeds: Sequence[int],
        normalisers: Tensor,
    ) -> Tensor:
        """Return the cross entropy, plus the weighted one of the auxiliary head.

        Args:
            images: normalised (batch, channels, side, side).
            targets: classes of the pixels of each image.
            seeds: not used, since the head draws nothing at random.
            normalisers: number of pixels that the loss is averaged over.
        """
        del seeds
        classes = _stacked(targets)
        self._spare_lone_values(len(images))
        maps = self.backbone.forward_with_filtered_kwargs(images).feature_maps
        total = _cross_entropy(self.net.decode_head(maps), classes)
        if self.net.auxiliary_head is not None:
            auxiliary = _cross_entropy(self.net.auxiliary_head(maps), classes)
            total = total + self.auxiliary_weight * auxiliary
        return total / normalisers[0]

    def scores(self, images: Tensor) -> Tensor:
        """Return probabilities, (batch, classes, rows, columns)."""
        maps = self.backbone.forward_with_filtered_kwargs(images).feature_maps
        logits = self.net.decode_head(maps).float()
        return _enlarged(logits, images.shape[-2:]).softmax(dim=1)

    def _spare_lone_values(self, images: int) -> None:
        pooling = self.net.decode_head.psp_modules
        for scale, block in zip(pooling.pool_scales, pooling.blocks, strict=True):
            norm = block.layers[1].batch_norm
            several = images > 1 or scale > 1 or isinstance(norm, nn.SyncBatchNorm)
            norm.train(self.training and several)


class Mask2Former(nn.Module):
    """Mask2Former for semantic segmentation: one mask per class of an image."""

    def __init__(self, encoder: SwinV2, names: Sequence[str], head: SegmentationHead) -> None:
        super().__init__()
        self.net = build_mask2former(
            encoder,
            names,
            channels=head.channels or 256,
            queries=head.queries,
            decoder_layers=head.decoder_layers,
            points=head.points,
        )

    @property
    def backbone(self) -> Any:
        """The encoder."""
        return self.net.model.pixel_level_module.encoder

    def normalisers(self, targets: Sequence[ClassMap]) -> Tensor:
        """Return those of `mask_normalisers`, with one target mask per class in an image."""
        return mask_normalisers(self.net, [len(one.present) for one in targets])

    def loss(
        self,
        images: Tensor,
        targets: Sequence[ClassMap],
        *,
        seeds: Sequence[int],
        normalisers: Tensor,
    ) -> Tensor:
        """Return the loss, with one target mask per class in an image; see `mask_loss`."""
        counts = [len(one.present) for one in targets]
        labels = torch.cat([one.present for one in targets])
        of_image = image_of_targets(counts, images.device)
        masks = _stacked(targets)[of_image] == labels[:, None, None]
        found = MaskTargets(masks=masks, labels=labels, images=of_image, counts=counts)
        return mask_loss(self.net, images, found, seeds=seeds, normalisers=normalisers)

    def scores(self, images: Tensor) -> Tensor:
        """Return sums over masks of the probability of class and pixel."""
        found = self.net(pixel_values=images)
        classes = found.class_queries_logits.float().softmax(dim=-1)[..., :-1]
        masks = _enlarged(found.masks_queries_logits.float(), images.shape[-2:]).sigmoid()
        return torch.einsum("bqc,bqhw->bchw", classes, masks)


def build_mask2former(
    encoder: SwinV2,
    names: Sequence[str],
    *,
    channels: int,
    queries: int,
    decoder_layers: int,
    points: int,
) -> Any:
    """Build Mask2Former of transformers on an encoder with four stages.

    Raises:
        ValueError: transformers is not installed, or the encoder has fewer than four stages.
    """
    maps = last_maps(encoder, 4)
    backbone = backbone_config_of(encoder, maps)
    from transformers import (  # noqa: PLC0415 - an optional part
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
    )

    with quiet_transformers():  # it warns of backbones of other models
        config = Mask2FormerConfig(
            backbone_config=backbone,
            feature_size=channels,
            mask_feature_size=channels,
            hidden_dim=channels,
            encoder_feedforward_dim=4 * channels,
            dim_feedforward=8 * channels,
            num_queries=queries,
            decoder_layers=decoder_layers,
            train_num_points=points,
            feature_strides=list(encoder.strides[-4:]),
            common_stride=encoder.strides[-4],
            **names_of_labels(names),
        )
    net = Mask2FormerForUniversalSegmentation(config)
    fill_backbone(net.model.pixel_level_module.encoder, encoder)
    return net


def build_segmenter(
    encoder: SwinV2, names: Sequence[str], head: SegmentationHead
) -> UperNet | Mask2Former:
    """Build the model of a recipe, with a randomly initialised head.

    Raises:
        ValueError: a package is not installed, or the encoder does not fit the head.
    """
    match head.kind:
        case "upernet":
            return UperNet(encoder, names, head)
        case "mask2former":
            return Mask2Former(encoder, names, head)


def names_of_labels(names: Sequence[str]) -> dict[str, Any]:
    """Return class names as in a config of transformers."""
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }


def _stacked(targets: Sequence[ClassMap]) -> Tensor:
    """Return the classes of the pixels of all images: uint8 (batch, side, side)."""
    return torch.stack([one.classes for one in targets])


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the sum over all pixels that are not ignored."""
    enlarged = _enlarged(logits.float(), classes.shape[-2:])
    return F.cross_entropy(enlarged, classes.long(), ignore_index=IGNORED, reduction="sum")


def _enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
