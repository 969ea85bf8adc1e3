import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from simmim.engine.checkpoint.directory import complete_checkpoints, load_state
from simmim.engine.checkpoint.resume import read_model
from simmim.engine.devices import build_accelerator
from simmim.engine.distributed.watchdog import Watchdog
from simmim.engine.loop import TrainingResult, train
from simmim.engine.monitor.anomalies import DivergedError
from simmim.engine.run import RunFolder
from simmim.engine.settings import OptimizerSettings, TrainingSettings
from simmim.recipe import parse
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage


def run_training(
    values: dict[str, Any],
    folder: Path,
    resume: str | None = None,
    init_from: Path | None = None,
    accelerator: Accelerator | None = None,
    **training: Any,
) -> TrainingResult:
    values = values | {"training": values["training"] | training}
    stage = PretrainStage(parse(PretrainRecipe, values, "test"))
    accelerator = accelerator or build_accelerator("fp32")
    return train(stage, RunFolder(path=folder), accelerator, resume, init_from=init_from)


def in_half() -> Accelerator:
    """Return an accelerator that computes in fp16 on the CPU, which accelerate does on GPUs alone.

    Its scale is too large at first, and is raised again after every second good step.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = build_accelerator("bf16")
    accelerator.state._mixed_precision = "fp16"
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
    return accelerator


def losses(folder: Path) -> dict[int, float]:
    lines = RunFolder(path=folder).read_metrics()
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def rates(folder: Path) -> dict[int, float]:
    lines = RunFolder(path=folder).read_metrics()
    return {line["step"]: line["lr"] for line in lines if "lr" in line}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_model(complete_checkpoints(folder / "checkpoints")[-1])


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_learns_and_fills_its_run_folder(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    result = run_training(
        pretrain_values,
        tmp_path,
        steps=60,
        validate_every=60,
        look_every=60,
        optimizer={"lr": 4e-3},
    )
    assert result.step == 60
    assert not result.stopped
    logged = losses(tmp_path)
    assert list(logged) == list(range(2, 61, 2))
    assert logged[60] < 0.9 * logged[2]
    assert result.figures["validation_loss"] < result.figures["mean_color_loss"]
    assert (tmp_path / "recipe.yaml").is_file()
    assert (tmp_path / "reconstructions" / "step-00000060.png").is_file()
    assert (tmp_path / "encoder" / "model.safetensors").is_file()
    steps = [path.name for path in complete_checkpoints(tmp_path / "checkpoints")]
    assert steps == ["step-00000052", "step-00000056", "step-00000060"]


def test_activities_are_reported_to_the_watchdog(
    pretrain_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[tuple[int, str]] = []
    monkeypatch.setattr(Watchdog, "at", lambda _, step, doing: noted.append((step, doing)))
    run_training(pretrain_values, tmp_path, steps=2, validate_every=1, look_every=2)
    found = [(step, doing.split()[0]) for step, doing in noted]
    step = ["computing", "checking", "validating"]
    assert [doing for at, doing in found if at == 1 and doing != "waiting"][: len(step)] == step
    last = [doing for at, doing in found if at == 2]
    assert last[last.index("validating") :] == [
        "validating",
        "drawing",
        "agreeing",
        "writing",
        "exporting",
    ]


def test_two_runs_are_equal_bit_for_bit(pretrain_values: dict[str, Any], tmp_path: Path) -> None:
    run_training(pretrain_values, tmp_path / "one")
    run_training(pretrain_values, tmp_path / "two")
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert_same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("killed_at", [5, 7, 10])
def test_resume_equals_the_uninterrupted_run(
    pretrain_values: dict[str, Any],
    tmp_path: Path,
    killed_at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_training(pretrain_values, whole)

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PretrainStage, "visualize", die)
        with pytest.raises(KeyboardInterrupt):
            run_training(pretrain_values, broken, look_every=killed_at)
    result = run_training(pretrain_values, broken, resume="auto")
    assert result.step == 12
    assert losses(broken) == losses(whole)
    assert_same_weights(whole, broken)


def test_fp16_skips_overflows_and_resumes_with_its_scale(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    often = {"log_every": 5, "checkpoint_every": 1, "keep_last": 12}
    run_training(pretrain_values, whole, accelerator=in_half(), **often)
    checkpoints = complete_checkpoints(whole / "checkpoints")
    states = [load_state(path) for path in checkpoints]
    scales = [state.scaler["scale"] for state in states if state.scaler]
    assert scales[0] < 2.0**20  # the first step was left out
    assert any(after > before for before, after in pairwise(scales))
    start = str(checkpoints[6])
    run_training(pretrain_values, broken, resume=start, accelerator=in_half(), **often)
    assert losses(broken) == {step: loss for step, loss in losses(whole).items() if step > 5}
    assert_same_weights(whole, broken)


def test_resume_from_a_named_checkpoint(pretrain_values: dict[str, Any], tmp_path: Path) -> None:
    run_training(pretrain_values, tmp_path)
    before = losses(tmp_path)
    run_training(pretrain_values, tmp_path, resume=str(tmp_path / "checkpoints/step-00000004"))
    assert losses(tmp_path) == before


def test_resume_auto_starts_a_new_run_if_nothing_was_saved(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    assert run_training(pretrain_values, tmp_path, resume="auto").step == 12


def test_resume_refuses_another_batch_size(pretrain_values: dict[str, Any], tmp_path: Path) -> None:
    run_training(pretrain_values, tmp_path)
    with pytest.raises(ValueError, match="batch size 8"):
        run_training(pretrain_values, tmp_path, resume="auto", batch_size=16)


def test_resume_refuses_a_state_of_another_seed(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    run_training(pretrain_values, tmp_path, steps=4)
    last = tmp_path / "checkpoints" / "step-00000004"
    state = json.loads((last / "state.json").read_text()) | {"seed": 7, "run": ""}
    (last / "state.json").write_text(json.dumps(state))
    (last / "complete").write_bytes(b"")  # as earlier versions marked it, without digests
    with pytest.raises(ValueError, match="seed 7, the recipe has 0"):
        run_training(pretrain_values, tmp_path, resume="auto", steps=4)


def test_auto_falls_back_to_the_checkpoint_before_a_damaged_one(
    pretrain_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_training(pretrain_values, whole, steps=6, checkpoint_every=2)
    shutil.copytree(whole, run)
    last = run / "checkpoints" / "step-00000006"
    file = last / "model-00000-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=file.name):
        run_training(pretrain_values, run, steps=6, checkpoint_every=2, resume=str(last))
    capsys.readouterr()
    run_training(pretrain_values, run, steps=6, checkpoint_every=2, resume="auto")
    said = capsys.readouterr().err
    assert str(file) in said
    assert str(run / "checkpoints" / "step-00000004") in said
    assert_same_weights(run, whole)
    assert (run / "checkpoints" / "rejected-step-00000006" / file.name).read_bytes() == data


def test_another_batch_size_resumes_at_the_same_image(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    run_training(pretrain_values, tmp_path, steps=None, epochs=1.0)
    stage = PretrainStage(parse(PretrainRecipe, pretrain_values, "test"))
    assert stage.order.samples_per_epoch == 84
    before = complete_checkpoints(tmp_path / "checkpoints")[0]
    assert load_state(before).cursor == 32
    values = pretrain_values | {
        "training": pretrain_values["training"] | {"steps": None, "epochs": 1.0, "batch_size": 4}
    }
    stage = PretrainStage(parse(PretrainRecipe, values, "test"))
    run, accelerator = RunFolder(path=tmp_path), build_accelerator("fp32")
    result = train(stage, run, accelerator, str(before), allow_changes=True)
    assert result.step == 4 + (84 - 32) // 4
    *_, later, last = complete_checkpoints(run.checkpoints)
    assert load_state(last).cursor == 84
    stage = PretrainStage(parse(PretrainRecipe, values, "test"))
    assert train(stage, run, build_accelerator("fp32"), str(later)).step == result.step


def test_a_run_starts_from_the_weights_of_another(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_training(pretrain_values, first, steps=4)
    checkpoint = complete_checkpoints(first / "checkpoints")[-1]
    still = {"steps": 1, "optimizer": {"lr": 1e-30, "weight_decay": 0.0}}
    for number, path in enumerate([first, checkpoint, first / "encoder"]):
        run = second / str(number)
        run_training(pretrain_values, run, init_from=path, **still)
        state = load_state(complete_checkpoints(run / "checkpoints")[-1])
        assert (state.step, state.cursor) == (1, 8)
        began, ended = weights(run), weights(first)
        same = {name for name in ended if torch.equal(began[name], ended[name])}
        encoder = {name for name in ended if name.startswith("model.encoder.")}
        assert same >= (encoder if path.name == "encoder" else set(ended))
    with pytest.raises(ValueError, match="holds no weights to start from"):
        run_training(pretrain_values, second / "none", init_from=tmp_path / "absent")
    pretrain_values["encoder"]["embed_dim"] = 8
    with pytest.raises(ValueError, match="does not fit"):
        run_training(pretrain_values, second / "other", init_from=first)


def test_keep_every_keeps_checkpoints(pretrain_values: dict[str, Any], tmp_path: Path) -> None:
    training = {"checkpoint_every": 1, "keep_last": 2, "keep_every": 5, "look_every": 100}
    run_training(pretrain_values, tmp_path, validate_every=100, **training)
    found = [path.name[-2:] for path in complete_checkpoints(tmp_path / "checkpoints")]
    assert found == ["05", "10", "11", "12"]


def test_fp16_needs_a_gpu() -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        build_accelerator("fp16")


def test_resume_refuses_another_optimizer(pretrain_values: dict[str, Any], tmp_path: Path) -> None:
    run_training(pretrain_values, tmp_path, steps=1)
    file = tmp_path / "checkpoints" / "step-00000001" / "recipe.yaml"
    file.write_text(file.read_text().replace("name: adamw\n", "name: adamw_8bit\n"))
    # As of a version that recorded neither digests nor the run.
    (file.parent / "complete").write_text("")
    state = json.loads((file.parent / "state.json").read_text())
    (file.parent / "state.json").write_text(json.dumps(state | {"run": ""}))
    with pytest.raises(ValueError, match=r"adamw_8bit.*adamw"):
        run_training(pretrain_values, tmp_path, resume="auto", steps=1)


def test_resume_refuses_a_checkpoint_after_the_last_step(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    run_training(pretrain_values, tmp_path)
    recipe = (tmp_path / "recipe.yaml").read_text()
    with pytest.raises(ValueError, match=r"step 12 .*step 8.*training\.steps"):
        run_training(pretrain_values, tmp_path, resume="auto", steps=8)
    assert (tmp_path / "recipe.yaml").read_text() == recipe


def test_resume_refuses_other_shards_in_the_same_place(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    run_training(pretrain_values, tmp_path)
    pretrain_values["data"]["validation_shards"] = 2
    with pytest.raises(ValueError, match="other images"):
        run_training(pretrain_values, tmp_path, resume="auto")


def test_accumulation_changes_nothing_but_rounding(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    run_training(pretrain_values, tmp_path / "one")
    run_training(pretrain_values, tmp_path / "four", accumulation=4)
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert one.keys() == four.keys()
    assert rates(tmp_path / "one") == rates(tmp_path / "four")
    assert all(abs(one[step] - four[step]) < 1e-5 * one[step] for step in one)


def test_workers_change_nothing(pretrain_values: dict[str, Any], tmp_path: Path) -> None:
    run_training(pretrain_values, tmp_path / "none")
    pretrain_values["data"]["workers"] = 2
    run_training(pretrain_values, tmp_path / "two")
    assert losses(tmp_path / "none") == losses(tmp_path / "two")


def test_bfloat16_trains(pretrain_values: dict[str, Any], tmp_path: Path) -> None:
    values = pretrain_values
    values["training"]["precision"] = "bf16"
    stage = PretrainStage(parse(PretrainRecipe, values, "test"))
    train(stage, RunFolder(path=tmp_path), build_accelerator("bf16"), None)
    logged = losses(tmp_path)
    assert logged[12] < logged[2]
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path).values())


def test_diverged_training_ends_and_saves_no_nonfinite_weights(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(DivergedError, match="Lower"):
        run_training(pretrain_values, tmp_path, clip_norm=None, optimizer={"lr": 1e30}, steps=40)
    for path in complete_checkpoints(tmp_path / "checkpoints"):
        tensors = read_model(path)
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_metrics_of_repeated_steps_are_dropped(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    run_training(pretrain_values, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 99, "loss": 1.0}) + '\n{"step": 10')
    run_training(pretrain_values, tmp_path, resume="auto")
    assert max(losses(tmp_path)) == 12


def test_invalid_settings_are_refused() -> None:
    optimizer = OptimizerSettings(lr=1e-3)
    with pytest.raises(ValueError, match="either epochs or steps"):
        TrainingSettings(batch_size=8, optimizer=optimizer)
    with pytest.raises(ValueError, match="log_every is 0"):
        TrainingSettings(batch_size=8, steps=1, log_every=0, optimizer=optimizer)
    settings = TrainingSettings(batch_size=8, epochs=2.5, optimizer=optimizer)
    assert settings.total_steps(100) == 31
