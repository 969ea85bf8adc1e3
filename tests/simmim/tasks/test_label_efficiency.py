"""`simmim labels`: all runs by one command, none of them twice."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

import simmim.cli
from simmim.engine.run import RunFolder
from simmim.tasks.classification.classifier import save_head
from swinv2 import read_encoder_config


@pytest.mark.timeout(900)  # two trainings in processes of their own
def test_one_command_trains_compares_and_resumes(
    classification_values: dict[str, Any],
    encoder_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    classification_values["training"] |= {"steps": 2, "validate_every": 2}
    del classification_values["data"]["slots"]
    # Neither its encoder, nor its mean, nor the trained head is what both are to start with.
    classification_values["encoder"] |= {"embed_dim": 32, "num_heads": [2, 4], "patch_size": 4}
    head = nn.Linear(32, 3)
    save_head(head, encoder_directory / "classifier", ("circle", "square", "stripe"))
    config, folder = tmp_path / "small.yaml", tmp_path / "labels"
    config.write_text(yaml.safe_dump(classification_values))
    command = ["labels", "--config", str(config), "--init", str(encoder_directory)]
    command += ["--folder", str(folder), "--fractions", "0.5", "--seeds", "3"]
    assert simmim.cli.main(command) == 0
    assert "50 %" in capsys.readouterr().out
    (scores,) = [json.loads((folder / "labels.json").read_text())]
    assert {one["start"] for one in scores} == {"pretrained", "scratch"}
    recipes = {
        start: yaml.safe_load((folder / f"{start}-50-seed3" / "recipe.yaml").read_text())
        for start in ("pretrained", "scratch")
    }
    assert recipes["pretrained"]["init"] == str(encoder_directory)
    assert recipes["scratch"]["init"] == "scratch"
    assert recipes["pretrained"]["init_head"] is False
    start = {"init": "", "init_head": None}
    assert recipes["scratch"] | start == recipes["pretrained"] | start
    assert recipes["scratch"]["encoder"]["embed_dim"] == 16
    assert recipes["scratch"]["data"]["mean"] == [0.4, 0.5, 0.6]
    trained = [read_encoder_config(path).config for path in folder.glob("*/encoder")]
    assert trained[0] == trained[1]
    assert (
        recipes["scratch"]["data"]["fraction_seed"] == recipes["scratch"]["training"]["seed"] == 3
    )
    for one in scores:
        metrics = RunFolder(path=folder / f"{one['start']}-50-seed3").read_metrics()
        assert one["values"] == [line["top1"] for line in metrics if "top1" in line][-1:]
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/encoder/*")}
    assert simmim.cli.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/encoder/*")} == before
    assert "run 1 of" not in capsys.readouterr().err
    page = (folder / "labels.html").read_text()
    assert "50 %" in page
    assert "Both initialisations train the architecture" in page
    assert "was fine-tuned with labels" in page
    assert simmim.cli.main([*command, "--training.steps", "3"]) == 2
    assert "training.steps: 2 → 3" in capsys.readouterr().err


def test_mistakes_are_reported_before_the_first_run(
    classification_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(classification_values))
    command = ["labels", "--config", str(config), "--init", "x", "--folder", str(tmp_path / "f")]
    assert simmim.cli.main([*command, "--fractions", "0.5", "2"]) == 2
    assert "--fractions is 2; it must be above 0 and at most 1." in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


def test_a_folder_has_one_writer(
    classification_values: dict[str, Any],
    encoder_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, folder = tmp_path / "small.yaml", tmp_path / "labels"
    config.write_text(yaml.safe_dump(classification_values))

    def held(path: Path) -> None:
        raise ValueError(f"another process is writing into {path}")

    monkeypatch.setattr("simmim.tasks.label_efficiency.locked_folder", held)
    init = str(encoder_directory)
    command = ["labels", "--config", str(config), "--init", init, "--folder", str(folder)]
    assert simmim.cli.main(command) == 2
    assert f"writing into {folder}" in capsys.readouterr().err
    assert not folder.exists()
