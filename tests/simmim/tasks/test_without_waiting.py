"""A training step gives the device its work without waiting for any result of it."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.engine.optimizer import step_if_finite
from tests.simmim.tasks.meta_steps import DEVICE, take_step


@pytest.mark.parametrize("loss", [{"area": "masked"}, {"area": "all", "norm_target": True}])
def test_a_step_of_pretraining_waits_for_nothing(
    pretrain_values: dict[str, Any], loss: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Autocast does not know the meta device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device: False)
    blocking, optimizer = take_step(pretrain_values | {"loss": loss})
    assert not blocking
    assert optimizer.seen == DEVICE


@pytest.mark.parametrize("augmentation", [{}, {"mixup": 0.8, "cutmix": 1.0}])
def test_a_step_of_classification_waits_for_nothing(
    classification_values: dict[str, Any], augmentation: dict[str, Any]
) -> None:
    blocking, _ = take_step(classification_values | {"augmentation": augmentation})
    assert not blocking


def test_a_step_of_segmentation_waits_for_nothing(
    classification_values: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="needs simmim[finetune]")
    random = np.random.default_rng(0)
    for number in range(16):
        for folder, shape in (("images", (32, 32, 3)), ("annotations", (32, 32))):
            file = tmp_path / "scenes" / folder / "training" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 3, shape, dtype=np.uint8)).save(file)
    data = {"folder": str(tmp_path / "scenes"), "validation": None, "num_classes": 3}
    sizes = {"image_size": 32, "workers": 0, "largest_class": 1.0}
    values = {
        "task": "segmentation",
        "encoder": classification_values["encoder"] | {"depths": [1, 1, 1, 1]},
        "data": data | sizes,
        "head": {"channels": 8, "auxiliary_channels": 8},
        "training": {"batch_size": 4, "steps": 2, "optimizer": {"lr": 1e-3}},
    }
    values["encoder"] |= {"num_heads": [1, 2, 2, 2], "window_size": 4, "patch_size": 2}
    blocking, _ = take_step(values)
    assert not blocking


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
