import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.data.datasets.coco import CocoSet, run_lengths
from simmim.data.datasets.label_maps import FolderLayout, LabelledFolder
from simmim.data.order.order import Address
from simmim.data.order.source import BadSampleError, DataError
from simmim.data.transforms.image_transforms import ClassMap
from simmim.data.transforms.labels import IGNORED, LabelMapReader
from simmim.data.transforms.segmentation_transforms import (
    EvalSegmentationTransform,
    TrainSegmentationTransform,
    distort,
)
from simmim.data.transforms.settings import LabelMapSettings, SegmentationCropSettings


def reading(**changes: Any) -> LabelMapReader:
    return LabelMapReader(LabelMapSettings(**({"num_classes": 3} | changes)))


def labels_in(folder: LabelledFolder, sample: int = 0, **changes: Any) -> np.ndarray:
    raw = folder.read(0, sample)
    return reading(**changes)(raw.labels, (40, 56, 3))


def replace_labels(scenes: Path, pixels: np.ndarray, name: str = "000") -> None:
    Image.fromarray(pixels).save(scenes / "annotations" / "training" / f"{name}.png")


def test_a_folder_gives_each_image_with_its_labels(scenes: Path) -> None:
    folder = LabelledFolder(scenes, "training")
    assert folder.sizes == [8]
    raw = folder.read(0, 3)
    assert raw.name == folder.name(0, 3) == "training/003"
    labels = labels_in(folder, 3)
    assert set(np.unique(labels)) == {0, 1, 2, IGNORED}
    assert (labels[:, 0] == IGNORED).all()


def test_the_digest_depends_on_the_files(scenes: Path) -> None:
    before = LabelledFolder(scenes, "training").digest
    assert LabelledFolder(scenes, "training").digest == before
    (scenes / "images" / "training" / "007.png").unlink()
    assert LabelledFolder(scenes, "training").digest != before


def test_a_larger_share_contains_every_smaller_one(scenes: Path) -> None:
    folder = LabelledFolder(scenes, "training")
    names = [
        {part.name(0, sample) for sample in range(part.samples)}
        for part in (folder.share(share, seed=1) for share in (0.25, 0.5, 1.0))
    ]
    assert [len(part) for part in names] == [2, 4, 8]
    assert names[0] < names[1] < names[2]


def test_other_names_and_folders_are_found(scenes: Path) -> None:
    expected = LabelledFolder(scenes, "training")
    for kind, name in (("images", "{}_left.png"), ("annotations", "{}_ids.png")):
        for file in sorted((scenes / kind / "training").iterdir()):
            file.rename(scenes / kind / "training" / name.format(file.stem))
    (scenes / "images" / "training").rename(scenes / "training-left")
    town = scenes / "images" / "training" / "town"
    town.parent.mkdir()
    (scenes / "training-left").rename(town)
    (scenes / "labels").mkdir()
    (scenes / "annotations" / "training").rename(scenes / "labels" / "town")
    layout = FolderLayout(annotations="labels", image_suffix="_left", annotation_suffix="_ids")
    found = LabelledFolder(scenes, "training", layout)
    assert found.sizes == expected.sizes
    assert found.name(0, 3) == "training/town/003"
    assert labels_in(found, 3).shape == (40, 56)
    with pytest.raises(
        ValueError, match=r"needs images/{split} and gt, .* data\.layout\.annotations"
    ):
        LabelledFolder(scenes, "training", FolderLayout(annotations="gt"))
    with pytest.raises(ValueError, match=r"/nowhere is not a folder: .* data\.layout\.images"):
        LabelledFolder(scenes, "training", FolderLayout(images="/nowhere"))
    with pytest.raises(ValueError, match=r"end with data\.layout\.image_suffix _right"):
        LabelledFolder(
            scenes, "training", FolderLayout(annotations="labels", image_suffix="_right")
        )


