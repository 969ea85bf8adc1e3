"""Checkpoints that were damaged, edited or copied from elsewhere are refused by name."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from simmim.engine.checkpoint.choosing import choose_checkpoint, chosen_checkpoint
from simmim.engine.checkpoint.directory import (
    COMPLETE,
    Best,
    TrainingState,
    finish_checkpoint,
    load_state,
    set_aside,
)
from simmim.engine.checkpoint.ema import read_average
from simmim.engine.checkpoint.resume import load_initial, load_optimizer, read_model
from simmim.engine.checkpoint.saver import rank_contents, write_contents
from simmim.engine.optimizer import ParameterGroup, build_optimizer
from simmim.engine.run import RunFolder
from simmim.engine.settings import OptimizerSettings
from simmim.export.load_trained import read_source

MODEL, OPTIMIZER = "model-00000-of-00001.safetensors", "optimizer-00000-of-00001.safetensors"
FILES = (MODEL, OPTIMIZER, "optimizer.json", "state.json", "recipe.yaml", COMPLETE)


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    names = tuple(name for name, _ in model.named_parameters())
    group = ParameterGroup(names=names, weight_decay=0.05, lr_factor=1.0)
    return model, build_optimizer(model, OptimizerSettings(lr=0.01), [group])


def save(folder: Path, step: int, *, digests: bool = True, **changed: Any) -> Path:
    """Write the checkpoint of a step, of this version or of one without digests."""
    model, optimizer = build()
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    state = TrainingState(
        step=step,
        cursor=8 * step,
        total_steps=100,
        batch_size=8,
        seed=3,
        losses=(0.25, float("nan")),
        data_digest="d1",
        recipe_hash="0123456789abcdef",
        best=Best(step=step, metric="accuracy", value=0.5),
        run="this run",
    )
    if not digests:  # versions before digests recorded no run either
        state = replace(state, run="")
    state = replace(state, **changed)
    contents = rank_contents(model, optimizer, Accelerator(cpu=True), state, "task: pretrain\n")
    write_contents(folder, step, contents)
    path = finish_checkpoint(folder, step, 1)
    if not digests:
        (path / COMPLETE).write_bytes(b"")
    return path


def assert_rejected(path: Path, earlier: Path, *words: str) -> None:
    """A checkpoint is refused by its path, and `auto` falls back to an earlier one and says so."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        choose_checkpoint(path.parent, str(path), run="this run")
    found = choose_checkpoint(path.parent, "auto", run="this run")
    assert found.path == earlier
    assert found.warning is not None
    for text in (str(caught.value), found.warning):
        assert all(word in text for word in words), text


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found(tmp_path: Path, name: str) -> None:
    earlier, last = save(tmp_path, 4), save(tmp_path, 8)
    file = last / name
    whole = file.read_bytes()
    for place in {0, 7, 8, len(whole) // 3, len(whole) // 2, len(whole) - 2}:
        for bit in (0, 5, 7):
            data = bytearray(whole)
            data[place % len(whole)] ^= 1 << bit
            file.write_bytes(data)
            assert_rejected(last, earlier, name, "cannot be read")
    file.write_bytes(whole)
    assert choose_checkpoint(tmp_path, "auto", run="this run").path == last


def test_what_reads_a_checkpoint_without_resuming_finds_a_flipped_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 4)
    for name in (MODEL, OPTIMIZER):
        data = bytearray((path / name).read_bytes())
        data[-1] ^= 4
        (path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{MODEL} cannot be read: .*SHA-256"):
        read_model(path)
    with pytest.raises(ValueError, match=rf"{OPTIMIZER} cannot be read: .*SHA-256"):
        read_average(path)


@pytest.mark.parametrize("field", [field.name for field in fields(TrainingState)])
def test_an_edited_state_is_found(tmp_path: Path, field: str) -> None:
    earlier, last = save(tmp_path, 4), save(tmp_path, 8)
    changed: dict[str, Any] = {
        "losses": [0.5, 0.25],
        "data_digest": "d2",
        "recipe_hash": "fedcba9876543210",
        "scaler": {"scale": 2.0},
        "best": None,
        "run": "",
        "skipped_steps": 1,
    }
    values = json.loads((last / "state.json").read_text())
    values[field] = changed[field] if field in changed else values[field] + 1
    (last / "state.json").write_text(json.dumps(values, indent=2))
    assert_rejected(last, earlier, "step-00000008")


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"step": -1}, "step"),
        ({"step": 101}, "step"),
        ({"cursor": 7}, "cursor"),
        ({"cursor": 2**63 - 1}, "cursor"),
        ({"cursor": 1e308}, "cursor"),
        ({"batch_size": 0}, "batch_size"),
        ({"total_steps": 7}, "step"),
        ({"seed": 2**63}, "seed"),
        ({"processes": 0}, "processes"),
        ({"skipped_steps": 9}, "skipped_steps"),
        ({"scaler": {"scale": -1.0}}, "scaler"),
        ({"scaler": {"scale": float("inf")}}, "scaler"),
        ({"best": {"step": 9, "metric": "accuracy", "value": 0.5}}, "best"),
        ({"best": {"step": 8, "metric": "accuracy", "value": float("nan")}}, "best"),
        ({"losses": [[[[]]]]}, "losses"),
    ],
)
def test_a_state_out_of_range_is_refused_without_digests(
    tmp_path: Path, changed: dict[str, Any], name: str
) -> None:
    earlier, last = save(tmp_path, 4, digests=False), save(tmp_path, 8, digests=False)
    values = json.loads((last / "state.json").read_text()) | changed
    (last / "state.json").write_text(json.dumps(values))
    assert_rejected(last, earlier, "state.json", name)


