"""A hint on sets with images that training cannot take together."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.cli import main

ARRAY = np.zeros((8, 8, 5), dtype=np.uint16)


def _write(folder: Path, kinds: dict[str, np.ndarray | str]) -> Path:
    for name, values in kinds.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(values, str):
            Image.new(values, (9, 9)).save(path)
        else:
            np.save(path, values)
    return folder


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("L", "2 pictures, as b/1.png"),
        (ARRAY.astype(np.float32), "2 arrays of 5 channels, float32, as b/1"),
        (ARRAY[..., 0], "2 arrays of 1 channel, 8 or 16 bits, as b/1"),
    ],
)
def test_images_of_several_kinds_are_named_with_an_example(
    other: np.ndarray | str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suffix = "png" if isinstance(other, str) else "npy"
    files: dict[str, np.ndarray | str] = {f"a/{number}.npy": ARRAY for number in range(3)}
    files |= {f"b/{number}.{suffix}": other for number in (1, 2)}
    source = _write(tmp_path / "in", files)
    command = ["shard", str(source), str(tmp_path / "out"), "--workers", "1", "--no-shuffle"]
    assert main(command) == 0
    shown = capsys.readouterr().err
    assert "3 arrays of 5 channels, 8 or 16 bits, as a/0.npy" in shown
    assert named in shown
    assert "--include" in shown
    assert main([*command, "--include", "a/*", "--overwrite"]) == 0
    assert "several kinds" not in capsys.readouterr().err


def test_the_parts_of_a_run_are_counted_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _write(tmp_path / "in", {"0.npy": ARRAY, "1.png": "L"})
    out = str(tmp_path / "out")
    for part in ("1/2", "2/2"):
        options = ["--part", part, "--samples-per-shard", "1", "--workers", "1"]
        assert main(["shard", str(source), out, *options]) == 0
    assert "several kinds" not in capsys.readouterr().err
    assert main(["merge", out]) == 0
    shown = capsys.readouterr().err
    assert "1 array of 5 channels, 8 or 16 bits, as 0.npy" in shown
    assert "1 picture, as 1.png" in shown


def test_images_that_share_batches_are_one_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"0.png": "L", "1.png": "RGBA", "2.png": "I;16", "3.npy": ARRAY[..., :3]}
    source = _write(tmp_path / "in", files | {"4.npy": ARRAY[..., :3].astype(np.uint8)})
    assert main(["shard", str(source), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert "several kinds" not in capsys.readouterr().err