def test_images_and_labels_may_share_a_folder(tmp_path: Path) -> None:
    for name in ("a.png", "a_mask.png", "b.png", "b_mask.png"):
        Image.fromarray(np.zeros((40, 56), dtype=np.uint8)).save(tmp_path / name)
    layout = FolderLayout(images=".", annotations=".", annotation_suffix="_mask")
    found = LabelledFolder(tmp_path, "all", layout)
    assert [found.name(0, place) for place in range(found.samples)] == ["all/a", "all/b"]
    assert labels_in(found, 1).max() == 0
    with pytest.raises(ValueError, match=r"have the same names.*a\.png"):
        LabelledFolder(tmp_path, "all", FolderLayout(images=".", annotations="."))
    for name in ("a", "b", "a_mask", "b_mask"):
        (tmp_path / f"{name}.png").rename(
            tmp_path / f"{name.removesuffix('_mask')}.{'png' if 'mask' in name else 'jpg'}"
        )
    found = LabelledFolder(tmp_path, "all", FolderLayout(images=".", annotations="."))
    assert [found.name(0, place) for place in range(found.samples)] == ["all/a", "all/b"]


def test_a_label_suffix_in_another_folder_does_not_affect_images(scenes: Path) -> None:
    for kind in ("images", "annotations"):
        for file in sorted((scenes / kind / "training").iterdir()):
            file.rename(scenes / kind / "training" / f"{file.stem}_L.png")
    layout = FolderLayout(image_suffix="_L", annotation_suffix="_L")
    assert LabelledFolder(scenes, "training", layout).samples == 8


def test_missing_annotations_are_named(scenes: Path) -> None:
    (scenes / "annotations" / "training" / "002.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 8 images .*002\.png"):
        LabelledFolder(scenes, "training")


def test_an_empty_or_absent_split_is_refused(scenes: Path) -> None:
    with pytest.raises(ValueError, match="images/test is not a folder"):
        LabelledFolder(scenes, "test")
    for kind in ("images", "annotations"):
        (scenes / kind / "test").mkdir()
    with pytest.raises(ValueError, match="contains no images"):
        LabelledFolder(scenes, "test")
    with pytest.raises(
        ValueError, match=r"without \.jpg .* data\.layout\.image_suffix \.jpg: change"
    ):
        LabelledFolder(scenes, "training", FolderLayout(image_suffix=".jpg"))


def test_a_class_out_of_range_is_named(scenes: Path) -> None:
    replace_labels(scenes, np.full((40, 56), 3, dtype=np.uint8))
    folder = LabelledFolder(scenes, "training")
    with pytest.raises(DataError, match=r"contains 3, which is not a class.* 0 to 2"):
        labels_in(folder)
    assert (labels_in(folder, ignore_label=3) == IGNORED).all()
    assert (labels_in(folder, reduce_zero_label=True) == 2).all()


def test_zero_is_no_class_where_labels_are_reduced(scenes: Path) -> None:
    replace_labels(scenes, np.tile(np.arange(4, dtype=np.uint8), (40, 14)))
    found = labels_in(LabelledFolder(scenes, "training"), reduce_zero_label=True)
    assert found[0, :4].tolist() == [IGNORED, 0, 1, 2]