@pytest.mark.parametrize(
    "text", ["[" * 10**5, '{"a":' * 10**5, '{"step": %s}' % ("9" * 5000), "null", "[]", "\xff"]
)
@pytest.mark.parametrize("name", ["state.json", "optimizer.json"])
def test_json_of_another_kind_is_refused(tmp_path: Path, name: str, text: str) -> None:
    earlier, last = save(tmp_path, 4, digests=False), save(tmp_path, 8, digests=False)
    (last / name).write_text(text, encoding="latin-1")
    assert_rejected(last, earlier, name)


ROWS: dict[str, Callable[[list[int]], object]] = {
    "behind the end": lambda shape: [shape[0], *shape],
    "over the end": lambda shape: [1, *shape],
    "before the start": lambda shape: [-1, shape[0] + 1, *shape[1:]],
    "of more": lambda shape: [0, 10**15, *shape[1:]],
    "of another width": lambda shape: [0, shape[0], *shape[1:], 7],
    "no shape": lambda _: [0],
    "not numbers": lambda _: ["0", "4"],
    "not a list": lambda _: {"first": 0},
    "huge": lambda shape: [10**30, *shape],
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("digests", [True, False])
def test_rows_outside_the_tensor_are_refused(tmp_path: Path, rows: str, digests: bool) -> None:
    earlier, last = save(tmp_path, 4, digests=digests), save(tmp_path, 8, digests=digests)
    for file in (last / MODEL, last / OPTIMIZER):
        whole = file.read_bytes()
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("weight"))
        said = {name: ROWS[rows](list(tensors[name].shape))}
        save_file(tensors, file, {"rows": json.dumps(said)})
        assert_rejected(last, earlier, file.name.partition("-")[0])
        file.write_bytes(whole)


def test_rows_of_an_unknown_tensor_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 4, digests=False)
    save_file(load_file(path / MODEL), path / MODEL, {"rows": '{"absent": [0, 2]}'})
    with pytest.raises(ValueError, match=rf"{MODEL} cannot be read: .*absent"):
        read_model(path)


def test_a_moment_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 4, digests=False)
    tensors = load_file(path / OPTIMIZER)
    save_file(tensors | {"exp_avg/0.weight": torch.zeros(2, 2)}, path / OPTIMIZER)
    with pytest.raises(ValueError, match=r"exp_avg/0\.weight: \(2, 2\), expected \(4, 3\)"):
        load_optimizer(path, build()[1])


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    earlier, last = save(tmp_path, 4), save(tmp_path, 8, run="other run")
    assert_rejected(last, earlier, "another run", "other run")
    # A folder that has no identity yet goes on with it: the run was moved there.
    assert choose_checkpoint(tmp_path, "auto").path == last


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    earlier = save(tmp_path, 4)
    last = save(tmp_path, 8).rename(tmp_path / "step-00000012")
    assert_rejected(last, earlier, "step 8")


