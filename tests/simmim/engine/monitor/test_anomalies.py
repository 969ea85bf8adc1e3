"""Non-finite losses and gradients: the step is skipped and explained, a limited number of times."""

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator

from simmim.data.loader.batch import Batch
from simmim.engine.checkpoint.directory import OPTIMIZER, complete_checkpoints
from simmim.engine.checkpoint.shard_files import ShardFiles
from simmim.engine.devices import build_accelerator
from simmim.engine.loop import train, training_step
from simmim.engine.monitor.anomalies import Anomalies, DivergedError, propagate_nonfinite
from simmim.engine.run import RunFolder
from simmim.recipe import parse
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from tests.simmim.forked import FSDP2, finish

FAULTY = str(Path(__file__).parents[1] / "train_faulty.py")
faulty = runpy.run_path(FAULTY)["faulty"]


def recipe(values: dict[str, Any], **training: Any) -> PretrainRecipe:
    return parse(PretrainRecipe, values | {"training": values["training"] | training}, "test")


def run_faulty(fault: str, values: dict[str, Any], folder: Path, **training: Any) -> None:
    stage = faulty(fault)(recipe(values, **training))
    train(stage, RunFolder(path=folder), build_accelerator("fp32"), None)


def anomalies(folder: Path) -> list[dict[str, Any]]:
    lines = RunFolder(path=folder).anomalies.read_text().splitlines()
    return [json.loads(line) for line in lines]


def names_of(stage: PretrainStage, batch: Batch) -> list[str]:
    return [stage.training_shards.name(*place) for place in batch.addresses[:, 1:].tolist()]


def names_by_step(values: dict[str, Any]) -> list[list[str]]:
    """Return the samples of each step."""
    stage = PretrainStage(recipe(values))
    return [names_of(stage, batch) for batch in stage.batches(rank=0, world=1, start=0, end=96)]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3.0, 0.0, -1e38])
