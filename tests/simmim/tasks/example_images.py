"""Sets of images that fit an encoder, or do not."""

import re
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

import data_prep.cli
from simmim.data.datasets.opening import open_sets
from simmim.data.transforms.settings import DecodeSettings
from simmim.doctor.shards import input_checks
from simmim.tasks.input_check import (
    EncoderInput,
    compare_input,
    sample_images,
)

LIMIT = DecodeSettings(max_pixels=10**6)
PHOTOS = EncoderInput(channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SIDE, IMAGES = 24, 12


def values_of(kind: str, number: int) -> np.ndarray:
    """Pixels of an image: `TYPExCHANNELS-HIGHEST`."""
    (name, channels), highest = kind.split("-", maxsplit=1)[0].split("x"), float(kind.split("-")[1])
    rng = np.random.default_rng(number)
    shape = (SIDE, SIDE) if channels == "1" else (SIDE, SIDE, int(channels))
    return (rng.random(shape) * highest).astype(name)


def write_images(folder: Path, kind: str) -> Path:
    """Write images: PNG if they may be that, arrays if not."""
    folder.mkdir(parents=True)
    for number in range(IMAGES):
        values = values_of(kind, number)
        pictures = {"uint8": ((), (3,), (4,)), "uint16": ((),)}
        if values.shape[2:] in pictures.get(values.dtype.name, ()):
            Image.fromarray(values).save(folder / f"{number}.png")
        else:
            np.save(folder / f"{number}.npy", values)
    return folder


def make_set(tmp_path: Path, kind: str, *, as_shards: bool) -> Path:
    folder = write_images(tmp_path / "images", kind)
    if not as_shards:
        return folder
    command = ["shard", str(folder), str(tmp_path / "shards"), "--samples-per-shard", "4"]
    assert data_prep.cli.main(command) == 0
    return tmp_path / "shards"


def settings_in(text: str) -> tuple[int, list[float], list[float]]:
    """The three settings that a message gives."""
    found = re.search(
        r"encoder\.in_channels to (\d+), data\.mean to (\[[^]]+\]) and data\.std to (\[[^]]+\])",
        " ".join(text.split()),
    )
    assert found is not None, text
    return int(found[1]), yaml.safe_load(found[2]), yaml.safe_load(found[3])


def truth(kind: str) -> tuple[np.ndarray, np.ndarray]:
    values = np.stack([values_of(kind, number) for number in range(IMAGES)])
    scale = {"uint8": 255, "uint16": 65535}.get(values.dtype.name, 1)
    values = values.reshape(-1, 1 if values.ndim == 3 else values.shape[-1]) / scale
    return values.mean(axis=0), values.std(axis=0)


def findings(folder: Path, wanted: EncoderInput) -> dict[str, str]:
    found = sample_images(
        open_sets(str(folder)), channels=wanted.channels, data=LIMIT, most=32, seconds=60
    )
    doctor = {check.name: check.verdict for check in input_checks(found, wanted)}
    assert doctor == {one.name: one.verdict for one in compare_input(found, wanted)}
    return doctor
