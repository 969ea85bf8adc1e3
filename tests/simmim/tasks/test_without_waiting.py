"""A training step gives the device its work without waiting for any result of it."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simmim.engine.optimizer import step_if_finite
from tests.simmim.tasks.dense_values import dense_values
from tests.simmim.tasks.meta_steps import DEVICE, take_step


@pytest.mark.parametrize("loss", [{"area": "masked"}, {"area": "all", "norm_target": True}])
def test_a_step_of_pretraining_waits_for_nothing(
    pretrain_values: dict[str, Any], loss: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Autocast does not know the meta device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device: False)
    waits, optimizer = take_step(pretrain_values | {"loss": loss})
    assert not waits.copies + waits.reads
    assert optimizer.seen == DEVICE


@pytest.mark.parametrize("augmentation", [{}, {"mixup": 0.8, "cutmix": 1.0}])
def test_a_step_of_classification_waits_for_nothing(
    classification_values: dict[str, Any], augmentation: dict[str, Any]
) -> None:
    waits, _ = take_step(classification_values | {"augmentation": augmentation})
    assert not waits.copies + waits.reads


def test_a_step_of_upernet_waits_for_nothing(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    values = dense_values(tmp_path, classification_values["encoder"], "segmentation", "upernet")
    waits, _ = take_step(values)
    assert not waits.copies + waits.reads


@pytest.mark.parametrize(
    ("task", "kind", "layers"),
    [
        ("segmentation", "mask2former", 3),
        ("detection", "mask2former", 3),
        ("detection", "rt_detr", 4),  # the encoder's proposals are one
    ],
)
def test_a_step_that_matches_queries_waits_for_their_costs_alone(
    classification_values: dict[str, Any], tmp_path: Path, task: str, kind: str, layers: int
) -> None:
    waits, _ = take_step(dense_values(tmp_path, classification_values["encoder"], task, kind))
    (read,) = waits.reads
    assert read.startswith(f"cpu of shape ({layers}, 4, 6, ")
    assert not waits.copies


@pytest.mark.parametrize("norm", [np.nan, np.inf])
def test_a_fused_optimiser_skips_a_step_on_its_own(norm: float) -> None:
    weight = torch.nn.Parameter(torch.arange(3.0))
    fused = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for value in (1.0, norm):
        weight.grad = torch.full((3,), value)
        before = weight.detach().clone(), copy.deepcopy(fused.state_dict()["state"])
        step_if_finite(fused, weight.grad.norm())
    assert torch.equal(weight, before[0])
    for name, moment in before[1][0].items():
        assert torch.equal(moment, fused.state[weight][name]), name
    assert fused.state[weight]["step"] == 1
    weight.grad = torch.ones(3)
    step_if_finite(fused, weight.grad.norm())
    assert not torch.equal(weight, before[0])
    assert not hasattr(fused, "found_inf")
