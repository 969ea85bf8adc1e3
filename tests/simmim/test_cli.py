"""Bad input: one clear message, exit code 2, and nothing left behind."""

import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from simmim.cli import main
from simmim.engine.checkpoint.directory import complete_checkpoints
from simmim.engine.exit_codes import LOST, STOPPED
from simmim.engine.run import RunFolder
from simmim.environment import process_environment
from simmim.recipe import load
from simmim.tasks.all_tasks import fine_tuning_tasks
from simmim.tasks.pretrain.recipe import PretrainRecipe
from swinv2 import SwinV2, SwinV2Config, read_encoder_config, save_encoder
from swinv2.bridges.reference import to_reference


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the message that a command is refused with."""
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_an_option_with_one_dash_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(["pretrain", "-config", "a.yaml"], capsys) == (
        "simmim pretrain: -config: options begin with two dashes.\n"
    )


def test_other_mistyped_options_are_suggested_before_a_missing_config(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for typed, meant in (("--hepl", "--help"), ("--resum", "--resume"), ("--foldr", "--folder")):
        message = refused(["pretrain", typed, "x"], capsys)
        assert message == f"simmim pretrain: {typed} is unknown: did you mean {meant}?\n"


@pytest.mark.parametrize("typed", [["--confg", "a.yaml"], ["--mask.cell", "5", "--conf=a.yaml"]])
def test_a_mistyped_config_is_suggested(
    typed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(["pretrain", *typed], capsys)
    assert message.endswith(" is unknown: did you mean --config?\n")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--mask.cell", "5"], "multiple of encoder.patch_size 2"),
        (["--mask.cell", "6"], "do not divide"),
        (["--mask.ratio", "1.5"], "above 0 and below 1"),
        (["--mask.ratio", "0.99"], "hides all"),
        (["--mask.strategy", "stripes"], "random"),
        (["--encoder.window_size", "0"], "window_size is 0"),
        (["--encoder.num_heads", "[3, 6]"], "embed_dim"),
        (["--encoder.in_channels", "2"], "encoder.in_channels is 2"),
        (["--data.image_size", "0"], "image"),
        (["--encoder.widow_size", "4"], "did you mean window_size?"),
        (["--training.batch_size", "6", "--data.slots", "4"], "data.slots"),
        (["--training.batch_size", "-8"], "batch_size is -8"),
        (["--training.accumulation", "3"], "accumulation is 3"),
        (["--training.seed", "99999999999999999999"], "seed: 99999999999999999999"),
        (["--training.precision", "fp64"], "fp32"),
        (["--data.shards", "nowhere"], "nowhere does not exist"),
        (["--data.validation_shards", "8"], "validation_shards is 8"),
        (["--loss.name", "l3"], "l1"),
        (["--training.optimizer.lr", "fast"], "valid number"),
        (["--training.validate_every", "null"], "valid integer, got null"),
        (["--encoder.depths", "measured"], "should be a list, got 'measured'"),
        (["--data.mean", "[0.5]"], "data"),
        (["--training.steps"], "has no value"),
        (["loose"], "--key.key value"),
    ],
)
def test_pretrain_says_what_is_wrong(
    pretrain_config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    override: list[str],
    message: str,
) -> None:
    run = tmp_path / "run"
    text = refused(
        ["pretrain", "--config", str(pretrain_config), "--folder", str(run), *override], capsys
    )
    assert any(part in text for part in message.split("|")), text
    assert not run.exists()


def test_every_mistake_is_listed(
    pretrain_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain_values["encoder"]["window_size"] = "big"
    pretrain_values["data"]["colour"] = 3
    del pretrain_values["training"]["optimizer"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(pretrain_values))
    text = refused(["pretrain", "--config", str(path)], capsys)
    assert all(part in text for part in ("3 mistakes", "window_size", "colour", "optimizer"))


def test_missing_and_broken_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be read" in refused(["pretrain", "--config", str(tmp_path / "no.yaml")], capsys)
    path = tmp_path / "recipe.yaml"
    path.write_text("a: [1, 2")
    assert "not valid YAML" in refused(["pretrain", "--config", str(path)], capsys)


def test_a_run_folder_is_never_mixed_up(
    pretrain_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["pretrain", "--config", str(pretrain_config), "--folder", str(run)]
    short = ["--training.steps", "4"]
    assert main([*command, *short]) == 0
    output = capsys.readouterr().out
    assert f"Encoder  {run / 'encoder'}" in output
    assert "--resume auto" in refused([*command, *short], capsys)
    longer = [*command, "--resume", "auto", "--training.steps", "8"]
    assert "training.steps: 4 → 8" in refused(longer, capsys)
    assert main([*longer, "--allow-recipe-changes"]) == 0
    assert complete_checkpoints(run / "checkpoints")[-1].name == "step-00000008"
    # More workers change nothing, so they need no leave.
    more = ["--resume", "auto", "--training.steps", "8", "--data.workers", "1"]
    assert main([*command, *more]) == 0


def test_a_start_that_waited_for_another_does_not_wipe_its_run(
    pretrain_config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the check of an empty folder and its lock, another start trains there and ends."""
    run = tmp_path / "run"
    command = ["pretrain", "--config", str(pretrain_config), "--folder", str(run)]
    command += ["--training.steps", "4"]
    lock_now = RunFolder.locked

    def lock_after_another_run(folder: RunFolder) -> AbstractContextManager[None]:
        monkeypatch.setattr(RunFolder, "locked", lock_now)
        assert main([*command, *other]) == 0
        return lock_now(folder)

    for resume, message in (([], "is not empty"), (["--resume", "auto"], "training.seed: 1 → 0")):
        shutil.rmtree(run, ignore_errors=True)
        other = ["--training.seed", "1"]
        monkeypatch.setattr(RunFolder, "locked", lock_after_another_run)
        assert message in refused([*command, *resume], capsys)
        assert load(PretrainRecipe, run / "recipe.yaml").training.seed == 1
        assert RunFolder(path=run).read_metrics()[-1]["step"] == 4
        assert complete_checkpoints(run / "checkpoints")[-1].name == "step-00000004"
    shutil.rmtree(run)
    other = []
    monkeypatch.setattr(RunFolder, "locked", lock_after_another_run)
    assert main([*command, "--resume", "auto"]) == 0  # resumes what the other has trained