def test_labels_of_another_size_or_in_colours_are_refused(scenes: Path) -> None:
    replace_labels(scenes, np.zeros((40, 40), dtype=np.uint8))
    with pytest.raises(BadSampleError, match="40x40 pixels, the image 56x40"):
        labels_in(LabelledFolder(scenes, "training"))
    replace_labels(scenes, np.zeros((40, 56, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="mode RGB"):
        labels_in(LabelledFolder(scenes, "training"))
    (scenes / "annotations" / "training" / "000.png").write_bytes(b"nothing")
    with pytest.raises(BadSampleError, match="label map is damaged"):
        labels_in(LabelledFolder(scenes, "training"))


def transform(seed: int = 0, side: int = 32, **crop: Any) -> TrainSegmentationTransform:
    data = SegmentationCropSettings(image_size=side, **crop)
    return TrainSegmentationTransform(data=data, seed=seed, labels=reading(), mean=(0.5, 0.5, 0.5))


def test_a_sample_is_a_function_of_seed_epoch_and_name(scenes: Path) -> None:
    folder = LabelledFolder(scenes, "training")

    def seen(epoch: int, seed: int = 0) -> torch.Tensor:
        sample = transform(seed=seed)(folder.read(0, 1), Address(epoch, 0, 1))
        assert isinstance(sample.targets, ClassMap)
        assert sample.targets.classes.shape == sample.image.shape[1:] == (32, 32)
        return torch.cat([sample.image, sample.targets.classes[None]])

    assert torch.equal(seen(0), seen(0))
    assert not torch.equal(seen(0), seen(1))
    assert not torch.equal(seen(0), seen(0, seed=1))


def test_labels_stay_on_their_pixels_through_scale_crop_and_flip(scenes: Path) -> None:
    """The colour of a pixel tells its class, so the two can be compared after any crop."""
    folder = LabelledFolder(scenes, "training")
    for epoch in range(12):
        sample = transform(photometric=False)(folder.read(0, 2), Address(epoch, 0, 2))
        assert isinstance(sample.targets, ClassMap)
        classes = sample.targets.classes
        told = torch.tensor([2, 1, 0])[sample.image.argmax(dim=0)]  # red, green, blue
        known = classes != IGNORED
        assert (told[known] == classes[known]).float().mean() > 0.93


def test_small_images_are_padded_with_the_mean_and_ignored_labels(scenes: Path) -> None:
    folder = LabelledFolder(scenes, "training")
    small = transform(side=64, scale=(0.5, 0.5), photometric=False)
    sample = small(folder.read(0, 0), Address(0, 0, 0))
    assert isinstance(sample.targets, ClassMap)
    assert (sample.targets.classes[20:] == IGNORED).all()
    assert (sample.image[:, 20:] == 127).all()
    assert (sample.targets.classes[:20, 1:27] != IGNORED).any()


def test_evaluation_keeps_labels_and_scales_the_image(scenes: Path) -> None:
    folder = LabelledFolder(scenes, "validation")
    data = SegmentationCropSettings(image_size=32, short_side=20)
    sample = EvalSegmentationTransform(data=data, labels=reading())(
        folder.read(0, 0), Address(0, 0, 0)
    )
    assert isinstance(sample.targets, ClassMap)
    assert sample.image.shape == (3, 20, 28)
    assert np.array_equal(sample.targets.classes.numpy(), labels_in(folder))


def test_targets_survive_the_transfer_from_a_worker() -> None:
    target = ClassMap.of(torch.arange(6, dtype=torch.uint8).view(2, 3))
    again = pickle.loads(pickle.dumps(target))
    assert torch.equal(again.classes, target.classes)
    assert torch.equal(again.present, target.present)


def test_the_classes_of_an_image_are_listed_without_that_of_ignored_pixels() -> None:
    classes = torch.tensor([[7, 255, 0], [254, 7, 7]], dtype=torch.uint8)
    assert ClassMap.of(classes).present.tolist() == [0, 7, 254]
    assert ClassMap.of(torch.full((2, 3), 255, dtype=torch.uint8)).present.tolist() == []


def test_photometric_distortion_has_the_right_bounds_and_rates() -> None:
    image = torch.full((3, 8, 8), 120, dtype=torch.uint8)
    image[0] = 200
    changed = [distort(image, np.random.default_rng(seed)) for seed in range(200)]
    same = sum(torch.equal(one, image) for one in changed)
    assert 4 <= same <= 24  # one in sixteen, but for rounding
    assert {tuple(one.shape) for one in changed} == {(3, 8, 8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("categories"), "categories is missing"),
        (
            lambda content: content["annotations"][1].update(category_id=9),
            "annotation 2 .*category_id 9.*3, 7",
        ),
        (
            lambda content: content["annotations"][0].update(bbox=[1, 2]),
            "annotation 1 has the bbox",
        ),
        (lambda content: content["annotations"][0].update(image_id=99), "image_id 99"),
        (lambda content: content["annotations"][0].update(image_id=[1]), r"image_id \[1\]"),
        (lambda content: content["images"][0].pop("height"), r"images\[0\]\.height is missing"),
        (
            lambda content: content["images"][0].update(height="40"),
            r"images\[0\]\.height is '40', .*integer \(write",
        ),
        (
            lambda content: content["images"][0].update(width=0),
            r"images\[0\]\.width is 0, .* 1 or more",
        ),
        (
            lambda content: content["images"][0].update(file_name=5),
            r"images\[0\]\.file_name is 5, and must be text",
        ),
        (lambda content: content["images"][1].update(id=1), "images has the id 1 more than once"),
        (lambda content: content["categories"][0].pop("name"), r"categories\[0\]\.name is missing"),
        (lambda content: content["categories"][0].update(id=7), "has the id 7 more than once"),
        (
            lambda content: content.update(annotations=None),
            "annotations is null, ",
        ),
        (
            lambda content: content["annotations"].append([1]),
            r"annotations\[\d+\] is \[1\], .* object",
        ),
        (
            lambda content: content["annotations"][2].update(iscrowd="0"),
            "annotation 3 has the iscrowd '0'",
        ),
        (
            lambda content: content["annotations"][2].update(bbox=["1", "2", "3", "4"]),
            "annotation 3 has the bbox",
        ),
        (
            lambda content: content["annotations"][2].update(bbox=[1, 2, float("nan"), 4]),
            "annotation 3 has the bbox",
        ),
        (
            lambda content: (
                (content["annotations"][2].pop("id") and None)
                or content["annotations"][2].update(bbox=None)
            ),
            "annotation at index 2 has the bbox None",
        ),
        (lambda content: content["images"][0].update(file_name="x.png"), r"missing.*x\.png"),
        (lambda content: content["images"].clear() or content["annotations"].clear(), "no images"),
    ],
)
def test_mistakes_in_a_coco_file_are_named(
    scenes: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    file = scenes / "training.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        CocoSet(scenes / "images" / "training", file, only_with_objects=True)


def runs(*counts: Any, rows: int = 40) -> dict[str, Any]:
    return {"size": [rows, 56], "counts": list(counts)}


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 2, 3, 4]], "without a polygon of three points"),
        ([[]], "without a polygon of three points"),
        ([1, 2, 3, 4, 5, 6], "that is not a list of polygons"),
        ([[1, 2, 3, 4, 5, 6, 7]], "that is not a list of polygons"),
        ([[1, 2, 3, 4, 5, float("inf")]], "that is not a list of polygons"),
        ([[1, 2, 3, 4, 5, 1e9]], "with a coordinate beyond 100,000"),
        ("x", "that is neither a list of polygons nor a run-length mask"),
        ({"size": [40, 56]}, "that is neither a list of polygons nor a run-length mask"),
        (runs(0, 80 * 56, rows=80), r"of size \[80, 56\].*\[40, 56\]"),
        (runs(0, 64), "whose counts .* 2240 pixels"),
        (runs(-5, 10, 2235), "whose counts .* 2240 pixels"),
        (runs(100.5, 10.5, 2129), "whose counts .* 2240 pixels"),
        ({"size": [40, 56], "counts": ""}, "whose counts .* 2240 pixels"),
        ({"size": [40, 56], "counts": "0"}, "whose counts .* 2240 pixels"),
        ({"size": [40, 56], "counts": "PP1`"}, "whose counts .* 2240 pixels"),
        ({"size": [40, 56], "counts": "é"}, "whose counts .* 2240 pixels"),
    ],
)
def test_invalid_masks_are_named_if_masks_are_needed(
    scenes: Path, segmentation: Any, message: str
) -> None:
    file = scenes / "training.json"
    content = json.loads(file.read_text())
    content["annotations"][1]["segmentation"] = segmentation
    file.write_text(json.dumps(content))
    found = CocoSet(scenes / "images" / "training", file, only_with_objects=True)
    with pytest.raises(ValueError, match=rf"\(id 2\) of image 2 has a segmentation {message}"):
        found.require_masks()


