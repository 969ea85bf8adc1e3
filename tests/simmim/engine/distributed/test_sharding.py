"""Sharding by block: sizes of shards, and parity with unsharded training."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.commands.config import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from simmim import SimMIM
from simmim.data.loader.batch import Batch
from simmim.engine.distributed.sharding import (
    no_gradient_sync,
    shard_by_block,
    shard_for_training,
    shard_size,
    sharding_units,
)
from simmim.recipe import parse
from simmim.tasks.pretrain.model import build_model
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainModule
from swinv2 import build_encoder
from swinv2.blocks import Block
from tests.simmim.forked import finish

ROOT = Path(__file__).parents[4]
FSDP2 = ROOT / "jobs" / "accelerate" / "fsdp2.yaml"


Train = Callable[..., dict[str, float]]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Train on two ranks and return the largest differences from training whole."""

    def on_two_ranks(**execution: Any) -> dict[str, float]:
        program = str(Path(__file__).with_name("train_sharded.py"))
        text = finish([program, json.dumps(execution)], tmp_path / "log", ranks=2)
        (line,) = [line for line in text.splitlines() if line.startswith("{")]
        found: dict[str, float] = json.loads(line)
        return found

    return on_two_ranks


def assert_equal(found: dict[str, float]) -> None:
    assert found["loss"] < 1e-5, found
    assert found["weight"] < 1e-5, found
    assert found["average"] < 1e-5, found
    assert found["feature"] < 1e-4, found  # of size 1 and after all blocks


def test_sharded_training_equals_unsharded_training(train: Train) -> None:
    assert_equal(train(attention="sequential", checkpointing="full"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "execution", [{}, {"checkpointing": "attention"}, {"attention": "sdpa"}], ids=str
)
def test_sharded_training_is_exact_with_every_execution(
    train: Train, execution: dict[str, Any]
) -> None:
    assert_equal(train(**execution))


@pytest.mark.slow
def test_weights_gathered_in_bfloat16_stay_close(train: Train) -> None:
    found = train(bf16=True, checkpointing="full")
    assert 0 < found["loss"] < 5e-3, found
    assert found["weight"] < 1e-2, found  # of float32 shards, after four steps of 1e-3


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_accumulated_gradients_are_kept_in_shards(one_rank: None) -> None:
    encoder = build_encoder(
        "tiny", image_size=16, window_size=4, patch_size=2, embed_dim=8, depths=(1,),
        num_heads=(1,),
    )  # fmt: skip
    shard_by_block(encoder, init_device_mesh("cpu", (1,)), param_dtype=None)
    images = torch.randn(2, 3, 16, 16)
    with no_gradient_sync(encoder, Accelerator(cpu=True)):
        encoder(images[:1]).square().sum().backward()
    first = [one.grad for one in encoder.parameters()]
    assert all(isinstance(gradient, DTensor) for gradient in first)
    encoder(images[1:]).square().sum().backward()
    total = [one.grad.full_tensor() for one in encoder.parameters()]  # type: ignore[union-attr]
    encoder.zero_grad()
    encoder(images).square().sum().backward()
    whole = [one.grad.full_tensor() for one in encoder.parameters()]  # type: ignore[union-attr]
    torch.testing.assert_close(total, whole)


def test_targets_keep_their_precision_in_bfloat16(one_rank: None) -> None:
    """The loss of float images far from 0, such as heights, is that of the same rounded weights."""
    values = {
        "task": "pretrain",
        "encoder": {"variant": "tiny", "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1]}
        | {"window_size": 4, "in_channels": 1},
        "data": {"shards": "nowhere", "image_size": 32, "mean": [1000.0], "std": [1.0]},
        "mask": {"cell": 8},
        "training": {"batch_size": 2, "steps": 1, "precision": "bf16"}
        | {"optimizer": {"lr": 1e-3}},
    }
    recipe = parse(PretrainRecipe, values, "test")
    whole, sharded = (PretrainModule(build_model(recipe), recipe.data, seed=0) for _ in range(2))
    for parameter in whole.parameters():
        parameter.data = parameter.data.bfloat16().float()
    generator = torch.Generator().manual_seed(0)
    images = 1000 + torch.randn(2, 1, 32, 32, generator=generator)
    masks = torch.eye(4, dtype=torch.bool).expand(2, 4, 4)
    batch = Batch(images, masks, None, torch.zeros(2, 3, dtype=torch.int64))
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    shard_for_training(sharded, accelerator)
    with accelerator.autocast():
        expected = whole(batch)
    found = sharded(batch)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_sharding_units_of_giant() -> None:
    with torch.device("meta"):
        encoder = build_encoder("giant", image_size=192, window_size=12)
        model = SimMIM(encoder)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in encoder.parameters()) == pytest.approx(
        3.0e9, rel=0.01
    )
    *blocks, outside = sharding_units(model)
    assert [unit.name for unit in blocks] == [
        f"encoder.stages.{stage}.blocks.{block}"
        for stage, depth in enumerate((2, 2, 42, 4))
        for block in range(depth)
    ]
    names = [name for unit in (*blocks, outside) for name in unit.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert sum(unit.size for unit in (*blocks, outside)) == total
    # Query, key, value and projection, and an MLP of four times the width: 12 · 4096², and vectors.
    largest = max(unit.size for unit in blocks)
    assert 12 * 4096**2 <= largest < 1.01 * 12 * 4096**2
    assert outside.size < largest
    for world in (2, 3, 8, 64, 1000):
        assert sum(shard_size(model, rank=rank, world=world) for rank in range(world)) == total


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no encoder .*blocks"):
        sharding_units(nn.Linear(2, 2))


def test_accelerates_file_makes_each_block_a_unit() -> None:
    settings = load_config_from_file(str(FSDP2))
    fsdp = settings.fsdp_config
    assert settings.distributed_type == "FSDP"
    assert (fsdp["fsdp_version"], fsdp["fsdp_activation_checkpointing"]) == (2, False)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=fsdp["fsdp_version"],
        auto_wrap_policy=fsdp["fsdp_auto_wrap_policy"].lower(),
        transformer_cls_names_to_wrap=fsdp["fsdp_transformer_layer_cls_to_wrap"].split(","),
        reshard_after_forward=fsdp["fsdp_reshard_after_forward"],
        activation_checkpointing=fsdp["fsdp_activation_checkpointing"],
        cpu_ram_efficient_loading=fsdp["fsdp_cpu_ram_efficient_loading"],
    )
    with torch.device("meta"):
        encoder = build_encoder("tiny", image_size=64, window_size=4)
    plugin.set_auto_wrap_policy(encoder)
    is_unit = fsdp2_prepare_auto_wrap_policy(plugin, encoder)
    units = [module for module in encoder.modules() if is_unit(module)]
    assert units == [module for module in encoder.modules() if isinstance(module, Block)]
    assert len(units) == sum(encoder.config.depths)
