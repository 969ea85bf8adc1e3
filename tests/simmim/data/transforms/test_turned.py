"""Labels of images that Exif turns: upright ones fit, those of the stored pixels do not."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simmim.data.datasets.coco import CocoSet
from simmim.data.datasets.label_maps import LabelledFolder
from simmim.data.loader.bad_samples import BadSamples
from simmim.data.loader.batch import BatchDataset
from simmim.data.order.order import Address
from simmim.data.order.source import BadSampleError, DataError
from simmim.data.transforms.detection_transforms import (
    EvalDetectionTransform,
    TrainDetectionTransform,
)
from simmim.data.transforms.image_transforms import ClassMap, Sample
from simmim.data.transforms.labels import LabelMapReader
from simmim.data.transforms.segmentation_transforms import (
    EvalSegmentationTransform,
    TrainSegmentationTransform,
)
from simmim.data.transforms.settings import (
    DetectionCropSettings,
    LabelMapSettings,
    SegmentationCropSettings,
)
from simmim.data.transforms.turned import orientation_in

UPRIGHT = np.zeros((24, 40), dtype=np.uint8)
UPRIGHT[:8, :10] = 1
"""Class of each pixel of the upright image; an object in the upper left corner."""
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: UPRIGHT.T[::-1],
    7: UPRIGHT.T[::-1, ::-1],
    8: UPRIGHT.T[:, ::-1],
}
"""How pixels of each orientation are stored, by the Exif standard."""
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")


def save(classes: np.ndarray, orientation: int, path: Path, form: str = "PNG") -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.ascontiguousarray(np.stack([200 * classes + 20] * 3, axis=2))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, form, exif=exif)


def label_maps(tmp_path: Path, orientation: int, labels: np.ndarray, form: str = "PNG") -> Any:
    """Return the only sample: an image of this orientation, and labels."""
    save(STORED[orientation], orientation, tmp_path / f"images/a/1.{form.lower()}", form)
    file = tmp_path / "annotations/a/1.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(labels)).save(file)
    return LabelledFolder(tmp_path, "a").read(0, 0)


def objects(tmp_path: Path, orientation: int, labels: np.ndarray) -> Any:
    """Return the only sample: an image of this orientation, and the box of its object."""
    save(STORED[orientation], orientation, tmp_path / "1.png")
    rows, columns = (np.flatnonzero(labels.any(axis=axis)) for axis in (1, 0))
    box = [columns[0], rows[0], len(columns), len(rows)]
    image = {"id": 1, "file_name": "1.png", "height": len(labels), "width": len(labels[0])}
    one = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [int(value) for value in box]}
    content = {"images": [image], "annotations": [one], "categories": [{"id": 1, "name": "it"}]}
    (tmp_path / "objects.json").write_text(json.dumps(content))
    return CocoSet(tmp_path, tmp_path / "objects.json", only_with_objects=True).read(0, 0)


CROP = SegmentationCropSettings(image_size=40, photometric=False)


def segmented(raw: Any, *, training: bool) -> Sample:
    reader = LabelMapReader(LabelMapSettings(num_classes=2))
    if training:
        transform = TrainSegmentationTransform(data=CROP, seed=0, labels=reader, mean=(0.5,) * 3)
        return transform(raw, Address(0, 0, 0))
    return EvalSegmentationTransform(data=CROP, labels=reader)(raw, Address(0, 0, 0))


def detected(raw: Any, *, training: bool) -> Sample:
    if training:
        transform = TrainDetectionTransform(
            data=DetectionCropSettings(image_size=40),
            seed=0,
            mean=(0.5,) * 3,
            labels={1: 0},
            masks=False,
        )
        return transform(raw, Address(0, 0, 0))
    return EvalDetectionTransform(data=CROP, mean=(0.5,) * 3)(raw, Address(0, 0, 0))


@pytest.mark.parametrize("orientation", list(STORED))
@pytest.mark.parametrize("form", FORMATS)
def test_upright_labels_fit_upright_pixels(tmp_path: Path, orientation: int, form: str) -> None:
    raw = label_maps(tmp_path, orientation, UPRIGHT, form)
    assert orientation_in(raw.image) == orientation
    sample = segmented(raw, training=False)
    assert isinstance(sample.targets, ClassMap)
    bright = sample.image[0].numpy() > 128
    assert (bright == (sample.targets.classes.numpy() == 1)).mean() > 0.95  # JPEG blurs edges
    assert (sample.turned is not None) == (orientation in {2, 3, 4})


@pytest.mark.parametrize("orientation", list(STORED))
def test_label_maps_are_turned_by_their_own_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(file, "PNG", exif=exif)
    reader = LabelMapReader(LabelMapSettings(num_classes=2))
    assert np.array_equal(reader(file.getvalue(), UPRIGHT.shape), UPRIGHT)
    assert np.array_equal(reader.read(file.getvalue()), UPRIGHT)


@pytest.mark.parametrize("orientation", [2, 3, 4])
@pytest.mark.parametrize("training", [False, True])
def test_where_sizes_cannot_tell_the_image_is_noted(
    tmp_path: Path, orientation: int, training: bool
) -> None:
    sample = segmented(label_maps(tmp_path, orientation, STORED[orientation]), training=training)
    assert f"orientation is {orientation}" in str(sample.turned)
    sample = detected(objects(tmp_path / "coco", orientation, UPRIGHT), training=training)
    assert f"orientation is {orientation}" in str(sample.turned)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("training", [False, True])
def test_labels_of_sideways_pixels_are_refused(
    tmp_path: Path, orientation: int, training: bool
) -> None:
    raw = label_maps(tmp_path, orientation, STORED[orientation])
    for make, sample in (
        (segmented, raw),
        (detected, objects(tmp_path / "coco", orientation, STORED[orientation])),
    ):
        with pytest.raises(DataError, match=f"orientation is {orientation}.*upright") as refused:
            make(sample, training=training)
        assert not isinstance(refused.value, BadSampleError)  # not replaced: there are more
        assert "24x40" in str(refused.value)
        assert "40x24" in str(refused.value)
    assert (
        detected(objects(tmp_path / "up", orientation, UPRIGHT), training=training).turned is None
    )


def test_squares_are_noted_for_every_orientation(tmp_path: Path) -> None:
    square = np.eye(24, dtype=np.uint8)
    for orientation in range(2, 9):
        save(square, orientation, tmp_path / f"{orientation}" / "images/a/1.png")
        labels = tmp_path / f"{orientation}" / "annotations/a/1.png"
        labels.parent.mkdir(parents=True)
        Image.fromarray(square).save(labels)
        raw = LabelledFolder(tmp_path / f"{orientation}", "a").read(0, 0)
        assert segmented(raw, training=False).turned is not None


def test_another_size_is_no_matter_of_orientation(tmp_path: Path) -> None:
    for orientation in (1, 6):
        raw = label_maps(tmp_path, orientation, np.zeros((9, 7), dtype=np.uint8))
        with pytest.raises(BadSampleError, match="7x9 pixels, the image 40x24"):
            segmented(raw, training=False)


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff"])
def test_what_is_no_image_has_no_orientation(data: bytes) -> None:
    assert orientation_in(data) == 1


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_invalid_orientation_is_none(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    file = io.BytesIO()
    Image.fromarray(UPRIGHT).save(file, "JPEG", exif=exif)
    assert orientation_in(file.getvalue()) == 1


def test_a_turned_image_is_listed_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label_maps(tmp_path, 3, UPRIGHT)
    transform = EvalSegmentationTransform(
        data=CROP, labels=LabelMapReader(LabelMapSettings(num_classes=2))
    )
    batch = BatchDataset(LabelledFolder(tmp_path, "a"), transform, replacing=False)[
        [Address(0, 0, 0)]
    ]
    bad = BadSamples(max_share=0.0)
    bad.write_to(tmp_path / "bad_samples.jsonl")
    for _ in range(2):
        bad.record(1, batch.bad)  # type: ignore[union-attr]
    (line,) = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["kind"] == "turned"
    assert bad.turned == 2
    assert bad.bad == 0
    said = capsys.readouterr().err
    assert said.count("WARNING") == 1
    assert "orientation is 3" in said