TIMES = {
    "images_per_second",
    "data_wait",
    "mfu",
    "eta_seconds",
    "device_memory_gib",
    "host_memory_gib",
}


@pytest.mark.parametrize("command", ["pretrain", pytest.param("finetune", marks=pytest.mark.slow)])
def test_metrics_of_a_resumed_run_equal_those_of_an_uninterrupted_one(
    command: str,
    pretrain_values: dict[str, Any],
    classification_values: dict[str, Any],
    tmp_path: Path,
) -> None:
    """All figures but times, through a log interval that a checkpoint divides."""
    values = pretrain_values if command == "pretrain" else classification_values
    own = {"steps": 12, "log_every": 3, "checkpoint_every": 4, "validate_every": 5}
    values["training"] |= own | {"ema_decay": 0.9}
    config, run = tmp_path / "recipe.yaml", RunFolder(path=tmp_path / "run")
    config.write_text(yaml.safe_dump(values))
    arguments = [command, "--config", str(config), "--folder", str(run.path), "--resume", "auto"]
    assert main(arguments) == 0
    logged = run.read_metrics()
    assert len(logged) > 6
    shutil.rmtree(run.checkpoints / "step-00000012")  # as if killed before it was written
    assert main(arguments) == 0
    assert [{key: line[key] for key in line.keys() - TIMES} for line in run.read_metrics()] == [
        {key: line[key] for key in line.keys() - TIMES} for line in logged
    ]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("Storage size calculation overflowed with sizes=[3221225472, 1073741824]"),
    ],
)
def test_memory_that_runs_out_ends_with_one_message(
    pretrain_config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("simmim.engine.loop.accumulate_gradients", fail)
    command = ["pretrain", "--config", str(pretrain_config), "--folder", str(tmp_path / "run")]
    assert main(command) == 76
    said = capsys.readouterr().err
    for part in ("memory ran out", "training.accumulation", "data.workers", "--resume auto"):
        assert part in said
    assert "Traceback" not in said


def test_control_characters_in_messages_are_escaped(
    pretrain_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\x1b[31m\r\x9b2J\u202eb"
    broken = tmp_path / f"{name}.yaml"
    broken.write_text('task: pretrain\ndata: {shards: [1, "\\e]0;title\\a", }\n')
    unknown = ["--data.shards", name, "--mask.ratio", "3"]
    for arguments in (
        ["pretrain", "--config", f"{tmp_path}/{name}"],
        ["pretrain", "--config", str(broken)],
        ["pretrain", "--config", str(pretrain_config), *unknown],
        ["pretrain", "--config", str(pretrain_config), "--data.shards", name],
        ["export", name, str(tmp_path / "out")],
        ["report", name],
    ):
        message = refused(arguments, capsys)
        assert not set("\x1b\r\x9b\x07\u202e") & set(message), ascii(message)
    assert "\x1b" not in refused(["report", "x", f"--{name}"], capsys)


def test_ranks_that_torchrun_starts_again_go_on(
    pretrain_config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    short = ["--training.steps", "2", "--training.checkpoint_every", "1"]
    command = ["pretrain", "--config", str(pretrain_config), *short, "--folder"]
    assert main([*command, str(first)]) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert "is not empty" in refused([*command, str(first)], capsys)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    process_environment.cache_clear()
    assert main([*command, str(first)]) == 0
    # A checkpoint that was named is where the run began, not where it is begun again.
    start, last = (first / "checkpoints" / f"step-{step:08d}" for step in (1, 2))
    written = (last / "complete").stat().st_mtime_ns
    assert main([*command, str(first), "--resume", str(start)]) == 0
    assert (last / "complete").stat().st_mtime_ns == written
    assert main([*command, str(third), "--resume", str(start)]) == 0
    assert [line["step"] for line in RunFolder(path=third).read_metrics()] == [2, 2]
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    process_environment.cache_clear()
    assert main([*command, str(second), "--init-from", str(first)]) == 0
    assert f"weights of {first}" in capsys.readouterr().err


def test_export_of_nothing(
    pretrain_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "does not exist" in refused(
        ["export", str(tmp_path / "none"), str(tmp_path / "out")], capsys
    )
    assert not (tmp_path / "out").exists()


def test_import_asks_for_what_a_checkpoint_does_not_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    encoder = SwinV2(SwinV2Config(image_size=32, window_size=4, **sizes))
    file, out = tmp_path / "bare.pth", tmp_path / "out"
    command = ["import", str(file), str(out), "--format", "reference"]
    assert "does not exist" in refused(command, capsys)
    torch.save({"model": to_reference(encoder)}, file)
    assert "give image_size (pixels) and window_size (tokens)" in refused(command, capsys)
    assert "architecture is for the timm format" in refused(
        [*command, "--architecture", "swinv2_a"], capsys
    )
    command += ["--image-size", "32", "--window-size", "4,4"]
    assert "pretrained_window_sizes" in refused(command, capsys)
    assert not out.exists()
    command += ["--pretrained-windows", "3,2", "--std", "0.5,0.5,0.5"]
    assert main(command) == 0
    assert "32x32 pixels, window 4x4" in capsys.readouterr().out
    description = read_encoder_config(out)
    assert description.config.pretrained_window_sizes == ((3, 3), (2, 2))
    assert description.std == (0.5, 0.5, 0.5)
    assert main([*command, "--mean", "0,0,0"]) == 0  # an earlier encoder is replaced
    assert "--window-size is 'a'; give a number" in refused(
        [*command, "--window-size", "a"], capsys
    )


def test_import_tells_the_format_and_says_which_weights_it_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    encoder = SwinV2(SwinV2Config(image_size=32, window_size=4, **sizes))
    file, out = tmp_path / "dino.pth", tmp_path / "out"
    tensors = {f"backbone.{name}": part for name, part in to_reference(encoder).items()}
    torch.save({"student": tensors, "teacher": tensors, "head": {"w": torch.ones(1)}}, file)
    command = ["import", str(file), str(out), "--image-size", "32", "--window-size", "4"]
    command += ["--pretrained-windows", "same"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert f"Imported {file} (reference) as {out}" in text
    assert "weights: averaged (teacher.backbone); --weights raw takes student.backbone" in text
    assert main([*command, "--key", "student"]) == 0
    assert "weights: raw (student.backbone)" in capsys.readouterr().out
    assert "several" not in refused([*command, "--key", "tutor"], capsys)
    torch.save({"a": {"weight": torch.ones(1)}}, file)
    assert "layout of no known library" in refused(command, capsys)


def test_a_folder_of_transformers_goes_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    encoder = SwinV2(SwinV2Config(image_size=32, window_size=4, **sizes))
    start, there, back = tmp_path / "start", tmp_path / "there", tmp_path / "back"
    save_encoder(encoder, start, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    assert main(["export", str(start), str(there), "--format", "transformers"]) == 0
    assert "largest difference of " in capsys.readouterr().out
    assert main(["import", str(there), str(back), "--format", "transformers"]) == 0
    assert "its features after loading: 0.0e+00" in capsys.readouterr().out
    ours, again = read_encoder_config(start), read_encoder_config(back)
    assert (again.config, again.mean, again.std) == (ours.config, ours.mean, ours.std)
    command = ["import", str(there), str(tmp_path / "no"), "--format", "timm"]
    assert "--format transformers" in refused(command, capsys)
    command[-1] = "transformers"
    assert "image_size is (64, 64)" in refused([*command, "--image-size", "64"], capsys)
    assert not (tmp_path / "no").exists()


def test_what_is_no_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Unknown option: --speed." in refused(["export", "a", "b", "--speed", "3"], capsys)


@pytest.mark.parametrize("command", ["finetune", "doctor"])
def test_help_names_the_option_of_trained_weights(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    description = capsys.readouterr().out.partition("options:")[0]
    assert "--init PATH names the encoder directory" in " ".join(description.split())


COMMANDS = (
    *("quickstart", "pretrain", "finetune", "evaluate", "probe", "labels", "export", "import"),
    *("report", "doctor", "bench", "bench memory", "bench gpu"),
)


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_help_fits_two_screens(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 100


def test_a_mistyped_command_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Unknown command pretrian. Did you mean pretrain?" in refused(["pretrian"], capsys)
    assert "Did you mean memory?" in refused(["bench", "memry"], capsys)


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    output = capsys.readouterr()
    assert not output.err
    for command in COMMANDS[:11]:
        assert f"  {command} " in output.out
    assert main(["--version"]) == 0


def test_a_mistyped_option_is_suggested(
    pretrain_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pretrain", "--config", str(pretrain_config)]
    assert "resum: unknown key; did you mean --resume?" in refused(
        [*command, "--resum", "auto"], capsys
    )
    assert "did you mean seed?" in refused([*command, "--training.sed", "1"], capsys)
    for key in ("--lr", "--training.lr"):
        assert "did you mean training.optimizer.lr?" in refused([*command, key, "1"], capsys)
    assert "--data.validation belongs behind RUN" in refused(
        ["evaluate", "--data.validation", "shards", "run"], capsys
    )
    assert "Did you mean --last?" in refused(["export", "a", "b", "--lats"], capsys)
    assert f"give --config {pretrain_config}." in refused(
        ["pretrain", str(pretrain_config)], capsys
    )
    assert "--last repeats an option, or is its opposite" in refused(
        ["evaluate", "run", "--best", "--last"], capsys
    )


def test_a_recipe_for_another_command_is_one_mistake(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipes = {
        name: Path(__file__).parents[2] / "jobs" / folder / "cifar10.yaml"
        for name, folder in (
            ("pretrain", "pretrain"),
            ("finetune", "finetune"),
            ("probe", "probe"),
        )
    }
    for command in recipes:
        for right, recipe in recipes.items():
            if right != command:
                message = refused([command, "--config", str(recipe)], capsys)
                assert f"for another command: simmim {right} --config {recipe}" in message
                assert message.count("\n") == 1


@pytest.mark.parametrize("mistake", [["--mask.ratio", "2"], ["--resume"]])
def test_the_first_rank_of_a_machine_names_a_mistake_for_all(
    pretrain_config: Path,
    mistake: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        process_environment.cache_clear()
        assert main(["pretrain", "--config", str(pretrain_config), *mistake]) == 2
        assert capsys.readouterr().err.count("simmim pretrain: ") == lines
    elsewhere = ["--data.shards", "absent", "--folder", str(pretrain_config.parent / "run")]
    assert main(["pretrain", "--config", str(pretrain_config), *elsewhere]) == 2
    assert "absent" in capsys.readouterr().err  # which one rank alone may find


def test_fields_of_recipes(pretrain_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fields(*arguments: str) -> str:
        assert main([*arguments]) == 0
        return capsys.readouterr().out

    everything = fields("pretrain", "--help-fields")
    assert "--training.optimizer.lr  number" in everything
    assert "--mask.ratio" in everything
    assert fields("pretrain", "--config", str(pretrain_config), "--help-fields") == everything
    section = fields("pretrain", "--help-fields", "training.schedule")
    assert "--training.schedule.warmup_steps  integer" in section
    assert "(default: 0)" in section
    assert "training.optimizer" not in section
    tasks = fields("finetune", "--help-fields", "training")
    assert all(f"Recipe of task {task}:" in tasks for task in fine_tuning_tasks())
    masks = fields("finetune", "--help-fields", "data.multi_label")
    assert "--data.multi_label.columns" in masks or "--data.multi_label." in masks
    assert "did you mean training?" in refused(["pretrain", "--help-fields", "trainin"], capsys)
    twice = refused(["pretrain", "--help-fields", "training", "mask"], capsys)
    assert "--help-fields takes one value, not 2: remove the others." in twice


def test_help_of_training_tells_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("pretrain", "finetune"):
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"{STOPPED}   stopped by SIGTERM, SIGINT or SIGUSR1" in text
        assert f"{LOST}   a process hung or was lost" in text
