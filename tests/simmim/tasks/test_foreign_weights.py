"""Weights of other libraries as `--init` and `--init-from`: one line, with the command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from simmim.cli import main
from swinv2 import SwinV2, SwinV2Config
from swinv2.bridges.reference import export_reference, to_reference
from swinv2.bridges.timm import export_timm, to_timm
from swinv2.bridges.transformers import export_transformers

NORMALISATION: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def encoder() -> SwinV2:
    return SwinV2(
        SwinV2Config(image_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)
    )


def write_pickle(path: Path) -> Path:
    torch.save({"model": to_reference(encoder())}, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def write_timm_file(path: Path) -> Path:
    save_file(to_timm(encoder()), path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def write_weights_alone(path: Path) -> Path:
    path.mkdir()
    save_file(to_timm(encoder()), path / "model.safetensors")
    return path


SOURCES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pickle": (write_pickle, "a file"),
    "timm file": (write_timm_file, "a file"),
    "timm folder": (lambda path: export_timm(encoder(), path, **NORMALISATION), "folder of timm"),
    "published folder": (
        lambda path: export_reference(encoder(), path, **NORMALISATION),
        "a folder with checkpoint.pth of another library",
    ),
    "transformers folder": (
        lambda path: export_transformers(encoder(), path, **NORMALISATION),
        "a folder of transformers",
    ),
    "weights alone": (write_weights_alone, "a folder with model.safetensors of another library"),
}


def refusal(command: str, values: dict[str, Any], source: str, folder: Path) -> list[str]:
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(values))
    option = "--init" if command == "finetune" else "--init-from"
    given = [command, "--config", str(config), "--folder", str(folder / "run"), option, source]
    assert main(given) == 2
    assert not (folder / "run").exists()
    return given


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
@pytest.mark.parametrize("kind", SOURCES)
def test_weights_of_others_are_answered_with_the_command_that_imports_them(
    pretrain_values: dict[str, Any],
    classification_values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    kind: str,
) -> None:
    monkeypatch.setattr("swinv2.bridges.transformers.find_spec", lambda name: None)
    write, expected = SOURCES[kind]
    source = write(tmp_path / "theirs")
    capsys.readouterr()
    values = pretrain_values if command == "pretrain" else classification_values
    refusal(command, values, str(source), tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    (suggested,) = [part for part in line.split("`") if part.startswith("simmim import")]
    words = [*suggested.split()[1:-1], str(tmp_path / "ours")]
    sizes = ["--image-size", "32", "--window-size", "4", "--pretrained-windows", "same"]
    assert main([*words, *sizes]) == 0  # what a file does not record has to be given


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
@pytest.mark.parametrize(
    "name",
    [
        "microsoft/swinv2-tiny-patch4-window8-256",
        "timm/swinv2_tiny_window8_256.ms_in1k",
        "swinv2_base_window12_192",
        "someone/my-encoder",
    ],
)
def test_the_name_of_a_model_is_answered_with_both_commands(
    pretrain_values: dict[str, Any],
    classification_values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    name: str,
) -> None:
    values = pretrain_values if command == "pretrain" else classification_values
    refusal(command, values, name, tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"`hf download {name} --local-dir FOLDER` and `simmim import FOLDER ENCODER`" in line
