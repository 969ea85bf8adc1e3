import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from simmim.engine.folder_lock import locked_folder
from simmim.engine.run import FREE_TO_CHANGE, RunFolder
from simmim.recipe import RecipeError, load, parse, to_values, to_yaml
from simmim.tasks.pretrain.recipe import PretrainRecipe

VALUES: dict[str, Any] = {
    "task": "pretrain",
    "encoder": {"variant": "tiny", "window_size": 6},
    "data": {"shards": "shards", "image_size": 192},
    "training": {"batch_size": 64, "steps": 10, "optimizer": {"lr": 1e-3}},
}


def recipe_with(**changes: Any) -> PretrainRecipe:
    values = json.loads(json.dumps(VALUES))
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    return parse(PretrainRecipe, values, "test")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that was begun."""
    run = RunFolder(path=tmp_path / "runs" / "one")
    run.check(recipe_with(), resume=False)
    run.begin(recipe_with(), step=0)
    return run


def test_run_folder_paths(tmp_path: Path) -> None:
    run = RunFolder(path=tmp_path)
    names = [run.recipe, run.metrics, run.checkpoints, run.reconstructions, run.encoder]
    assert [path.name for path in names] == [
        "recipe.yaml",
        "metrics.jsonl",
        "checkpoints",
        "reconstructions",
        "encoder",
    ]
    assert {path.parent for path in names} == {tmp_path}


def test_the_saved_recipe_is_resolved_and_can_be_run_again(run: RunFolder) -> None:
    assert load(PretrainRecipe, run.recipe) == recipe_with()
    assert yaml.safe_load(run.recipe.read_text()) == to_values(recipe_with())


def test_checking_writes_nothing(tmp_path: Path) -> None:
    run = RunFolder(path=tmp_path / "absent")
    run.check(recipe_with(), resume=False)
    run.check(recipe_with(), resume=True)
    assert not run.path.exists()


def test_a_new_run_needs_an_empty_folder(tmp_path: Path) -> None:
    RunFolder(path=tmp_path).check(recipe_with(), resume=False)
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=r"is not empty.*--resume auto"):
            RunFolder(path=path).check(recipe_with(), resume=False)


def test_a_run_resumes_with_its_own_recipe(run: RunFolder) -> None:
    run.check(recipe_with(), resume=True)
    run.check(load(PretrainRecipe, run.recipe), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__optimizer__lr": 2e-3}, "training.optimizer.lr: 0.001 → 0.002"),
        ({"training__steps": 11}, "training.steps: 10 → 11"),
        ({"training__seed": 1}, "training.seed: 0 → 1"),
        ({"training__precision": "bf16"}, "training.precision: fp32 → bf16"),
        ({"encoder__drop_path": 0.1}, "encoder.drop_path: 0.0 → 0.1"),
        ({"mask__ratio": 0.5}, "mask.ratio: 0.6 → 0.5"),
        ({"data__slots": 32}, "data.slots: null → 32"),
    ],
)
def test_a_change_of_the_weights_is_refused_unless_allowed(
    run: RunFolder, changes: dict[str, Any], message: str
) -> None:
    changed = recipe_with(**changes)
    with pytest.raises(ValueError, match="differs") as caught:
        run.check(changed, resume=True)
    assert f"\n  {message}\n" in str(caught.value)
    run.check(changed, resume=True, allow_changes=True)


def test_a_checkpoint_of_another_run_is_compared_with_its_own_recipe(
    run: RunFolder, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "step-00000004"
    checkpoint.mkdir()
    (checkpoint / "recipe.yaml").write_text(to_yaml(recipe_with(training__seed=1)))
    with pytest.raises(ValueError, match=r"training\.seed: 1 → 0"):
        run.check(recipe_with(), resume=True, checkpoint=checkpoint)
    again = {"resume": True, "checkpoint": checkpoint, "allow_changes": True}
    changed = recipe_with(training__log_every=3)
    assert run.check(changed, **again).keys() == {"training.seed", "training.log_every"}


def test_keys_that_do_not_affect_weights_may_change(run: RunFolder) -> None:
    changed = recipe_with(
        data__shards="moved",
        data__workers=7,
        data__remote="ranges",
        data__cache_dir="elsewhere",
        data__cache_bytes=2**30,
        data__attempts=3,
        training__accumulation=2,
        training__log_every=3,
        training__checkpoint_every=4,
        training__keep_last=5,
        training__keep_every=50,
        training__validate_every=6,
        training__look_every=7,
        execution__checkpointing="full",
        execution__compile=True,
    )
    run.check(changed, resume=True)


def test_free_keys_exist_in_the_recipe() -> None:
    resolved = to_values(recipe_with(data__stream={"tars": "tars", "samples": 8}))
    for dotted in FREE_TO_CHANGE:
        inner = resolved
        for key in dotted.split("."):
            assert key in inner, dotted
            inner = inner[key]


def test_a_saved_recipe_edited_by_hand_is_read_as_recipes_are(run: RunFolder) -> None:
    text = run.recipe.read_text()
    assert "lr: 0.001" in text
    run.recipe.write_text(text.replace("lr: 0.001", "lr: 1e-3"))
    run.check(recipe_with(), resume=True)


@pytest.mark.parametrize("text", ["", "[1", "- 1"])
def test_a_broken_saved_recipe_is_named(run: RunFolder, text: str) -> None:
    run.recipe.write_text(text)
    with pytest.raises(RecipeError) as caught:
        run.check(recipe_with(), resume=True)
    assert str(run.recipe) in str(caught.value)


def test_metrics_read_as_they_were_logged(run: RunFolder) -> None:
    assert run.read_metrics() == []
    logged: list[dict[str, float | int | str]] = [
        {"step": 1, "loss": 0.1 + 0.2, "lr": 5e-7},
        {"step": 1, "validation_loss": 1 / 3},
        {"step": 2, "loss": 1e-30},
    ]
    for line in logged:
        run.log(line)
    assert run.read_metrics() == logged
    assert len(run.metrics.read_text().splitlines()) == 3


def test_resuming_drops_metrics_of_later_steps(run: RunFolder) -> None:
    for step in range(1, 9):
        run.log({"step": step, "loss": 1.0 / step})
        folder = run.checkpoints / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "complete").touch()
    before = run.read_metrics()
    run.begin(recipe_with(), step=5)
    assert run.read_metrics() == before[:5]
    assert sorted(path.name[-1] for path in run.checkpoints.iterdir()) == list("12345")
    run.begin(recipe_with(), step=0)
    assert run.read_metrics() == []


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_a_kill_cut_short_is_dropped(run: RunFolder, cut: int) -> None:
    run.log({"step": 1, "loss": 0.5})
    whole = run.metrics.read_bytes()
    run.log({"step": 2, "loss": 0.25})
    run.metrics.write_bytes(run.metrics.read_bytes()[:-cut])
    assert run.read_metrics() == [{"step": 1, "loss": 0.5}]
    run.begin(recipe_with(), step=2)
    assert run.metrics.read_bytes() == whole
    run.log({"step": 3, "loss": 0.125})
    assert [line["step"] for line in run.read_metrics()] == [1, 3]


def test_begin_removes_partial_files(run: RunFolder) -> None:
    run.log({"step": 1})
    run.begin(recipe_with(training__log_every=3), step=1)
    assert {path.name for path in run.path.iterdir()} == {"recipe.yaml", "metrics.jsonl"}
    assert load(PretrainRecipe, run.recipe).training.log_every == 3


def test_leftovers_of_killed_processes_are_removed(run: RunFolder) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    run.reconstructions.mkdir()
    left = [
        run.path / f".recipe.yaml.partial-{process.pid}",
        run.path / f".encoder.partial-{process.pid}" / "model.safetensors",
        run.reconstructions / f".step-00000004.png.partial-{process.pid}",
    ]
    kept = run.path / f".report.html.partial-{os.getppid()}"
    for path in (*left, kept):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    run.begin(recipe_with(), step=4)
    assert not any(path.exists() for path in (*left, left[1].parent))
    assert kept.exists()


def test_a_run_has_one_writer(tmp_path: Path) -> None:
    run = RunFolder(path=tmp_path / "run")
    hold = (
        "import sys, time; from pathlib import Path; from simmim.engine.run import RunFolder;"
        "held = RunFolder(path=Path(sys.argv[1])).locked(); held.__enter__();"
        "print('locked', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(run.path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another process is writing"), run.locked(timeout=0.2):
            pass
    finally:
        process.kill()
        process.communicate(timeout=30)
    with run.locked(timeout=5):  # a kill gives it free
        assert run.path.is_dir()


def test_the_lock_of_a_run_ends_with_it(tmp_path: Path) -> None:
    """As in a notebook, whose process goes on."""
    run = RunFolder(path=tmp_path / "run")
    lock = (
        "import sys; from pathlib import Path; from simmim.engine.run import RunFolder;"
        "RunFolder(path=Path(sys.argv[1])).locked(timeout=0.1).__enter__()"
    )
    command = [sys.executable, "-c", lock, str(run.path)]
    files = len(list(Path("/dev/fd").iterdir()))
    with run.locked():
        with pytest.raises(ValueError, match="another run in this process is writing"):
            run.locked().__enter__()
        assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    with pytest.raises(KeyError), run.locked():
        raise KeyError
    assert subprocess.run(command, check=False).returncode == 0
    assert len(list(Path("/dev/fd").iterdir())) == files


def test_a_refused_run_leaves_nothing_that_was_not_there(tmp_path: Path) -> None:
    deep, there, used = tmp_path / "a" / "b", tmp_path / "there", tmp_path / "used"
    there.mkdir()
    for path in (deep, there):
        with pytest.raises(KeyError), locked_folder(path):
            raise KeyError
    with locked_folder(used):
        (used / "recipe.yaml").touch()
    assert not deep.parent.exists()
    assert list(there.iterdir()) == []
    assert {path.name for path in used.iterdir()} == {".lock", "recipe.yaml"}


def test_a_folder_that_is_removed_while_another_waits_has_one_writer(tmp_path: Path) -> None:
    """Processes that write nothing create and remove the folder; each is alone in it."""
    program = (
        "import os, sys; from pathlib import Path;"
        "from simmim.engine.folder_lock import locked_folder\n"
        "for _ in range(40):\n"
        "    with locked_folder(Path(sys.argv[1]) / 'run', timeout=60):\n"
        "        os.mkdir(sys.argv[1] + '/alone'); os.rmdir(sys.argv[1] + '/alone')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
