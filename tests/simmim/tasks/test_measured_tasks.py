"""Tasks that cannot measure mean and std say so, and what to give instead."""

from pathlib import Path

import pytest

from simmim.cli import main

RECIPES = Path(__file__).parents[3] / "jobs" / "finetune"


@pytest.mark.parametrize("field", ["mean", "std"])
@pytest.mark.parametrize("name", ["segmentation-camvid", "detection-camvid", "video-tiny"])
def test_measured_is_refused_with_a_remedy(
    name: str, field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = RECIPES / f"{name}.yaml"
    command = ["finetune", "--config", str(recipe), "--folder", str(tmp_path / "run")]
    assert main([*command, f"--data.{field}", "measured"]) == 2
    message = capsys.readouterr().err
    assert "give one number per channel, or start from trained weights (--init)" in message


@pytest.mark.parametrize("name", ["segmentation-camvid", "detection-camvid", "video-tiny"])
def test_help_does_not_list_what_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["finetune", "--config", str(RECIPES / f"{name}.yaml"), "--help-fields", "data"]) == 0
    )
    shown = capsys.readouterr().out
    assert "--data.mean  " in shown
    assert "measured" not in shown
    recipe = RECIPES / "cifar10.yaml"
    assert main(["finetune", "--config", str(recipe), "--help-fields", "data"]) == 0
    assert "or measured (default" in capsys.readouterr().out
