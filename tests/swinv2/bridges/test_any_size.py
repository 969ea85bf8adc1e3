"""The encoder for dynamic sizes equals the encoder at every size, also when compiled."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from swinv2 import SwinV2
from swinv2.bridges.any_size import AnySizeFeatures, bias_table
from swinv2.bridges.torch_export import PlainModel, export_program, trace
from swinv2.bridges.verification import plain_copy

traces_any_size = pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.13"), reason="only torch 2.13 traces every size"
)
SIZES = [(64, 64), (70, 133), (33, 35), (9, 100), (4, 4), (1, 1), (31, 65)]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"window_size": (3, 5), "patch_size": 2, "in_channels": 1},
        {"window_size": (1, 6), "depths": (2, 3), "num_heads": (1, 2), "extra_norm_every": 2},
        {"window_size": 1, "depths": (2, 2), "num_heads": (1, 2), "in_channels": 4},
        {"window_size": 16, "pretrained_window_sizes": ((8, 8),) * 4},
    ],
)
def test_any_size_equals_the_encoder(
    build: Callable[..., SwinV2], sizes: dict[str, object]
) -> None:
    encoder = build(**sizes)
    graph = AnySizeFeatures(plain_copy(encoder)).eval()
    for height, width in SIZES:
        images = torch.randn(2, encoder.config.in_channels, height, width)
        with torch.no_grad():
            for ours, theirs in zip(encoder.features(images), graph(images), strict=True):
                torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a compiler, on a machine that does much else
@traces_any_size
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_written_program_compiles_ahead_of_time(
    build: Callable[..., SwinV2],
    draw_heads: Callable[[SwinV2], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    sizes = {"depths": (2, 2), "num_heads": (1, 2), "image_size": 32, "extra_norm_every": 2}
    encoder = build(**sizes, window_size=(1, 6))
    normalisation = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    classifier = draw_heads(encoder)["classifier"]
    export_program(encoder, tmp_path / "out", **normalisation, classifier=classifier, any_size=True)
    program = torch.export.load(tmp_path / "out" / "model.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        file = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "compiled.pt2")
        )
    compiled = torch._inductor.aoti_load_package(file)
    for height, width in SIZES:
        for batch in (1, 3):
            images = torch.randn(batch, 3, height, width)
            with torch.no_grad():
                maps = encoder.features(images)
                logits = classifier.logits(maps[-1].permute(0, 2, 3, 1))
            for ours, theirs in zip((*maps, logits), compiled(images), strict=True):
                torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@traces_any_size
def test_compilers_know_every_length(build: Callable[..., SwinV2]) -> None:
    encoder = build(depths=(2, 1), num_heads=(1, 2), window_size=(3, 4))
    program = trace(PlainModel(plain_copy(encoder)), any_size=True)
    assert len(program.range_constraints) == 3  # batch, height and width; others would be unknown
    images = next(node for node in program.graph.nodes if node.name == "images").meta["val"]
    stage = encoder.strides[-1]
    hints = [side.node.hint for side in images.shape[2:]]
    assert all(hint > stage * side for hint, side in zip(hints, (3, 4), strict=True))


def test_the_bias_of_a_smaller_window_is_a_subset_of_the_table(
    build: Callable[..., SwinV2],
) -> None:
    attention = build().stages[1].blocks[0].attention
    table = bias_table(attention, (4, 5))
    with torch.no_grad():
        small = attention.position_bias((2, 3))
    for query in range(6):
        for key in range(6):
            down, right = query // 3 - key // 3, query % 3 - key % 3
            row = (down + 3) * 9 + right + 4
            torch.testing.assert_close(table[row], small[:, query, key])


def test_a_plain_copy_shares_weights_only(build: Callable[..., SwinV2]) -> None:
    encoder = build(drop_path=0.5, window_size=4)
    encoder.set_input(window_size=8)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = encoder(images)
    encoder.train()
    encoder.set_execution(attention="sequential", checkpointing="full")
    encoder.compile_blocks(backend="eager")
    execution, compiled = encoder.execution, encoder.stages[0].blocks[0].compiled_run
    assert compiled is not None
    plain = plain_copy(encoder)
    assert encoder.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.execution is execution
    assert encoder.stages[0].blocks[0].compiled_run is compiled
    assert not plain.training
    assert plain.execution != execution
    ours, theirs = encoder.state_dict(), plain.state_dict()
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
    with torch.no_grad():
        torch.testing.assert_close(plain(images), expected, rtol=1e-4, atol=1e-5)


def test_a_plain_copy_of_half_precision_is_float32(build: Callable[..., SwinV2]) -> None:
    encoder = build().bfloat16()
    assert {tensor.dtype for tensor in plain_copy(encoder).state_dict().values()} == {torch.float32}
    assert encoder.norm.weight.dtype == torch.bfloat16
