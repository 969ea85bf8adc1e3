"""The quickstart on its embedded default: the pretrained encoder must really win."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simmim.cli import main
from simmim.data.datasets.procedural import draw_images
from simmim.engine.folder_lock import locked_folder
from simmim.engine.loop import TrainingResult
from simmim.engine.run import RunFolder
from simmim.quickstart import fit_to_images, make_shards, quickstart, quickstart_recipe
from simmim.tasks.pretrain.stage import PretrainStage
from simmim.tasks.train import print_result


def test_too_few_images_are_refused_by_name(tmp_path: Path) -> None:
    draw_images(tmp_path / "images", count=1, size=32, seed=0)
    make_shards(tmp_path / "images", tmp_path / "shards")
    with pytest.raises(ValueError, match="too few"):
        quickstart_recipe(tmp_path / "shards")


def test_the_recipe_fits_a_few_images(tmp_path: Path) -> None:
    draw_images(tmp_path / "images", count=20, size=32, seed=0)
    make_shards(tmp_path / "images", tmp_path / "shards")
    stage = PretrainStage(quickstart_recipe(tmp_path / "shards"))
    assert len(next(iter(stage.batches(rank=0, world=1, start=0, end=64)))) == 64
    assert 0 < stage.validation_shards.samples < 20


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with locked_folder(tmp_path / "folder"), pytest.raises(ValueError, match="is writing into"):
        quickstart(None, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_stopped_quickstart_says_once_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, run: RunFolder, resume: str, **__: object) -> TrainingResult:
        result = TrainingResult(step=3, stopped=True, figures={})
        print_result(result, run, resume)
        return result

    draw_images(tmp_path / "images", count=20, size=32, seed=0)
    monkeypatch.setattr("simmim.quickstart.train_recipe", stop)
    command = ["quickstart", "--images", str(tmp_path / "images"), "--folder", str(tmp_path / "q")]
    assert main(command) == 75
    printed = capsys.readouterr().out
    assert re.findall(r"Resume.*", printed) == ["Resume with the same command."]
    print_result(TrainingResult(step=3, stopped=True, figures={}), RunFolder(path=tmp_path), None)
    assert "Resume with the same command and --resume auto." in capsys.readouterr().out


def test_images_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no shards"):
        quickstart(tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run").exists()  # it can be used again


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_pretrained_encoder_wins(tmp_path: Path) -> None:
    outcome = quickstart(None, tmp_path)
    assert not outcome.stopped
    loss, baseline = re.findall(r": +(\d\.\d+)$", outcome.text, re.MULTILINE)
    assert float(loss) < 0.6 * float(baseline)
    rows = re.findall(r"^(pretrained|scratch) +([\d.]+) +([\d.]+)", outcome.text, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["pretrained", "scratch"]
    (_, knn, linear), (_, random_knn, random_linear) = rows
    assert float(knn) > float(random_knn)
    assert float(linear) > 1.3 * float(random_linear)
    assert len(list((tmp_path / "run" / "reconstructions").glob("*.png"))) == 2


@pytest.mark.parametrize(("bands", "channels"), [(1, 1), (5, 5), (None, 3)])
def test_the_recipe_takes_the_channels_and_statistics_of_the_images(
    tmp_path: Path, bands: int | None, channels: int
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        values = np.random.default_rng(number).integers(0, 4000, (32, 32, bands or 3))
        if bands is None:
            Image.fromarray((values % 256).astype(np.uint8)).save(images / f"{number}.png")
        elif bands == 1:
            Image.fromarray(values[..., 0].astype(np.uint16)).save(images / f"{number}.png")
        else:
            np.save(images / f"{number}.npy", values.astype(np.uint16))
    make_shards(images, tmp_path / "shards")
    before = quickstart_recipe(tmp_path / "shards")
    recipe = fit_to_images(before, tmp_path / "shards")
    assert recipe.encoder.in_channels == channels
    if bands is None:
        assert recipe == before
    else:
        assert recipe.data.mean == pytest.approx([2000 / 65535] * bands, rel=0.05)
    PretrainStage(recipe)
