"""An export at other sizes than an encoder was trained at."""

from pathlib import Path

import pytest
import torch

from simmim.cli import main
from swinv2 import load_encoder, save_encoder
from tests.simmim.conftest import MEAN, STD


def test_it_is_the_encoder_as_it_is_loaded_at_these_sizes(
    encoder_directory: Path, tmp_path: Path
) -> None:
    sizes = ["--image-size", "32,24", "--window-size", "8"]
    assert main(["export", str(encoder_directory), str(tmp_path / "out"), *sizes]) == 0
    exported = load_encoder(tmp_path / "out")
    transferred = load_encoder(encoder_directory, image_size=(32, 24), window_size=8)
    assert exported.config == transferred.config
    images = torch.randn(2, 3, 32, 24)
    with torch.no_grad():
        assert torch.equal(exported(images), transferred(images))


def test_sizes_that_a_format_cannot_express_are_replaced(
    encoder_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    padded = load_encoder(encoder_directory, window_size=3)
    save_encoder(padded, tmp_path / "padded", mean=MEAN, std=STD)
    command = [
        "export",
        str(tmp_path / "padded"),
        str(tmp_path / "out"),
        "--format",
        "transformers",
    ]
    pytest.importorskip("transformers")
    assert main(command) == 2
    assert "load it with an image_size or window_size" in capsys.readouterr().err
    assert main([*command, "--window-size", "4"]) == 0
    assert "compared on" in capsys.readouterr().out


def test_sizes_that_cannot_work_are_refused(
    encoder_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(encoder_directory), str(tmp_path / "out")]
    for sizes, message in ((["--window-size", "0"], "window_size"), (["--image-size", "x"], "'x'")):
        assert main([*command, *sizes]) == 2
        assert message in capsys.readouterr().err