def test_empty_polygons_are_skipped(scenes: Path) -> None:
    file = scenes / "training.json"
    content = json.loads(file.read_text())
    expected = content["annotations"][1]["segmentation"]
    content["annotations"][1]["segmentation"] = [[1, 2, 3, 4], *expected, []]
    file.write_text(json.dumps(content))
    found = CocoSet(scenes / "images" / "training", file, only_with_objects=True)
    found.require_masks()
    assert found.objects_of(2)[0]["segmentation"] == expected


@pytest.mark.parametrize("seed", range(4))
def test_run_lengths_are_those_that_pycocotools_writes(seed: int) -> None:
    mask = pytest.importorskip("pycocotools.mask", reason="needs simmim[finetune]")
    rng = np.random.default_rng(seed)
    pixels = rng.random((37, 300)) < rng.choice([0.02, 0.5, 0.98])
    pixels[:, 40:200] = seed % 2
    text = mask.encode(np.asfortranarray(pixels.astype(np.uint8)))["counts"].decode()
    column = np.concatenate([[False], pixels.ravel(order="F"), [True]]).astype(int)
    edges = np.flatnonzero(np.diff(column))
    expected = np.diff(np.concatenate([[0], edges, [pixels.size]]))
    found = run_lengths(text)
    assert sum(found) == pixels.size
    assert [one for one in found if one] == [int(one) for one in expected if one]


