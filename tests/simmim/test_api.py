"""The functions of the package do what the commands do."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import simmim
from simmim.api import Run
from simmim.recipe import RecipeError, parse
from simmim.tasks.pretrain.recipe import PretrainRecipe
from swinv2 import SwinV2, load_encoder
from tests.simmim.method.toy_encoder import ToyEncoder

PUBLIC = ["SimMIM", "__version__", "evaluate", "finetune", "load_run", "pretrain", "random_mask"]


def test_the_public_names_are_these() -> None:
    assert dir(simmim) == PUBLIC
    for name in PUBLIC:
        assert getattr(simmim, name) is not None
    assert simmim.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="pretrian"):
        simmim.pretrian  # type: ignore[attr-defined] # noqa: B018


def test_an_encoder_is_pretrained_fine_tuned_and_evaluated(
    pretrain_values: dict[str, Any], classification_values: dict[str, Any], tmp_path: Path
) -> None:
    given = yaml.safe_dump(pretrain_values)
    pretraining = simmim.pretrain(
        pretrain_values, tmp_path / "pretrain", overrides={"training.steps": 3}
    )
    assert yaml.safe_dump(pretrain_values) == given
    assert not pretraining.stopped
    assert pretraining.metrics[-1]["step"] == 3
    assert pretraining.recipe.training.steps == 3
    assert isinstance(pretraining.load_encoder(), SwinV2)
    assert pretraining.report.is_file()

    classification_values["init"] = str(pretraining.folder)
    tuned = simmim.finetune(
        classification_values, tmp_path / "tuned", overrides={"training.steps": 4}
    )
    found = simmim.evaluate(tuned, best=False)
    assert found.step == 4
    assert found.figures["top1"] == tuned.metrics[-1]["top1"]
    again = simmim.load_run(tmp_path / "tuned")
    assert again == Run(folder=tuned.folder)
    assert [path.name for path in again.checkpoints] == ["step-00000004"]
    expected = load_encoder(again.encoder_directory).state_dict()
    for name, tensor in again.load_encoder().state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_a_recipe_is_a_file_a_mapping_or_an_object(
    pretrain_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pretrain_values["training"] |= {"steps": 2, "validate_every": 2}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(pretrain_values))
    recipe = parse(PretrainRecipe, pretrain_values, "test")
    runs = [
        simmim.pretrain(str(file)),
        simmim.pretrain(file, "second"),
        simmim.pretrain(pretrain_values, "third"),
        simmim.pretrain(recipe, "fourth"),
    ]
    assert runs[0].folder == Path("runs/small")
    losses = [[line["loss"] for line in run.metrics if "loss" in line] for run in runs]
    assert losses == [losses[0]] * 4
    resumed = simmim.pretrain(file, "second", resume="auto")
    assert resumed.metrics[-1]["step"] == 2


def test_an_override_of_epochs_replaces_steps(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    run = simmim.pretrain(pretrain_values, tmp_path / "run", overrides={"training.epochs": 1})
    assert (run.recipe.training.epochs, run.recipe.training.steps) == (1, None)


def test_mistakes_are_named(pretrain_values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"(?s)mask\.ratoi: .*did you mean|mask\.ratoi"):
        simmim.pretrain(pretrain_values, tmp_path / "run", overrides={"mask.ratoi": 0.5})
    with pytest.raises(ValueError, match="give the run folder"):
        simmim.pretrain(pretrain_values)
    with pytest.raises(RecipeError, match="recipe is int"):
        simmim.pretrain(3, tmp_path / "run")
    with pytest.raises(ValueError, match=r"call simmim\.pretrain for it"):
        simmim.finetune(pretrain_values, tmp_path / "run")
    with pytest.raises(ValueError, match="is not a run folder"):
        simmim.load_run(tmp_path)
    assert not (tmp_path / "run").exists()


def test_values_of_numpy_and_paths_are_those_of_a_recipe(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    values = pretrain_values
    values["data"] |= {"shards": Path(values["data"]["shards"])}
    values["training"] |= {"steps": np.int64(1), "optimizer": {"lr": np.float32(0.5)}}
    values["encoder"] |= {"depths": np.array([1, 1]), "num_heads": (np.int8(1), 2)}
    size = {"data.image_size": np.int64(values["data"]["image_size"])}
    run = simmim.pretrain(values, tmp_path / "run", overrides=size)
    assert run.recipe.training.optimizer.lr == 0.5
    assert run.recipe.encoder.depths == (1, 1)
    found = simmim.evaluate(run, overrides={"data.workers": np.int64(0)})
    assert found.step == 1
    again = simmim.pretrain(values, tmp_path / "again", init_from=run, overrides=size)
    assert (again.folder / "encoder").is_dir()


def test_arguments_of_other_types_are_named(
    pretrain_values: dict[str, Any], classification_values: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="overrides is a list: give a mapping by dotted key"):
        simmim.pretrain(pretrain_values, tmp_path / "run", overrides=["--mask.ratio", "0.5"])  # type: ignore[arg-type]
    del classification_values["task"]
    with pytest.raises(ValueError, match=r"\Athe recipe: task is missing; choose one of pretrain"):
        simmim.finetune(classification_values, tmp_path / "run")
    encoder: Any = ToyEncoder()
    with pytest.raises(TypeError, match="encoder is a ToyEncoder: give a function that builds one"):
        simmim.pretrain(pretrain_values, tmp_path / "run", encoder=encoder)


SCRIPT = """
import sys
import simmim

if __name__ == "__main__":
    recipe, folder = sys.argv[1:]
    for name in ("first", "second"):
        run = simmim.pretrain(recipe, f"{folder}/{name}")
        assert {line.get("processes", 2) for line in run.metrics} == {2}
"""


def test_errors_name_arguments_of_functions(
    pretrain_values: dict[str, Any], tmp_path: Path
) -> None:
    def refused(words: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=re.escape(words)) as caught:
            simmim.pretrain(pretrain_values, tmp_path, **options)
        assert "--" not in str(caught.value)

    pretrain_values["training"]["steps"] = 1
    simmim.pretrain(pretrain_values, tmp_path)
    refused('Continue that run with resume="auto", or choose another with folder=PATH.')
    refused("allow_recipe_changes=True", resume="auto", overrides={"mask.ratio": 0.5})
    with pytest.raises(ValueError, match=r"data\.validation") as caught:
        simmim.evaluate(tmp_path, overrides={"data.validation_shards": 0})
    assert "--" not in str(caught.value)
    with pytest.raises(ValueError, match="config=RECIPE measures"):
        simmim.evaluate(tmp_path / "encoder")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_script_trains_twice_on_two_processes(
    launcher: str, pretrain_config: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    options = {
        "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2"],
        "accelerate": ["--cpu", "--num_processes", "2", "--num_machines", "1"],
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "simmim.launch", *options[launcher]),
            *(str(script), str(pretrain_config), str(tmp_path)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (simmim.load_run(tmp_path / name).metrics for name in ("first", "second"))
    losses = [[line["loss"] for line in lines if "processes" in line] for lines in (first, second)]
    assert losses[0] == losses[1] != []
