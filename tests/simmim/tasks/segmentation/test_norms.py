"""Batch norms of dense heads: what they see on several GPUs, and on anything else."""

import pytest
import torch
from torch import nn

from simmim.engine.distributed.sharding import synchronise_norms
from simmim.tasks.detection.heads import build_detector
from simmim.tasks.detection.recipe import DetectionHead
from simmim.tasks.segmentation.heads import build_segmenter
from simmim.tasks.segmentation.recipe import SegmentationHead
from swinv2 import build_encoder

pytest.importorskip("transformers", reason="needs simmim[finetune]")


def model_of(kind: str) -> nn.Module:
    encoder = build_encoder(
        "tiny",
        image_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=8,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 1, 1),
    )
    if kind == "upernet":
        return build_segmenter(encoder, ["a", "b"], SegmentationHead(channels=8))
    pytest.importorskip("scipy", reason="needs simmim[finetune]")
    head = DetectionHead(kind="rt_detr", channels=32, queries=4, decoder_layers=1)
    return build_detector(encoder, ["a", "b"], head)


def norms_of(model: nn.Module) -> set[type[nn.Module]]:
    return {type(part) for part in model.modules() if "BatchNorm" in type(part).__name__}


@pytest.mark.parametrize("kind", ["upernet", "rt_detr"])
def test_batch_norms_of_several_gpus_become_one(kind: str) -> None:
    model = model_of(kind)
    before, parameters = model.state_dict(), dict(model.named_parameters())
    for device, processes in (("cpu", 2), ("cuda", 1)):
        synchronise_norms(model, torch.device(device), processes)
        assert norms_of(model) == {nn.BatchNorm2d}
    synchronise_norms(model, torch.device("cuda"), 2)
    assert norms_of(model) == {nn.SyncBatchNorm}
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]


def test_a_single_image_per_process_counts_with_synchronised_norms() -> None:
    model = model_of("upernet").train()
    pooled = model.net.decode_head.psp_modules.blocks[0].layers[1]
    model._spare_lone_values(1)
    assert not pooled.batch_norm.training
    model._spare_lone_values(2)
    assert pooled.batch_norm.training
    synchronise_norms(model, torch.device("cuda"), 2)
    model._spare_lone_values(1)
    assert pooled.batch_norm.training