def test_whole_numbers_may_be_written_as_fractions(scenes: Path) -> None:
    file = scenes / "training.json"
    content = json.loads(file.read_text())
    content["images"][0].update(height=40.0, width=56.0, id=1.0)
    file.write_text(json.dumps(content))
    found = CocoSet(scenes / "images" / "training", file, only_with_objects=True)
    assert repr(found.read(0, 0).size) == "(40, 56)"
    assert repr(found.ground_truth()["images"][0]["height"]) == "40"
    assert len(found.objects_of(1)) == 1


def test_an_absent_or_broken_coco_file_is_named(scenes: Path) -> None:
    images = scenes / "images" / "training"
    with pytest.raises(ValueError, match=r"nowhere\.json does not exist"):
        CocoSet(images, scenes / "nowhere.json", only_with_objects=True)
    (scenes / "training.json").write_text("{")
    with pytest.raises(ValueError, match="COCO file of objects: it is not valid JSON"):
        CocoSet(images, scenes / "training.json", only_with_objects=True)
    with pytest.raises(ValueError, match="is not a folder"):
        CocoSet(scenes / "nowhere", scenes / "training.json", only_with_objects=True)


def test_two_images_never_share_a_label_map(scenes: Path) -> None:
    images = scenes / "images" / "training"
    Image.open(images / "003.png").convert("RGB").save(images / "003.jpg")
    with pytest.raises(ValueError, match="share the label map") as refused:
        LabelledFolder(scenes, "training")
    for name in ("images/training/003.jpg", "images/training/003.png", "annotations/training/003"):
        assert name in str(refused.value)


@pytest.mark.parametrize("crowds", [False, True])
def test_a_coco_file_without_objects_has_nothing_to_measure(scenes: Path, crowds: bool) -> None:
    file = scenes / "validation.json"
    content = json.loads(file.read_text())
    for one in content["annotations"]:
        one["iscrowd"] = 1
    file.write_text(json.dumps(content if crowds else content | {"annotations": []}))
    for only in (False, True):
        with pytest.raises(ValueError, match=r"validation\.json has no images with objects"):
            CocoSet(scenes / "images" / "validation", file, only_with_objects=only)


def test_images_never_share_a_file_of_coco(scenes: Path) -> None:
    file = scenes / "training.json"
    content = json.loads(file.read_text())
    name = f"./{content['images'][0]['file_name']}"
    content["images"].append(content["images"][0] | {"id": 99, "file_name": name})
    content["annotations"].append(content["annotations"][0] | {"image_id": 99})
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="images 1 and 99 share the file"):
        CocoSet(scenes / "images" / "training", file, only_with_objects=True)


@pytest.mark.parametrize(
    ("part", "field"),
    [("annotations", "image_id"), ("annotations", "category_id"), ("images", "id")],
)
def test_an_id_in_quotes_is_shown_as_text(scenes: Path, part: str, field: str) -> None:
    file = scenes / "training.json"
    content = json.loads(file.read_text())
    number = content[part][2][field]
    content[part][2][field] = str(number)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="without quotes") as refused:
        CocoSet(scenes / "images" / "training", file, only_with_objects=True)
    assert re.search(f"{field} (is )?'{number}'", str(refused.value))
