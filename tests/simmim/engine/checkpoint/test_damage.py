"""Checkpoints that are damaged, foreign, or were being written when the process ended."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from simmim.engine.checkpoint.directory import (
    load_state,
)
from simmim.engine.checkpoint.resume import load_model, load_optimizer
from simmim.engine.optimizer import ParameterGroup
from tests.simmim.engine.checkpoint.small_training import (
    MODEL,
    OPTIMIZER,
    assert_whole,
    build,
    save,
    save_checkpoint,
    state_of,
)


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    groups = [ParameterGroup(names=("0.weight",), weight_decay=0.0, lr_factor=1.0)]
    model, optimizer = build(groups)
    path = save_checkpoint(tmp_path, model, optimizer, state_of(1))
    with pytest.raises(ValueError, match=r"lacks .*0\.bias, 1\.bias, 1\.weight"):
        load_optimizer(path, build()[1])
    with pytest.raises(ValueError, match=r"(?s)missing: 2\.weight.*shape of 0\.weight"):
        load_model(path, nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2), nn.Linear(2, 2)))


def test_nothing_in_a_checkpoint_can_run_code(tmp_path: Path) -> None:
    names = {path.name for path in save(tmp_path, 1).iterdir()}
    assert names == {MODEL, OPTIMIZER, "optimizer.json", "state.json", "recipe.yaml", "complete"}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "absent": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "text": lambda file: file.write_bytes(b"not what it should be"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, "optimizer.json", "state.json"])
def test_damaged_files_are_named(tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path, 2)
    DAMAGES[damage](path / name)
    model, optimizer = build()
    loads: dict[str, Callable[[], object]] = {
        MODEL: lambda: load_model(path, model),
        OPTIMIZER: lambda: load_optimizer(path, optimizer),
        "optimizer.json": lambda: load_optimizer(path, optimizer),
        "state.json": lambda: load_state(path),
    }
    with pytest.raises(ValueError, match=r"cannot be read: .+ Copy it again") as caught:
        loads[name]()
    assert str(path / name) in str(caught.value)


@pytest.mark.parametrize(
    "changed", [{"step": "4"}, {"losses": ["x"]}, {"cursor": 1.5}, {"seed": None}]
)
def test_a_state_of_wrong_types_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    file = save(tmp_path, 2) / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ValueError, match=r"state\.json cannot be read"):
        load_state(file.parent)


def test_an_error_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    save(tmp_path, 1)
    model, optimizer = build()
    model.register_buffer("complex", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(KeyError, match="complex64"):
        save_checkpoint(tmp_path, model, optimizer, state_of(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(("length", "file"), [(200, MODEL), (1000, OPTIMIZER)])
def test_a_full_disk_leaves_the_earlier_checkpoint(
    tmp_path: Path,
    no_file_above: Callable[[int], AbstractContextManager[None]],
    length: int,
    file: str,
) -> None:
    save(tmp_path, 1)
    with no_file_above(length), pytest.raises(OSError, match=f"{file} cannot be written"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert_whole(tmp_path / "step-00000001")


def test_a_state_of_another_version_names_missing_fields(tmp_path: Path) -> None:
    path = save(tmp_path, 4)
    values = json.loads((path / "state.json").read_text())
    del values["data_digest"]
    (path / "state.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="data_digest is missing"):
        load_state(path)
