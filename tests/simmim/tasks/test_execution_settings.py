"""How the encoder is computed, as recipes say it: it changes no result and blocks no resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch._dynamo.utils import counters

import simmim.cli
import simmim.tasks.train
from simmim.cli import main
from simmim.engine.checkpoint.directory import complete_checkpoints
from simmim.engine.checkpoint.resume import read_model
from simmim.engine.run import RunFolder
from simmim.recipe import RecipeError, parse, to_yaml
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.classification.stage import ClassificationStage
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage, load_pretrained
from simmim.tasks.recipe import ExecutionSettings
from swinv2 import Execution, load_encoder
from swinv2.blocks import Block


def is_compiled(encoder: torch.nn.Module) -> bool:
    (answer,) = {
        module.compiled_run is not None for module in encoder.modules() if isinstance(module, Block)
    }
    return answer


def test_a_recipe_reaches_the_encoder(
    pretrain_values: dict[str, Any], classification_values: dict[str, Any]
) -> None:
    execution = {
        "attention": "sequential",
        "checkpointing": ["full", "attention"],
        "scores_at_a_time": 64,
        "compile": True,
    }
    stages = [
        PretrainStage(parse(PretrainRecipe, pretrain_values | {"execution": execution}, "test")),
        ClassificationStage(
            parse(ClassificationRecipe, classification_values | {"execution": execution}, "test")
        ),
    ]
    expected = Execution(
        attention="sequential", checkpointing=("full", "attention"), scores_at_a_time=64
    )
    for stage in stages:
        assert stage.model.encoder.execution == expected
        assert is_compiled(stage.model.encoder)


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("given", ["auto", True, False])
def test_by_default_blocks_are_compiled_on_a_gpu(
    pretrain_values: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    given: Any,
    has_gpu: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    values = pretrain_values | ({} if given == "auto" else {"execution": {"compile": given}})
    stage = PretrainStage(parse(PretrainRecipe, values, "test"))
    assert stage.recipe.execution == ExecutionSettings(compile=given)
    assert stage.model.encoder.execution == Execution()
    assert is_compiled(stage.model.encoder) == (has_gpu if given == "auto" else given)
    assert parse(PretrainRecipe, yaml.safe_load(to_yaml(stage.recipe)), "saved") == stage.recipe


@pytest.mark.parametrize(
    ("execution", "messages"),
    [
        (
            {"attention": "fast"},
            ["execution.attention: Input should be 'auto', ", "or a list, got 'fast'"],
        ),
        ({"checkpointing": ["full", "half"]}, ["execution.checkpointing.1: ", "got 'half'"]),
        (
            {"checkpointing": ["full"]},
            ["execution.checkpointing has length 1, and the encoder has 2 stages"],
        ),
        ({"scores_at_a_time": 0}, ["scores_at_a_time is 0; it must be an integer"]),
        (
            {"attention": 1, "compile": "yes", "speed": 2},
            ["execution.attention: ", "execution.compile: ", "execution.speed: unknown key"],
        ),
    ],
)
def test_every_mistake_is_named(
    pretrain_values: dict[str, Any], execution: dict[str, Any], messages: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(PretrainRecipe, pretrain_values | {"execution": execution}, "test")
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == len([message for message in messages if message.startswith("exec")] or [1])
    for message in messages:
        assert message in str(caught.value)


def test_a_directory_with_other_stages_is_compared_with_the_lists(
    classification_values: dict[str, Any], encoder_directory: Path
) -> None:
    values = classification_values | {
        "init": str(encoder_directory),
        "execution": {"checkpointing": ["full", "none", "none"]},
    }
    with pytest.raises(ValueError, match="length 3, and the encoder has 2 stages"):
        ClassificationStage(parse(ClassificationRecipe, values, "test"))


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "auto"),
        (["--compile"], True),
        (["--execution.compile", "true"], True),
        (["--compile", "--execution.checkpointing", "full"], True),
    ],
)
def test_the_command_line_asks_for_compiling(
    command: str,
    given: list[str],
    expected: Any,
    pretrain_values: dict[str, Any],
    classification_values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class LaunchedError(Exception):
        pass

    def launch(_: Any, recipe: Any, **options: Any) -> None:
        assert recipe.execution.compile == expected
        assert recipe.execution.checkpointing == ("full" if "full" in given else "none")
        raise LaunchedError

    monkeypatch.setattr(simmim.tasks.train, "train_recipe", launch)
    config = tmp_path / "recipe.yaml"
    config.write_text(
        yaml.dump(pretrain_values if command == "pretrain" else classification_values)
    )
    with pytest.raises(LaunchedError):
        main([command, "--config", str(config), *given])


def test_execution_may_change_on_resume(pretrain_values: dict[str, Any], tmp_path: Path) -> None:
    def recipe(**execution: Any) -> PretrainRecipe:
        return parse(PretrainRecipe, pretrain_values | {"execution": execution}, "test")

    run = RunFolder(path=tmp_path / "run")
    run.begin(recipe(), step=0)
    run.check(recipe(compile=True, attention="sdpa", checkpointing="full"), resume=True)
    saved = yaml.safe_load(run.recipe.read_text())
    del saved["execution"]  # of a run that was begun before there was such a section
    run.recipe.write_text(yaml.dump(saved))
    run.check(recipe(checkpointing="full"), resume=True)


def train(config: Path, folder: Path, *more: str, command: str = "pretrain") -> dict[str, float]:
    """Train by the command line, and return what was logged: losses by step, and figures."""
    arguments = [command, "--config", str(config), "--folder", str(folder), *more]
    assert main(arguments) == 0
    found: dict[str, float] = {}
    for line in RunFolder(path=folder).read_metrics():
        for name in ("loss", "validation_loss", "mean_color_loss"):
            if name in line:
                found[f"{name} {line['step']}"] = line[name]
    return found


def last_weights(folder: Path) -> dict[str, Tensor]:
    return read_model(complete_checkpoints(folder / "checkpoints")[-1])


def compiled_training(
    config: Path, tmp_path: Path, *more: str, tolerance: float, occasions: int = 3
) -> None:
    """Hold a compiled training to the same one in eager mode."""
    eager = train(config, tmp_path / "eager", *more)
    torch._dynamo.reset()
    counters.clear()
    compiled = train(config, tmp_path / "compiled", "--compile", *more)
    assert not counters["graph_break"]
    # Three blocks that differ, each in training, in evaluation, and for another size of batch.
    assert 0 < counters["stats"]["unique_graphs"] <= 3 * occasions
    assert compiled == pytest.approx(eager, rel=tolerance)
    assert last_weights(tmp_path / "compiled").keys() == last_weights(tmp_path / "eager").keys()
    assert not [name for name in last_weights(tmp_path / "compiled") if "_orig_mod" in name]


STEPS = [
    *("--encoder.depths", "[2,1]", "--training.batch_size", "16", "--training.accumulation", "2"),
    *("--training.steps", "4", "--training.log_every", "1", "--training.validate_every", "2"),
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_compiled_run_equals_an_eager_one_and_resumes_as_one(
    pretrain_config: Path, classification_values: dict[str, Any], tmp_path: Path
) -> None:
    compiled_training(pretrain_config, tmp_path, *STEPS, tolerance=1e-5)

    run = RunFolder(path=tmp_path / "compiled")
    images = torch.randn(2, 3, 16, 16)
    encoder = load_encoder(run.encoder)
    assert not is_compiled(encoder)
    exported = tmp_path / "exported"
    assert main(["export", str(run.path), str(exported)]) == 0
    with torch.no_grad():
        torch.testing.assert_close(load_encoder(exported)(images), encoder(images))
        torch.testing.assert_close(load_pretrained(run).model.encoder(images), encoder(images))

    # A compiled run goes on in eager mode, and an eager one compiled, without being told to.
    longer = [*STEPS, "--training.steps", "4", "--resume"]
    first = str(run.checkpoints / "step-00000004")
    train(pretrain_config, run.path, *longer, first)
    train(pretrain_config, tmp_path / "eager", "--compile", *longer, "auto")

    config = tmp_path / "finetune.yaml"
    config.write_text(yaml.dump(classification_values | {"init": str(exported)}))
    short = ["--training.steps", "2", "--training.log_every", "1"]
    counters.clear()
    of_compiled = train(config, tmp_path / "c", "--compile", *short, command="finetune")
    assert not counters["graph_break"]
    of_eager = train(config, tmp_path / "e", *short, command="finetune")
    assert of_compiled == pytest.approx(of_eager, rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_compiling_goes_with_checkpointing_and_autocast(
    pretrain_config: Path, tmp_path: Path
) -> None:
    more = ["--training.precision", "bf16", "--execution.checkpointing", '["full","attention"]']
    # What is computed again in the backward, beside autocast's cache, may take graphs of its own.
    compiled_training(pretrain_config, tmp_path, *STEPS, *more, tolerance=5e-3, occasions=4)
