"""Lists of classes reach the batches, from shards with members in any order and from folders."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from webdataset.tariterators import group_by_keys, tar_file_expander

import data_prep.cli
from simmim.data.datasets.folder import open_folder
from simmim.data.datasets.mixture import Shards
from simmim.data.datasets.shards import RawSample, ShardSet
from simmim.data.loader.batches import evaluation_batches
from simmim.data.order.source import BadSampleError
from simmim.data.transforms.image_transforms import EvalTransform
from simmim.data.transforms.labels import MultiLabelReader
from simmim.data.transforms.settings import MultiLabelSettings
from tests.simmim.data.conftest import encode, random_images

NAMES = ("cat", "dog", "eel", "fox")
SEVERAL = MultiLabelReader(MultiLabelSettings(classes=NAMES))


def sample(about: object) -> RawSample:
    text = json.dumps(about).encode() if not isinstance(about, bytes) else about
    return RawSample("key", b"", None, "shard", "png", lambda: text)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ([0, 2], "1010"),
        ([], "0000"),
        (["fox", "cat"], "1001"),
        (["fox", 1, "1"], "0101"),
        (3, "0001"),
        ("eel", "0010"),
        ("cat|fox", "1001"),
        (" 1, 2;3 ", "0111"),
        ("", "0000"),
    ],
)
def test_lists_of_every_form(listed: object, expected: str) -> None:
    found = SEVERAL(sample({"labels": listed}))
    assert found.dtype == torch.bool
    assert "".join(str(int(one)) for one in found) == expected


@pytest.mark.parametrize(
    ("about", "part"),
    [
        (b"no JSON", "has no field 'labels'"),
        ({"label": [1]}, "has no field 'labels'"),
        ([1], "has no field 'labels'"),
        ({"labels": [1, 4]}, "lists 4"),
        ({"labels": [-1]}, "lists -1"),
        ({"labels": [True]}, "lists True"),
        ({"labels": "cow"}, "lists 'cow'"),
        ({"labels": [1.5]}, "lists 1.5"),
        ({"labels": [[1]]}, "lists"),
        ({"labels": None}, "lists None"),
    ],
)
def test_other_lists_are_refused(about: object, part: str) -> None:
    with pytest.raises(BadSampleError, match=part):
        SEVERAL(sample(about))


def test_a_list_of_classes_goes_from_csv_to_batch(tmp_path: Path) -> None:
    with (tmp_path / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "labels"])
        for number, image in enumerate(random_images(20)):
            (tmp_path / f"{number}.png").write_bytes(image)
            rows.writerow([f"{number}.png", f"{number % 4} {(number + 1) % 4}"])
    assert data_prep.cli.main(["shard", str(tmp_path / "list.csv"), str(tmp_path / "out")]) == 0
    shards = ShardSet(tmp_path / "out")
    transform = EvalTransform(size=(8, 8), label=SEVERAL)
    batches = list(evaluation_batches(shards, transform, batch_size=7, workers=1))
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    assert labels.shape == (20, 4)
    assert labels.dtype == torch.bool
    numbers = [int(path_of(shards, *place).removesuffix(".png")) for place in places(shards)]
    for row, number in zip(labels, numbers, strict=True):
        assert set(torch.nonzero(row).flatten().tolist()) == {number % 4, (number + 1) % 4}


def places(shards: Shards) -> list[tuple[int, int]]:
    return [(shard, row) for shard, size in enumerate(shards.sizes) for row in range(size)]


def path_of(shards: Shards, shard: int, row: int) -> str:
    found = shards.read(shard, row).about
    assert found is not None
    return str(json.loads(found)["path"])


def test_the_json_member_is_found_in_any_position(tmp_path: Path) -> None:
    """Before the image or after it, among others, under long names, or not at all."""
    rng = np.random.default_rng(0)
    tar = tmp_path / "odd.tar"
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as writer:
        for number, image in enumerate(random_images(30)):
            key = f"{number:03d}" + "long" * (40 if number % 5 == 0 else 0)
            members = {"png": image, "txt": bytes(number * 100), "cls": b"1"}
            if number % 3:
                members["json"] = json.dumps({"number": number, "pad": "x" * number * 50}).encode()
            for extension in rng.permutation(sorted(members)).tolist():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(members[extension])
                writer.addfile(entry, io.BytesIO(members[extension]))
    assert data_prep.cli.main(["index", str(tmp_path)]) == 0
    shards = ShardSet(tmp_path)
    with tar.open("rb") as file:
        expected = list(group_by_keys(tar_file_expander([{"url": "odd", "stream": file}])))
    assert len(expected) == shards.samples == 30
    for (shard, row), told in zip(places(shards), expected, strict=True):
        assert shards.read(shard, row).image == told["png"]
        found = shards.read(shard, row).about
        assert found == told.get("json")


def test_a_file_of_json_beside_each_image(tmp_path: Path) -> None:
    pixels = np.zeros((9, 9, 3), dtype=np.uint8)
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(encode(pixels))
        if number != 4:
            (tmp_path / f"{number}.json").write_text(json.dumps({"labels": [number % 3]}))
    images = open_folder(tmp_path)
    transform = EvalTransform(size=(8, 8), label=SEVERAL)
    batches = evaluation_batches(images, transform, batch_size=3)
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    assert labels.sum(0).tolist() == [2, 1, 2, 0]
    assert batches.bad_samples.first is not None
    assert batches.bad_samples.first.key == "4.png"
    assert "no JSON file" in batches.bad_samples.first.reason
