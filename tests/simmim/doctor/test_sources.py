"""The doctor on every kind of source and task: what trains passes, and what fails is named."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import data_prep.cli
from simmim.cli import main

Values = dict[str, Any]
CLASSES = {"circle": 5, "square": 9, "stripe": 14}
"""Images of each class."""
ENCODER = {
    "variant": "tiny",
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 1, 1],
}
TRAINING = {"batch_size": 4, "steps": 1, "trackers": [], "optimizer": {"lr": 1e-3}}
SIZE = (24, 32)


def write_images(folder: Path) -> None:
    random = np.random.default_rng(0)
    for name, count in CLASSES.items():
        for number in range(count):
            path = folder / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(path)


def shard(source: Path, folder: Path, *options: str) -> Path:
    sizes = ("--samples-per-shard", "7")
    assert data_prep.cli.main(["shard", str(source), str(folder), *sizes, *options]) == 0
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images")
    return tmp_path / "images"


def recipe(task: str, data: Values, **more: Any) -> Values:
    given = {"task": task, "encoder": ENCODER, "training": TRAINING}
    return given | {"data": {"image_size": 32, "workers": 0} | data} | more


def listed(images: Path) -> Path:
    """Return a CSV file with path and label of each image."""
    file = images.parent / "list.csv"
    with file.open("w", newline="") as text:
        rows = csv.writer(text)
        rows.writerow(["path", "label"])
        rows.writerows([one, one.parent.name] for one in sorted(images.rglob("*.png")))
    return file


def of_images(kind: str, images: Path) -> Values:
    """Return the data section for a kind of source."""
    match kind:
        case "folder":
            return {"shards": str(images)}
        case "shards":
            return {"shards": str(shard(images, images.parent / "shards"))}
        case "list":
            return {"shards": str(shard(listed(images), images.parent / "listed"))}
        case "indexed":
            folder = shard(images, images.parent / "foreign")
            (folder / "manifest.json").unlink()
            assert data_prep.cli.main(["index", str(folder)]) == 0
            return {"shards": str(folder)}
        case "mixture":
            made = shard(images, images.parent / "mixed")
            return {"shards": [{"shards": str(images)}, {"shards": str(made), "weight": 2.0}]}
        case _:
            raise AssertionError(kind)


def segmentation(folder: Path) -> Values:
    pytest.importorskip("transformers", reason="needs simmim[finetune]")
    for split in ("training", "validation"):
        for number in range(4):
            classes = np.zeros(SIZE, dtype=np.uint8)
            classes[number + 4 :] = 1
            for kind, pixels in (
                ("images", np.stack([80 * classes] * 3, 2)),
                ("annotations", classes),
            ):
                path = folder / kind / split / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return recipe(
        "segmentation",
        {"folder": str(folder), "num_classes": 2},
        head={"channels": 8, "auxiliary_channels": 8},
    )


def detection(folder: Path) -> Values:
    for package in ("transformers", "pycocotools", "scipy"):
        pytest.importorskip(package, reason="needs simmim[finetune]")
    segmentation(folder)
    entries = [
        {"id": number, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]}
        for number in range(4)
    ]
    objects = [
        {"id": number, "image_id": number, "category_id": 3, "bbox": [4, 4, 12, 12]}
        for number in range(4)
    ]
    content = {"images": entries, "annotations": objects}
    (folder / "objects.json").write_text(
        json.dumps(content | {"categories": [{"id": 3, "name": "box"}]})
    )
    data = {"images": str(folder / "images" / "training"), "scale": [0.9, 1.1]}
    for name in ("annotations", "validation_annotations"):
        data[name] = str(folder / "objects.json")
    head = {"kind": "rt_detr", "channels": 32, "queries": 4, "decoder_layers": 1}
    return recipe("detection", data, head=head)


def video(folder: Path, *, in_csv: bool) -> Values:
    av = pytest.importorskip("av", reason="clips need PyAV: pip install 'simmim[video]'")
    lines = ["path,label"]
    for number in range(5):
        path = folder / ("left", "right")[number % 2] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.height = stream.width = 32
            stream.pix_fmt = "yuv420p"
            for brightness in range(0, 200, 20):
                pixels = np.full((32, 32, 3), brightness, dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        lines.append(f"{path},{path.parent.name}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    source = folder / "clips.csv" if in_csv else folder
    return recipe("video", {"clips": str(source), "frames": 2})


def fine_tuning(kind: str, images: Path, folder: Path) -> Values:
    """Return a recipe for a kind of source that only fine-tuning has."""
    match kind:
        case "validation folder":
            data = {"shards": str(images), "validation": str(shutil.copytree(images, folder / "v"))}
            return recipe("classification", data)
        case "fraction":
            return recipe("classification", {"shards": str(images), "fraction": 0.5})
        case "multi-label":
            for one in images.rglob("*.png"):
                one.with_suffix(".json").write_text(json.dumps({"classes": [one.parent.name]}))
            several = {"field": "classes", "classes": list(CLASSES)}
            data = {"shards": str(images), "multi_label": several}
            return recipe("classification", data)
        case "label maps":
            return segmentation(folder)
        case "coco":
            return detection(folder)
        case "clips" | "clips in a CSV file":
            return video(folder, in_csv=kind != "clips")
        case _:
            raise AssertionError(kind)


Run = Callable[[Values], tuple[int, str]]


@pytest.fixture
def doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the doctor; return its exit code, and its table in one line."""

    def run(values: Values) -> tuple[int, str]:
        config = tmp_path / "recipe.yaml"
        config.write_text(yaml.safe_dump(values))
        folder = str(tmp_path / "run")
        capsys.readouterr()
        code = main(["doctor", "--config", str(config), "--folder", folder, "--seconds", "0.05"])
        return code, " ".join(capsys.readouterr().out.split())

    return run