@pytest.mark.parametrize(
    "read", [chosen_checkpoint, read_source, lambda path: load_initial(path, build()[0])]
)
def test_what_takes_weights_refuses_a_checkpoint_in_the_place_of_another(
    tmp_path: Path, read: Callable[[Path], Any]
) -> None:
    run = RunFolder(path=tmp_path / "run")
    foreign = save(run.checkpoints, 8, run="other run")
    run.recipe.write_bytes((foreign / "recipe.yaml").read_bytes())
    run.set_identity("its own")
    for source in (foreign, run.path):
        with pytest.raises(ValueError, match="is of another run") as caught:
            read(source)
        assert "--resume" not in str(caught.value)
    renamed = save(tmp_path / "elsewhere", 4).rename(tmp_path / "elsewhere" / "step-00000009")
    with pytest.raises(ValueError, match="holds step 4"):
        read(renamed)


@pytest.mark.parametrize("lost", [MODEL, "recipe.yaml", "optimizer.json"])
def test_a_lost_file_is_named(tmp_path: Path, lost: str) -> None:
    earlier, last = save(tmp_path, 4), save(tmp_path, 8)
    (last / lost).unlink()
    assert_rejected(last, earlier, lost)


def test_checkpoints_without_digests_load(tmp_path: Path) -> None:
    path = save(tmp_path, 4, digests=False)
    values = json.loads((path / "state.json").read_text())
    del values["run"]
    (path / "state.json").write_text(json.dumps(values))
    assert choose_checkpoint(tmp_path, "auto", run="this run").path == path
    assert asdict(load_state(path))["run"] == ""
    assert read_model(path)


def test_if_no_checkpoint_can_be_used_none_is_ignored(tmp_path: Path) -> None:
    for path in (save(tmp_path, 4), save(tmp_path, 8)):
        (path / MODEL).write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)no checkpoint.*step-00000008.*step-00000004"):
        choose_checkpoint(tmp_path, "auto")


def test_ranks_share_the_files_and_what_they_found(tmp_path: Path) -> None:
    path = save(tmp_path, 8)
    (path / OPTIMIZER).write_bytes((path / OPTIMIZER).read_bytes()[:-1] + b"\0\0")
    found: list[str | None] = []

    def gather(reason: str | None) -> list[str | None]:
        found.append(reason)
        return [reason, None]

    choose_checkpoint(tmp_path, "auto", rank=0, world=2, gather=lambda _: [None])
    with pytest.raises(ValueError, match=OPTIMIZER):
        choose_checkpoint(tmp_path, "auto", rank=1, world=2, gather=gather)
    assert found[0] is not None


def test_a_rejected_checkpoint_is_kept_under_another_name(tmp_path: Path) -> None:
    save(tmp_path, 4)
    aside = set_aside(save(tmp_path, 8))
    assert read_model(aside)
    found = choose_checkpoint(tmp_path, "auto").path
    assert found is not None
    assert found.name == "step-00000004"


def test_an_emptied_marker_does_not_switch_the_digests_off(tmp_path: Path) -> None:
    earlier, last = save(tmp_path, 4), save(tmp_path, 8)
    (last / COMPLETE).write_bytes(b"")
    assert_rejected(last, earlier, COMPLETE, "empty")
    with pytest.raises(ValueError, match=COMPLETE):
        read_model(last)
    with pytest.raises(ValueError, match=COMPLETE):
        chosen_checkpoint(last)


@pytest.mark.parametrize("name", ["optimizer.json", "state.json", "recipe.yaml"])
@pytest.mark.parametrize(
    "read", [chosen_checkpoint, read_source, lambda path: load_initial(path, build()[0])]
)
def test_what_takes_weights_refuses_an_edited_file(
    tmp_path: Path, name: str, read: Callable[[Path], Any]
) -> None:
    path = save(tmp_path, 4)
    with (path / name).open("a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match=re.escape(f"{path / name} cannot be read")) as caught:
        read(path)
    assert "bytes" in str(caught.value)
    assert "--resume" not in str(caught.value)