def test_a_nonfinite_loss_has_a_nonfinite_gradient(value: float) -> None:
    weight = torch.tensor(1.5, requires_grad=True)
    loss = 2.5 * weight
    spoilt = propagate_nonfinite(loss - loss.detach() + value)
    spoilt.backward()
    assert weight.grad is not None
    if math.isfinite(value):
        assert weight.grad == 2.5
        assert spoilt == loss - loss.detach() + value
    else:
        assert weight.grad.isnan()


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_skipped_step_changes_nothing(
    pretrain_values: dict[str, Any], kind: str, accumulation: int
) -> None:
    first, second = names_by_step(pretrain_values)[:2]
    (spoilt,) = set(first[-1:]) - set(second)
    stage = faulty(f"{kind}={spoilt}")(recipe(pretrain_values, accumulation=accumulation))
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.AdamW(stage.module.parameters(), lr=1e-3))
    batches = list(stage.batches(rank=0, world=1, start=0, end=16))
    before = {name: weight.clone() for name, weight in stage.module.state_dict().items()}

    def step(part: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        return training_step(
            accelerator,
            stage.module,
            optimizer,
            part,
            clip_norm=5.0,
            normalisers=stage.normalisers,
        )

    loss, norm = step(batches[:accumulation])
    assert loss.isnan()
    assert not norm.isfinite()
    assert all(torch.equal(before[name], new) for name, new in stage.module.state_dict().items())
    assert not optimizer.state_dict()["state"]
    assert all(weight.grad is None for weight in stage.module.parameters())
    loss, norm = step(batches[accumulation:])
    assert loss.isfinite()
    assert norm.isfinite()
    assert not all(
        torch.equal(before[name], new) for name, new in stage.module.state_dict().items()
    )


def test_training_continues_and_names_the_sample(
    pretrain_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = names_by_step(pretrain_values)
    spoilt = steps[3][2]
    at = [number for number, names in enumerate(steps, start=1) if spoilt in names]
    pretrain_values["data"]["workers"] = 1
    run_faulty(f"loss={spoilt}", pretrain_values, tmp_path, log_every=1)
    assert anomalies(tmp_path) == [
        {"step": number, "rank": 0, "what": "loss", "samples": [spoilt], "in_a_row": 1}
        for number in at
    ]
    lines = {line["step"]: line for line in RunFolder(path=tmp_path).read_metrics() if "lr" in line}
    assert {number: line["skipped"] for number, line in lines.items()} == {
        number: sum(skipped <= number for skipped in at) for number in lines
    }
    assert {number for number in lines if "loss" not in lines[number]} == set(at)
    assert all(math.isfinite(line["loss"]) for line in lines.values() if "loss" in line)
    assert f"step {at[0]} was skipped on all ranks: the loss of {spoilt}" in capsys.readouterr().err
    clean = tmp_path / "clean"
    stage = PretrainStage(recipe(pretrain_values, log_every=1))
    train(stage, RunFolder(path=clean), build_accelerator("fp32"), None)
    rates = {
        line["step"]: line["lr"] for line in RunFolder(path=clean).read_metrics() if "lr" in line
    }
    assert rates == {number: line["lr"] for number, line in lines.items()}


def test_a_step_settled_during_the_next_one_leaves_the_same_weights_averages_and_records(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    steps = names_by_step(pretrain_values)
    spoilt = f"loss={steps[0][0]},{steps[4][0]}"
    late = {"ema_decay": 0.9, "log_every": 50, "checkpoint_every": 50, "validate_every": 50}
    states = []
    for name, often in (("late", {}), ("at once", {"log_every": 1})):
        run_faulty(spoilt, pretrain_values, tmp_path / name, **(late | often))
        last = complete_checkpoints(tmp_path / name / "checkpoints")[-1]
        with ShardFiles(last, OPTIMIZER) as files:
            states.append({name: files.read(name) for name in files.shapes})
        lines = list(RunFolder(path=tmp_path / name).read_metrics())
        assert [line["skipped"] for line in lines if "skipped" in line][-1] == len(
            anomalies(tmp_path / name)
        )
    assert any(name.startswith("ema/") for name in states[0])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert anomalies(tmp_path / "late") == anomalies(tmp_path / "at once")


def test_the_mean_loss_excludes_skipped_steps(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    steps = names_by_step(pretrain_values)
    run_faulty(f"loss={steps[4][0]}", pretrain_values, tmp_path / "broken", steps=6, log_every=6)
    run_faulty("loss=", pretrain_values, tmp_path / "whole", steps=6, log_every=1)
    broken = RunFolder(path=tmp_path / "broken").read_metrics()
    lines = RunFolder(path=tmp_path / "whole").read_metrics()
    whole = {line["step"]: line["loss"] for line in lines if "loss" in line}
    (line,) = [line for line in broken if "loss" in line]
    assert line["skipped"] == 1
    # Up to the skipped step both are the same; what comes after it differs a little.
    assert line["loss"] == pytest.approx(sum(whole[step] for step in (1, 2, 3, 4, 6)) / 5, rel=0.02)


def test_a_gradient_alone_is_blamed_on_all_samples_of_the_step(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    steps = names_by_step(pretrain_values)
    run_faulty(f"gradient={steps[1][5]}", pretrain_values, tmp_path, steps=2)
    (found,) = anomalies(tmp_path)
    assert found["what"] == "gradient"
    assert found["samples"] == steps[1]


def test_too_many_in_a_row_end_training_and_resume_starts_before_them(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    steps = names_by_step(pretrain_values)
    spoilt = ",".join(names[0] for names in steps[4:7])  # steps 5 to 7
    settings = {"max_nonfinite": 3, "checkpoint_every": 1, "keep_last": 9}
    with pytest.raises(DivergedError, match=r"3 steps .*step 7") as raised:
        run_faulty(f"loss={spoilt}", pretrain_values, tmp_path, **settings)
    assert "Lower training.optimizer.lr" in str(raised.value)
    assert [line["in_a_row"] for line in anomalies(tmp_path)] == [1, 2, 3]
    saved = [path.name for path in complete_checkpoints(tmp_path / "checkpoints")]
    assert saved[-1] == "step-00000004"
    # With one more allowed, training finishes.
    stage = faulty(f"loss={spoilt}")(recipe(pretrain_values, **(settings | {"max_nonfinite": 4})))
    result = train(stage, RunFolder(path=tmp_path), build_accelerator("fp32"), "auto")
    assert result.step == 12
    assert "step-00000005" not in {
        path.name for path in complete_checkpoints(tmp_path / "checkpoints")
    }


def test_sharded_weights_are_gathered_anew_after_a_check(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    steps = names_by_step(pretrain_values)
    spoilt = f"loss={steps[3][2]},{steps[4][6]}"
    late = {"log_every": 50, "checkpoint_every": 50, "validate_every": 50, "look_every": 50}
    pretrain_values["training"] |= late | {"optimizer": {"lr": 5e-3}}
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(pretrain_values))
    command = ["pretrain", "--config", str(config), "--folder", str(tmp_path / "sharded")]
    finish([FAULTY, spoilt, *command], tmp_path / "log", ranks=2, environment=FSDP2)
    run_faulty(spoilt, pretrain_values, tmp_path / "whole")
    sharded, whole = (
        [line["validation_loss"] for line in run.read_metrics() if "validation_loss" in line]
        for run in (RunFolder(path=tmp_path / name) for name in ("sharded", "whole"))
    )
    assert sharded == pytest.approx(whole, rel=1e-4)


def test_corrupt_weights_are_distinguished_from_corrupt_samples(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    stage = PretrainStage(recipe(pretrain_values, max_nonfinite=2))
    with torch.no_grad():
        next(iter(stage.module.parameters())).view(-1)[0] = math.nan
    with pytest.raises(DivergedError, match=r"weights .*not finite"):
        train(stage, RunFolder(path=tmp_path), build_accelerator("fp32"), None)
    assert [line["what"] for line in anomalies(tmp_path)] == ["weights", "weights"]


def test_an_overflow_of_the_fp16_scaler_is_not_an_anomaly(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    accelerator = build_accelerator("fp32")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    stage = PretrainStage(recipe(pretrain_values))
    watch = Anomalies(accelerator, stage.training_shards, tmp_path / "anomalies.jsonl", limit=2)
    said: list[str] = []
    watch.check(1, math.inf, stage.module, [], said.append)
    assert not watch.in_a_row
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=0.5)  # as after many overflows
    watch.check(2, math.inf, stage.module, [], said.append)
    assert watch.in_a_row == 1
