"""Tests of the position biases that the transfer benchmark compares."""

import importlib.util
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from swinv2.position_bias import PositionBias, relative_coordinates


@pytest.fixture(scope="module")
def transfer() -> Iterator[ModuleType]:
    """The benchmark as a module; benchmarks are scripts outside any package."""
    path = Path(__file__).with_name("transfer.py")
    spec = importlib.util.spec_from_file_location("transfer_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def cubic(distance: np.ndarray) -> np.ndarray:
    """Evaluate Keys' cubic convolution kernel with a = -0.75."""
    a, s = -0.75, abs(distance)
    near = (a + 2) * s**3 - (a + 3) * s**2 + 1
    far = a * s**3 - 5 * a * s**2 + 8 * a * s - 4 * a
    return np.where(s <= 1, near, np.where(s < 2, far, 0))


def resize_by_hand(values: np.ndarray, size: int) -> np.ndarray:
    """Resize the first axis, with half-pixel centres and replicated borders."""
    length = len(values)
    centres = (np.arange(size) + 0.5) * length / size - 0.5
    taps = np.arange(-3, length + 3)
    weights = cubic(centres[:, None] - taps)
    return np.tensordot(weights, values[np.clip(taps, 0, length - 1)], axes=1)


def test_a_table_is_interpolated_by_cubic_convolution(transfer: ModuleType) -> None:
    drawn = torch.randn(3, 15, 11, generator=torch.Generator().manual_seed(0)).double()
    found = transfer.interpolated(drawn, (12, 16)).numpy()
    rows = resize_by_hand(drawn.numpy().transpose(1, 2, 0), 23)
    expected = resize_by_hand(rows.transpose(1, 0, 2), 31).transpose(2, 1, 0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_interpolation_to_the_same_window_changes_nothing(transfer: ModuleType) -> None:
    drawn = torch.randn(2, 15, 15)
    assert torch.equal(transfer.interpolated(drawn, (8, 8)), drawn)
    resized = torch.nn.functional.interpolate(drawn[None], size=(15, 15), mode="bicubic")[0]
    torch.testing.assert_close(resized, drawn)


@pytest.mark.parametrize("side", [12, 16, 24])
def test_interpolation_keeps_the_zero_offset_and_stretches_a_line(
    transfer: ModuleType, side: int
) -> None:
    drawn = torch.randn(2, 15, 15, dtype=torch.float64)
    found = transfer.interpolated(drawn, (side, side))
    torch.testing.assert_close(found[:, side - 1, side - 1], drawn[:, 7, 7])

    row, column = torch.meshgrid(*2 * [torch.arange(-7.0, 8).double()], indexing="ij")
    line = transfer.interpolated((3 * row - 2 * column)[None], (side, side))[0]
    # Every offset scales with the table. Away from the border, which is replicated, the kernel is
    # within 0.05 of a cell of a line.
    offsets = torch.arange(1 - side, side).double() * 15 / (2 * side - 1)
    row, column = torch.meshgrid(offsets, offsets, indexing="ij")
    inside = (row.abs() <= 5.5) & (column.abs() <= 5.5)
    assert (line - (3 * row - 2 * column))[inside].abs().max() <= 5 * 0.05
    torch.testing.assert_close(line, -line.flip(0, 1))


def test_linear_coordinates_are_offsets_over_the_largest_of_pretraining(
    transfer: ModuleType,
) -> None:
    found = transfer.linear_coordinates((3, 2), (3, 2))
    rows = [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert found.tolist() == [[row, column] for row in rows for column in (-1.0, 0.0, 1.0)]
    larger = transfer.linear_coordinates((24, 24), (8, 8))
    assert larger[0].tolist() == pytest.approx([-23 / 7, -23 / 7])
    spaced = relative_coordinates((24, 24), (8, 8), torch.float32, torch.device("cpu"))
    assert torch.equal(larger.sign(), spaced.sign())
    torch.testing.assert_close(spaced.abs(), torch.log2(8 * larger.abs() + 1) / 3)


def test_each_bias_looks_up_the_value_of_an_offset(transfer: ModuleType) -> None:
    tabled = transfer.TableBias(2, (3, 4))
    bias = tabled((3, 4))
    assert bias.shape == (2, 12, 12)
    for query, key in ((0, 11), (5, 5), (7, 2)):
        (query_row, query_column), (key_row, key_column) = divmod(query, 4), divmod(key, 4)
        row, column = 2 + query_row - key_row, 3 + query_column - key_column
        assert torch.equal(bias[:, query, key], tabled.table[:, row, column])

    linear = transfer.LinearBias(PositionBias(2, (3, 4)))
    torch.nn.init.normal_(linear.reduce.weight)
    found = linear((3, 4))[:, 0, 11]
    hidden = linear.expand(torch.tensor([-1.0, -1.0])).relu()
    torch.testing.assert_close(found, 16 * torch.sigmoid(linear.reduce(hidden)))


def test_contestants_differ_only_in_their_bias(transfer: ModuleType) -> None:
    models = {
        kind: transfer.build_classifier(kind, 10, seed=3)
        for kind in transfer.get_args(transfer.Kind)
    }
    ours = models["log-spaced"].state_dict()
    assert models["linear"].state_dict().keys() == ours.keys()
    for kind, model in models.items():
        state = model.state_dict()
        shared = [name for name in state if name in ours]
        assert all(torch.equal(state[name], ours[name]) for name in shared), kind
        assert {name for name in ours if name not in state} == (
            {name for name in ours if "position_bias" in name} if kind == "table" else set()
        )
        bias = model.encoder.stages[0].blocks[1].attention.position_bias
        model.encoder.set_input(image_size=96, window_size=12)
        assert bias((12, 12)).shape == (1, 144, 144)
        images = torch.randn(2, 3, 96, 96)
        assert model(images).isfinite().all()


def test_every_run_of_a_seed_sees_the_same_batches(transfer: ModuleType, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        for number in range(80):
            path = tmp_path / "image.png"
            Image.fromarray(np.full((32, 32, 3), number, np.uint8)).save(path)
            file.write(path, f"train/{'ab'[number % 2]}/{number:04d}.png")
    data = transfer.read_images(tmp_path / "data.zip", "train")
    assert data.labels.tolist() == [0] * 40 + [1] * 40
    few = transfer.read_images(tmp_path / "data.zip", "train", per_class=3)
    assert [int(image[0, 0, 0]) for image in few.images] == [0, 2, 4, 1, 3, 5]
    first, again = (list(transfer.training_batches(data, 0, steps=3)) for _ in range(2))
    for (images, labels), (same_images, same_labels) in zip(first, again, strict=True):
        assert images.shape[1:] == (3, 64, 64)
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
        assert torch.equal(images[:, 0, 0, 0] % 2, labels)
    other = next(transfer.training_batches(data, 1, steps=1))
    assert not torch.equal(other[0], first[0][0])
