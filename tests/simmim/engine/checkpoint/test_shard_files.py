"""Shard files: what any number of ranks wrote is read by rows."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from simmim.engine.checkpoint.directory import shard_path
from simmim.engine.checkpoint.shard_files import (
    DTYPE_NAMES,
    ShardFiles,
    TensorShard,
    whole_tensor,
    write_shards,
)

SHAPES = {"long": (7, 3), "short": (2, 2, 2), "flat": (5,), "number": ()}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write(folder: Path, count: int) -> None:
    """Write as this many ranks do, each its rows; rank 0 writes scalars."""
    for rank in range(count):
        pieces = {}
        for name, tensor in tensors().items():
            if not tensor.ndim:
                if rank == 0:
                    pieces[name] = whole_tensor(tensor)
                continue
            part = -(-len(tensor) // count)
            rows = tensor[part * rank : part * (rank + 1)]
            if len(rows):
                pieces[name] = TensorShard(rows, part * rank, tuple(tensor.shape))
        write_shards(shard_path(folder, "model", rank, count), pieces)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_rows_are_read_from_any_number_of_files(tmp_path: Path, count: int) -> None:
    write(tmp_path, count)
    with ShardFiles(tmp_path, "model") as parts:
        assert parts.shapes == SHAPES
        for name, tensor in tensors().items():
            assert torch.equal(parts.read(name), tensor)
        for first in range(8):
            for last in range(first, 8):
                expected = tensors()["long"][first:last]
                assert torch.equal(parts.read("long", first, last), expected)


def test_a_single_shard_file_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    many = {
        str(dtype): torch.arange(6, dtype=torch.float32).view(3, 2).T.to(dtype)
        for dtype in DTYPE_NAMES
    }
    file = shard_path(tmp_path, "model", 0, 1)
    write_shards(file, {name: whole_tensor(tensor) for name, tensor in many.items()})
    loaded = load_file(file)
    assert loaded.keys() == many.keys()
    assert all(torch.equal(loaded[name], many[name]) for name in many)
    assert all(loaded[name].dtype == many[name].dtype for name in many)


def test_keep_below_keeps_names_with_a_prefix(tmp_path: Path) -> None:
    pieces = {
        name: whole_tensor(torch.full((2,), float(len(name)))) for name in ("a.x", "a.b.x", "c")
    }
    write_shards(shard_path(tmp_path, "model", 0, 1), pieces)
    with ShardFiles(tmp_path, "model") as parts:
        parts.keep_below("a.")
        assert parts.shapes == {"x": (2,), "b.x": (2,)}
        assert parts.read("b.x", 0, 1).tolist() == [5.0]


def test_a_missing_shard_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, 3)
    file = shard_path(tmp_path, "model", 1, 3)
    file.unlink()
    with pytest.raises(ValueError, match="cannot be read") as caught:
        ShardFiles(tmp_path, "model")
    assert str(file) in str(caught.value)


def test_shard_files_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path, 2)
    write(tmp_path, 3)
    with pytest.raises(ValueError, match=r"\[2, 3\] model files"):
        ShardFiles(tmp_path, "model")


def test_missing_rows_are_reported(tmp_path: Path) -> None:
    rows = TensorShard(torch.zeros(2, 3), 1, (4, 3))
    write_shards(shard_path(tmp_path, "model", 0, 1), {"name": rows})
    with pytest.raises(ValueError, match=r"rows of name .*model"):
        ShardFiles(tmp_path, "model")


def test_the_header_is_readable_by_hand(tmp_path: Path) -> None:
    write(tmp_path, 2)
    raw = shard_path(tmp_path, "model", 1, 2).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert json.loads(header["__metadata__"]["rows"])["long"] == [4, 7, 3]
    assert length % 8 == 0
