"""Recipes on labelled files: what the doctor says of them, and of what training would mind."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from simmim.cli import main
from simmim.data.datasets.clips import open_clips
from simmim.data.datasets.label_maps import LabelledFolder
from simmim.doctor.files import check_presence

ENCODER = {
    "variant": "tiny",
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 1, 1],
}
TRAINING = {"batch_size": 4, "steps": 4, "trackers": [], "optimizer": {"lr": 1e-3}}
SIZE = (40, 56)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Eight pictures to train on and four to validate on: a rectangle on two halves."""
    folder = tmp_path / "scenes"
    for split, count in (("training", 8), ("validation", 4)):
        for number in range(count):
            classes = np.zeros(SIZE, dtype=np.uint8)
            classes[20:] = 1
            classes[4 + number : 20 + number, 10:30] = 2
            for kind in ("images", "annotations"):
                path = folder / kind / split / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                colours = np.stack([80 * classes] * 3, axis=2) if kind == "images" else classes
                Image.fromarray(colours).save(path)
    return folder


@pytest.fixture
def segmentation(scenes: Path) -> dict[str, Any]:
    """A recipe of segmentation of a second."""
    pytest.importorskip("transformers", reason="needs simmim[finetune]")
    return {
        "task": "segmentation",
        "encoder": ENCODER,
        "data": {"folder": str(scenes), "num_classes": 3, "image_size": 32}
        | {"workers": 0, "slots": 4},
        "head": {"channels": 8, "auxiliary_channels": 8},
        "training": TRAINING,
    }


@pytest.fixture
def detection(scenes: Path) -> dict[str, Any]:
    """A recipe of detection of a second."""
    for package in ("transformers", "pycocotools", "scipy"):
        pytest.importorskip(package, reason="needs simmim[finetune]")
    images = [
        {"id": number, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]}
        for number in range(8)
    ]
    objects = [
        {"id": number, "image_id": number, "category_id": 3, "bbox": [10, 4 + number, 20, 16]}
        for number in range(8)
    ]
    content = {"images": images, "annotations": objects}
    file = scenes / "objects.json"
    file.write_text(json.dumps(content | {"categories": [{"id": 3, "name": "box"}]}))
    return {
        "task": "detection",
        "encoder": ENCODER,
        "data": {
            "images": str(scenes / "images" / "training"),
            "annotations": str(file),
            "image_size": 64,
            "scale": [0.8, 1.2],
            "workers": 0,
            "slots": 4,
        },
        "head": {"kind": "rt_detr", "channels": 32, "queries": 10, "decoder_layers": 1},
        "training": TRAINING,
    }


@pytest.fixture
def video(tmp_path: Path) -> dict[str, Any]:
    """A recipe of clips of a second."""
    av = pytest.importorskip("av", reason="clips need PyAV: pip install 'simmim[video]'")
    for number in range(4):
        path = tmp_path / "clips" / ("left", "right")[number % 2] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.height = stream.width = 32
            stream.pix_fmt = "yuv420p"
            for brightness in range(0, 200, 20):
                pixels = np.full((32, 32, 3), brightness, dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    return {
        "task": "video",
        "encoder": ENCODER,
        "data": {"clips": str(tmp_path / "clips"), "frames": 2, "image_size": 32}
        | {"workers": 0, "slots": 4},
        "training": TRAINING,
    }


def run_doctor(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Return the exit code of the doctor, and its table in one line."""
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(values))
    run = str(tmp_path / "run")
    code = main(["doctor", "--config", str(config), "--folder", run, "--seconds", "0.1"])
    assert not (tmp_path / "run").exists()
    return code, " ".join(capsys.readouterr().out.split())


def missing(text: str, *parts: str) -> Iterator[str]:
    yield from (part for part in parts if part not in text)


def test_it_checks_a_segmentation(
    segmentation: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run_doctor(segmentation, tmp_path, capsys)
    assert code == 0, text
    assert not list(
        missing(
            text,
            "segmentation, custom architecture based on tiny at 32 pixels with windows of 4, 4 "
            "images per step",
            "data 8 images to train on",
            "validation 4 images",
            "files all 24 exist",
            "samples 8 prepared",
            "held out 4 prepared",
            "labels 3 of 3 classes in these crops",
            "not estimated for segmentation",
            "forward and backward on 1 process (cpu)",
            "peak host memory per process",
            "training can start",
        )
    )


def test_it_checks_a_detection(
    detection: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run_doctor(detection, tmp_path, capsys)
    assert code == 0, text
    assert "labels 1.0 objects per crop" in text
    assert "nothing is held out" in text
    assert "validation images" in text


def test_it_checks_a_video_recipe(
    video: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run_doctor(video, tmp_path, capsys)
    assert code == 0, text
    assert "2 frames of 32 pixels with windows of 4 and 8 frames, 4 clips per step" in text
    assert "classes 2 classes with 2 clips" in text
    assert "clips/s" in text


def test_labels_that_would_end_training_are_a_problem(
    segmentation: dict[str, Any],
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = segmentation | {"data": segmentation["data"] | {"max_bad_share": 0.0}}
    labels = scenes / "annotations"
    Image.fromarray(np.full(SIZE, 9, dtype=np.uint8)).save(labels / "validation" / "1.png")
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(labels / "training" / "1.png")
    code, text = run_doctor(values, tmp_path, capsys)
    assert code == 2
    assert "problem held out validation/1: its label map contains 9, which is not a class" in text
    assert "1 damaged (12.5%), the first training/1: its label map has 8x8 pixels" in text
    assert "→ Repair or remove these files" in text


def test_what_cannot_be_opened_is_a_problem(
    segmentation: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run_doctor(segmentation | {"init": "nowhere"}, tmp_path, capsys)
    assert code == 2
    assert "problem data and model nowhere does not exist" in text
    assert "the encoder of nowhere at 32 pixels" in text


def test_missing_and_empty_files_are_named(scenes: Path, tmp_path: Path) -> None:
    folder = LabelledFolder(scenes, "training")
    assert check_presence([folder]).verdict == "ok"
    (scenes / "images" / "training" / "0.png").unlink()
    (scenes / "annotations" / "training" / "1.png").write_bytes(b"")
    (tmp_path / "clips.csv").write_text("one.mp4,a\ntwo.mp4,b\n")
    found = check_presence([folder, open_clips(str(tmp_path / "clips.csv"))])
    assert found.verdict == "problem"
    assert found.found.startswith("4 of 18 files")
    assert "images/training/0.png: No such file" in found.found
    assert "annotations/training/1.png: empty" in found.found
    assert "one.mp4: No such file" in found.found
