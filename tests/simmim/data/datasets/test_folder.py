"""Folders of images behave like shards: order, labels, selections and bad samples."""

import os
import pickle
import shutil
import threading
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

import data_prep.cli
from data_prep.format.manifest import ManifestError
from simmim.data.datasets import folder as image_folder
from simmim.data.datasets.folder import ImageFolder, open_folder
from simmim.data.datasets.listing import list_images
from simmim.data.datasets.mixture import MixedShards, Shards
from simmim.data.datasets.opening import WeightedShards, open_sets
from simmim.data.datasets.shards import ShardSet
from simmim.data.loader.bad_samples import BadSamples
from simmim.data.loader.batch import Batch
from simmim.data.loader.batches import TrainingBatches, evaluation_batches
from simmim.data.order.order import SampleOrder
from simmim.data.order.source import DataError
from simmim.environment import process_environment
from tests.simmim.data.conftest import WriteShards, encode
from tests.simmim.data.loader.test_batches import EVALUATE, TRAIN, equal, joined

CLASSES = ("cat", "dog", "eel")


def write_folder(folder: Path, count: int = 60, seed: int = 0) -> Path:
    """Write images of three classes; a class each third."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        place = folder / CLASSES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)
        (place / f"{number:03d}.png").write_bytes(encode(pixels))
    return folder


def everything(shards: Shards) -> list[tuple[bytes, int | None]]:
    samples = [
        shards.read(shard, sample)
        for shard, size in enumerate(shards.sizes)
        for sample in range(size)
    ]
    return [(sample.image, sample.label) for sample in samples]


def test_a_folder_equals_the_shards_made_of_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    assert data_prep.cli.main(["shard", str(folder), str(tmp_path / "shards")]) == 0
    images, shards = open_sets(str(folder)), open_sets(str(tmp_path / "shards"))
    assert isinstance(images, ImageFolder)
    assert isinstance(shards, ShardSet)
    assert images.classes == shards.classes == CLASSES
    assert Counter(everything(images)) == Counter(everything(shards))
    for shard, size in enumerate(images.sizes):
        samples = [images.read(shard, sample) for sample in range(size)]
        assert [sample.label for sample in samples] == images.labels(shard).tolist()
        for row, sample in enumerate(samples):
            assert sample.name == images.name(shard, row)
            assert (folder / sample.name).read_bytes() == sample.image
            assert sample.extension == "png"
            assert sample.shard_name == CLASSES[sample.label or 0]


def test_the_stream_does_not_depend_on_the_path_or_history_of_a_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    moved = tmp_path / "moved"
    for file in sorted(folder.rglob("*.png"), reverse=True):
        place = moved / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    first, second = open_folder(folder), open_folder(moved)
    assert first.digest == second.digest
    assert everything(first) == everything(second)
    assert [first.name(1, row) for row in range(4)] == [second.name(1, row) for row in range(4)]
    copy = pickle.loads(pickle.dumps(first))
    assert everything(copy) == everything(first)
    assert copy.digest == first.digest


def test_the_digest_changes_with_the_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    file = folder / "cat" / "000.png"
    content = file.read_bytes()
    digests = [open_folder(folder).digest]
    file.write_bytes(content + b"more")
    digests.append(open_folder(folder).digest)
    file.unlink()
    digests.append(open_folder(folder).digest)
    (folder / "dog" / "000.png").write_bytes(content)
    digests.append(open_folder(folder).digest)
    (folder / "dog" / "000.png").rename(file)
    assert open_folder(folder).digest == digests[0]
    training, validation = open_folder(folder).split(1)
    digests += [training.digest, validation.digest, training.share(0.5, seed=0).digest]
    assert len(set(digests)) == len(digests)


def test_parts_are_even_and_the_last_is_drawn_from_all_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "images", 300)
    assert open_folder(folder).sizes == [37, 38, 37, 38] * 2
    monkeypatch.setattr(image_folder, "SHARD_FILES", 20)
    images = open_folder(folder)
    assert images.sizes == [20] * 15
    training, validation = images.split(3)
    assert np.bincount(np.concatenate([validation.labels(part) for part in range(3)])).min() > 10
    assert set(everything(training)) | set(everything(validation)) == set(everything(images))
    assert len(training) + len(validation) == 300
    few = write_folder(tmp_path / "few", 3)
    assert open_folder(few).sizes == [1, 1, 1]


def test_selections_by_share_and_class(tmp_path: Path) -> None:
    images = open_folder(write_folder(tmp_path / "images"))
    tenth, half = images.share(0.1, seed=1), images.share(0.5, seed=1)
    assert set(everything(tenth)) < set(everything(half)) < set(everything(images))
    assert Counter(label for _, label in everything(tenth)) == {0: 2, 1: 2, 2: 2}
    chosen = images.only_classes(["eel", "cat"])
    assert chosen.classes == ("cat", "eel")
    assert Counter(label for _, label in everything(chosen)) == {0: 20, 1: 20}
    with pytest.raises(ValueError, match=r"the images in .* have no class fox; .*cat"):
        images.only_classes(["fox"])


@pytest.mark.parametrize(("workers", "world"), [(2, 1), (0, 2), (0, 4)])
def test_neither_workers_nor_ranks_change_the_batches(
    tmp_path: Path, workers: int, world: int
) -> None:
    images = open_folder(write_folder(tmp_path / "images"))
    order = SampleOrder(images.sizes, seed=1, slots=4)

    def batches(rank: int, world: int, workers: int) -> list[Batch]:
        return list(
            TrainingBatches(
                images,
                order,
                TRAIN,
                batch_size=8,
                start_position=16,
                end_position=96,
                rank=rank,
                world=world,
                workers=workers,
            )
        )

    alone = batches(0, 1, 0)
    parts = [batches(rank, world, workers) for rank in range(world)]
    together = chain(*zip(*parts, strict=True))
    assert equal(joined(together), joined(alone))


def test_an_evaluation_sees_every_image_once(tmp_path: Path) -> None:
    images = open_folder(write_folder(tmp_path / "images"))
    labels = [
        int(label)
        for rank in range(2)
        for batch in evaluation_batches(images, EVALUATE, batch_size=7, rank=rank, world=2)
        for label in batch.labels  # type: ignore[union-attr]
    ]
    assert Counter(labels) == {0: 20, 1: 20, 2: 20}


def test_faulty_files_are_replaced_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_folder, "MAX_FILE_BYTES", 10_000)
    folder = write_folder(tmp_path / "images", 200)
    (folder / "cat" / "000.png").write_bytes(b"")
    (folder / "dog" / "001.png").write_bytes((folder / "dog" / "001.png").read_bytes()[:100])
    (folder / "eel" / "002.png").write_bytes(b"no image")
    (folder / "cat" / "huge.png").write_bytes(bytes(10_001))
    (folder / "cat" / "link.png").symlink_to("nowhere.png")
    (folder / "cat" / "folder.png").symlink_to(folder / "dog")
    images = open_folder(folder)
    (folder / "dog" / "004.png").unlink()  # since it was listed
    faulty = {
        "cat/000.png": "damaged",
        "dog/001.png": "damaged",
        "eel/002.png": "damaged",
        "cat/huge.png": "more than 10,000 bytes",
        "cat/link.png": "cannot be read: No such file",
        "cat/folder.png": "cannot be read: Is a directory",
        "dog/004.png": "cannot be read: No such file",
    }
    order = SampleOrder(images.sizes, seed=0, slots=1)
    account = BadSamples(max_share=1.0)
    account.write_to(tmp_path / "bad_samples.jsonl")
    batches = TrainingBatches(
        images,
        order,
        TRAIN,
        batch_size=1,
        start_position=0,
        end_position=images.samples,
        bad_samples=account,
    )
    found = [sample for batch in batches for sample in batch.bad]
    assert {f"{sample.shard}/{sample.key}" for sample in found} == set(faulty)
    for sample in found:
        assert sample.kind == "replaced"
        assert sample.folder == str(folder)
        assert faulty[f"{sample.shard}/{sample.key}"] in sample.reason
    assert account.bad >= len(faulty)
    assert account.asked == images.samples
    assert len((tmp_path / "bad_samples.jsonl").read_text().splitlines()) == len(faulty)
    skipped = BadSamples(max_share=1.0)
    seen = sum(map(len, evaluation_batches(images, EVALUATE, batch_size=8, bad_samples=skipped)))
    assert seen + skipped.bad == images.samples
    assert skipped.bad == len(faulty)
    with pytest.raises(DataError, match=r"could not be read, more than data\.max_bad_share 0"):
        list(evaluation_batches(images, EVALUATE, batch_size=8, bad_samples=BadSamples(0.0)))


def test_reads_of_a_missing_folder_are_retried(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    expected = open_folder(folder).read(0, 0).image
    away = folder.rename(tmp_path / "away")
    images = ImageFolder(folder, list_images(away), attempts=3)
    with pytest.raises(DataError, match=r"\.png cannot be read .*after 1 attempt"):
        _ = ImageFolder(folder, list_images(away)).read(0, 0).image
    back = threading.Timer(0.05, away.rename, [folder])
    back.start()
    began = time.perf_counter()
    assert images.read(0, 0).image == expected
    assert time.perf_counter() - began > 0.05
    back.join()


def test_images_directly_in_the_folder_have_no_class(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", 6)
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in folder.rglob("*.png"):
        shutil.copyfile(file, flat / file.name)
    images = open_folder(flat)
    assert images.classes == ()
    assert images.read(0, 0).label is None
    assert images.read(0, 0).name == f"./{images.read(0, 0).key}"
    assert (flat / images.name(0, 0)).is_file()
    with pytest.raises(ValueError, match=r"have 0 classes.*at least 2"):
        images.require_labels()
    shutil.copyfile(flat / "000.png", folder / "stray.png")
    mixed = open_folder(folder)
    assert mixed.classes == CLASSES
    assert Counter(label for _, label in everything(mixed)) == {0: 2, 1: 2, 2: 2, None: 1}


def test_splits_are_not_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 6)
    write_folder(tmp_path / "val", 6)
    images = open_folder(tmp_path)
    with pytest.raises(ValueError, match=r"train and val.*splits"):
        images.require_labels()
    open_folder(tmp_path / "train").require_labels()


def test_file_names_that_are_not_text(tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"caf\xe9")
    place.mkdir()
    for number in range(3):
        (place / os.fsdecode(b"\xff%d.png" % number)).write_bytes(b"no image")
    images = open_folder(tmp_path)
    assert images.classes == ("caf\\xe9",)
    sample = images.read(0, 0)
    assert sample.name.startswith("caf\\xe9/\\xff")
    assert sample.image == b"no image"
    account = BadSamples(max_share=1.0)
    account.write_to(tmp_path / "bad_samples.jsonl")
    assert not list(evaluation_batches(images, EVALUATE, batch_size=3, bad_samples=account))
    assert (tmp_path / "bad_samples.jsonl").read_text().count("caf\\\\xe9") == 3


def test_skipped_entries_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "images", 6)
    open_folder(folder)
    assert capsys.readouterr().err == ""
    (folder / "classes.txt").write_text("cat")
    (folder / "cat" / ".DS_Store").write_text("")
    (folder / "fox").mkdir()
    open_folder(folder)
    assert capsys.readouterr().err == (
        f"{folder}: 6 images; skipped: .txt (1), hidden (1); folders without images (1): fox\n"
        "  .txt: classes.txt\n  hidden: cat/.DS_Store\n"
    )
    monkeypatch.setenv("RANK", "1")
    process_environment.cache_clear()
    open_folder(folder)
    assert capsys.readouterr().err == ""


def test_folders_without_shards_or_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="does not exist"):
        open_sets(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty contains neither shards nor images"):
        open_sets(str(tmp_path / "empty"))
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a" / "b.txt").write_text("")
    with pytest.raises(DataError, match=r"skipped: \.txt \(1\); folders without images \(1\): a"):
        open_sets(str(tmp_path / "texts"))
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(b"")
    (tmp_path / "tars" / "preview.png").write_bytes(b"")
    with pytest.raises(ManifestError, match="data-prep index"):
        open_sets(str(tmp_path / "tars"))


def test_a_folder_and_shards_are_mixed(write_shards: WriteShards, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    shards = write_shards([20, 20], CLASSES)
    mixed = open_sets(
        (WeightedShards(shards=str(folder), weight=2.0), WeightedShards(shards=str(shards)))
    )
    assert isinstance(mixed, MixedShards)
    assert mixed.classes == CLASSES
    assert mixed.samples == 100
    assert mixed.folder_of(0) == str(folder)
    assert mixed.folder_of(len(mixed.sizes) - 1) == str(shards)
