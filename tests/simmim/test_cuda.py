"""On a GPU the encoder computes what it computes on a CPU, and trains, resumes and exports.

pytest -m gpu tests/simmim/test_cuda.py
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from simmim.cli import main
from simmim.engine.run import RunFolder
from simmim.method.model import SimMIM
from swinv2 import SwinV2, build_encoder, load_encoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),  # of torch's compiler
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

DEVICE = torch.device("cuda")
SIZES: dict[str, Any] = {
    "image_size": 192,
    "window_size": 12,
    "embed_dim": 48,
    "depths": (2, 2, 2, 2),
    "num_heads": (2, 4, 8, 16),
}
PATHS = ["auto", "explicit", "sdpa", "sequential"]
PRECISIONS = [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)]
"""Of autocast, and the largest relative error of features; float32 is without TF32."""


@pytest.fixture(scope="module")
def encoder() -> SwinV2:
    """An encoder whose blocks do something: norms of fresh ones are zero."""
    encoder = build_encoder("tiny", **SIZES)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in encoder.named_parameters():
        if "norm" in name:
            parameter.data += 0.5 * torch.rand(parameter.shape, generator=generator)
    return encoder


def images_of(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def features_and_gradients(encoder: SwinV2, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features, and the gradients of all weights in a row."""
    features = encoder(images)
    features.float().square().mean().backward()
    gradients = [p.grad.flatten() for p in encoder.parameters() if p.grad is not None]
    assert len(gradients) == len(list(encoder.parameters()))
    return features.detach(), torch.cat(gradients).detach()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [(192, 192), (200, 328)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_features_and_gradients_are_those_of_the_cpu_in_double(
    encoder: SwinV2,
    dtype: torch.dtype,
    tolerance: float,
    path: Any,
    compiled: bool,
    size: tuple[int, int],
) -> None:
    exact = features_and_gradients(copy.deepcopy(encoder).double(), images_of(*size).double())
    ours = copy.deepcopy(encoder).to(DEVICE)
    ours.set_execution(attention=path)
    if compiled:
        ours.compile_blocks()
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        features, gradients = features_and_gradients(ours, images_of(*size).to(DEVICE))
    assert relative_error(features, exact[0]) <= tolerance
    assert relative_error(gradients, exact[1]) <= 3 * tolerance  # rounding adds up on the way back


@pytest.mark.parametrize("checkpointing", ["attention", "full"])
def test_checkpointing_changes_nothing(encoder: SwinV2, checkpointing: Any) -> None:
    results = []
    for setting in ("none", checkpointing):
        ours = copy.deepcopy(encoder).to(DEVICE)
        ours.set_execution(checkpointing=setting)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            results.append(features_and_gradients(ours, images_of(192, 192).to(DEVICE)))
    assert torch.equal(results[0][0], results[1][0])
    assert relative_error(results[1][1], results[0][1].double().cpu()) <= 1e-2


def test_large_windows_fit_and_are_finite() -> None:
    encoder = build_encoder("tiny", image_size=1536, window_size=48)
    encoder.set_execution(attention="sequential", checkpointing="full")
    model = SimMIM(encoder).to(DEVICE).train()
    mask = torch.rand(1, 48, 48, device=DEVICE) < 0.6
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = model(torch.randn(1, 3, 1536, 1536, device=DEVICE), mask).loss
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_it_trains_resumes_and_exports(
    pretrain_values: dict[str, Any], tmp_path: Path, precision: str, compiled: bool
) -> None:
    pretrain_values["training"] |= {"precision": precision, "steps": 60, "optimizer": {"lr": 3e-3}}
    pretrain_values["execution"] = {"compile": compiled}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(pretrain_values))
    folder = tmp_path / "run"
    command = ["pretrain", "--config", str(recipe), "--folder", str(folder)]
    assert main(command) == 0
    longer = ["--resume", "auto", "--allow-recipe-changes", "--training.steps", "80"]
    assert main([*command, *longer]) == 0
    losses = [line["loss"] for line in RunFolder(path=folder).read_metrics() if "loss" in line]
    assert len(losses) == 80 // pretrain_values["training"]["log_every"]
    assert sum(losses[-5:]) < sum(losses[:5])
    target = tmp_path / "encoder"
    assert main(["export", str(folder), str(target)]) == 0
    assert load_encoder(target).config.embed_dim == 16