OF_IMAGES = ("folder", "shards", "list", "indexed", "mixture")
OF_FINE_TUNING = (
    "validation folder",
    "fraction",
    "multi-label",
    "label maps",
    "coco",
    "clips",
    "clips in a CSV file",
)


@pytest.mark.parametrize("kind", OF_IMAGES)
def test_images_of_every_kind_pass(kind: str, images: Path, doctor: Run) -> None:
    data = of_images(kind, images)
    if kind in {"folder", "mixture"}:
        code, text = doctor(recipe("pretrain", data, mask={"cell": 16}))
        assert code == 0, text
    code, text = doctor(recipe("classification", data | {"validation_shards": 0}))
    assert code == 0, text
    sizes = "10 to 28" if kind == "mixture" else "5 to 14"
    assert f"classes 3 classes with {sizes} images" in text


@pytest.mark.parametrize("kind", OF_FINE_TUNING)
def test_labelled_data_of_every_kind_passes(
    kind: str, images: Path, tmp_path: Path, doctor: Run
) -> None:
    code, text = doctor(fine_tuning(kind, images, tmp_path / "labelled"))
    assert code == 0, text
    if kind == "fraction":
        assert "3 classes with 2 to " in text
    if kind.startswith("clips"):
        assert "2 classes with 2 to 3 clips" in text


def spoil(kind: str, values: Values, folder: Path) -> str:
    """Break the data of a recipe; return what a message has to name."""
    data = values["data"]
    match kind:
        case "folder":
            for number, file in enumerate(sorted(Path(data["shards"]).rglob("*.png"))):
                if number % 2:
                    file.write_bytes(b"no image")
            return "damaged"
        case "shards":
            file = next(Path(data["shards"]).glob("*.tar"))
            file.unlink()
            return file.name
        case "multi-label":
            data["multi_label"]["field"] = "tags"
            return "tags"
        case "label maps":
            for file in (folder / "annotations" / "validation").iterdir():
                Image.fromarray(np.full(SIZE, 255, dtype=np.uint8)).save(file)
            return "no pixel"
        case "coco":
            data["validation_annotations"] = str(folder / "none.json")
            content = json.loads((folder / "objects.json").read_text()) | {"annotations": []}
            Path(data["validation_annotations"]).write_text(json.dumps(content))
            return "none.json"
        case _:
            file = folder / "clips.csv"
            file.write_text(file.read_text() + "gone.mp4,left\n")
            return "gone.mp4"


@pytest.mark.parametrize(
    "kind", ["folder", "shards", "multi-label", "label maps", "coco", "clips in a CSV file"]
)
def test_what_fails_is_named(kind: str, images: Path, tmp_path: Path, doctor: Run) -> None:
    if kind in OF_IMAGES:
        values = recipe("classification", of_images(kind, images) | {"validation_shards": 0})
    else:
        values = fine_tuning(kind, images, tmp_path / "labelled")
    named = spoil(kind, values, tmp_path / "labelled")
    code, text = doctor(values)
    assert code == 2, text
    assert "problem" in text
    assert named in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*OF_IMAGES, *OF_FINE_TUNING])
def test_what_passes_trains(kind: str, images: Path, tmp_path: Path) -> None:
    if kind in OF_IMAGES:
        data = of_images(kind, images) | {"validation_shards": 0}
        values = recipe("classification", data)
    else:
        values = fine_tuning(kind, images, tmp_path / "labelled")
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(values))
    assert main(["finetune", "--config", str(config), "--folder", str(tmp_path / "run")]) == 0
