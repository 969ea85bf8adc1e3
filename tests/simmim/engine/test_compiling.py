"""Training with compiled blocks: where they cannot be compiled, it goes on eagerly and says why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch import Tensor

from simmim.engine.compiling import CompiledBlocks
from simmim.engine.devices import build_accelerator
from simmim.engine.loop import train
from simmim.engine.run import RunFolder
from simmim.recipe import parse
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from swinv2 import SwinV2
from swinv2.blocks import Block

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's compiler


def no_compiler(*_: Any) -> Any:
    raise RuntimeError("No working C++ compiler found in g++")


def no_compiler_of_backwards(graph: Any, inputs: Any) -> Any:
    from torch._dynamo.backends.common import aot_autograd

    compile_forward: Callable[..., Any] = aot_autograd(
        fw_compiler=lambda module, _: module, bw_compiler=no_compiler
    )
    return compile_forward(graph, inputs)


def replace_runs(encoder: SwinV2, run: Callable[..., Tensor]) -> None:
    """Run a function in place of compiled blocks."""
    for block in encoder.modules():
        if isinstance(block, Block):
            block.compiled_run = run


def losses(values: dict[str, Any], folder: Path, backend: Any) -> list[float]:
    """Train for a few steps, compiled by a backend or else eagerly."""
    training = values["training"] | {"steps": 3, "log_every": 1}
    stage = PretrainStage(parse(PretrainRecipe, values | {"training": training}, "test"))
    if backend is Block.run:
        replace_runs(stage.encoder, Block.run)
    elif backend is not None:
        stage.encoder.compile_blocks(backend=backend)
    train(stage, RunFolder(path=folder), build_accelerator("fp32"), None)
    return [line["loss"] for line in RunFolder(path=folder).read_metrics() if "loss" in line]


AT_ONCE = hasattr(torch._functorch.config, "force_non_lazy_backward_lowering")


@pytest.mark.parametrize(
    ("backend", "checkpointing"),
    [
        (no_compiler, "none"),
        pytest.param(
            no_compiler_of_backwards,
            "full",
            marks=pytest.mark.skipif(not AT_ONCE, reason="torch 2.8 has no setting for it"),
        ),
    ],
)
def test_blocks_that_cannot_be_compiled_run_eagerly_with_one_message(
    pretrain_values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    backend: Any,
    checkpointing: str,
) -> None:
    pretrain_values["execution"] = {"checkpointing": checkpointing}
    expected = losses(pretrain_values, tmp_path / "eager", None)
    capsys.readouterr()
    torch._dynamo.reset()
    assert losses(pretrain_values, tmp_path / "compiled", backend) == expected
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("cannot be compiled") == 1
    assert "run eagerly: RuntimeError: No working C++ compiler found in g++. " in shown.err
    assert "apt-get install g++ python3-dev" in shown.err
    assert "first step" not in shown.err
    assert not getattr(torch._functorch.config, "force_non_lazy_backward_lowering", False)


def test_checkpointed_blocks_stay_compiled(
    pretrain_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain_values["execution"] = {"checkpointing": "full"}
    expected = losses(pretrain_values, tmp_path / "eager", None)
    assert losses(pretrain_values, tmp_path / "compiled", Block.run) == expected
    assert "cannot be compiled" not in capsys.readouterr().err


def test_the_first_compiled_step_is_timed(
    pretrain_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses(pretrain_values, tmp_path, Block.run)
    assert capsys.readouterr().err.count("blocks are compiled: the first step took") == 1


def test_all_ranks_run_eagerly_where_one_cannot_compile(pretrain_values: dict[str, Any]) -> None:
    ranks = []
    for run in (Block.run, no_compiler):
        stage = PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
        replace_runs(stage.encoder, run)
        ranks.append((stage.encoder, CompiledBlocks(stage.module)))
    results: list[Tensor] = [encoder(torch.ones(1, 3, 16, 16)) for encoder, _ in ranks]
    assert torch.equal(*results)
    assert [compiled.failed for _, compiled in ranks] == [0, 1]
    reason = "RuntimeError: no compiler"
    for encoder, compiled in ranks:
        assert reason in compiled.run_eagerly(lambda _: [None, reason])
        assert not compiled.failed
        assert all(getattr(block, "compiled_run", None) is None for block in encoder.modules())


def test_an_error_of_the_block_itself_is_raised(pretrain_values: dict[str, Any]) -> None:
    stage = PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    replace_runs(stage.encoder, Block.run)
    compiled = CompiledBlocks(stage.module)
    block: Any = stage.encoder.stages[0].blocks[0]
    block.norm2.weight = torch.nn.Parameter(torch.ones(5))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        stage.encoder(torch.ones(1, 3, 16, 16))
    assert not compiled.failed
