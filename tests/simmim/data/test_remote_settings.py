"""Recipes with shards at URLs: alone, mixed, with statistics and with bad samples."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from data_prep.format.storage import RemotePath
from simmim.data.datasets.mixture import MixedShards, Shards, order_of
from simmim.data.datasets.opening import WeightedShards
from simmim.data.datasets.shards import ShardSet
from simmim.data.loader.bad_samples import BadSamples
from simmim.data.loader.batches import TrainingBatches
from simmim.data.order.source import DataError
from simmim.data.settings import DataSettings, with_statistics
from simmim.export.trial_image import trial_image
from swinv2 import SwinV2Config
from tests.simmim.data.conftest import WriteShards, random_images
from tests.simmim.data.datasets.test_remote import held
from tests.simmim.data.loader.test_batches import TRAIN, equal, joined
from tests.simmim.data.measured import write_measured

URL = "memory://recipes/set"


@pytest.fixture
def folders(write_shards: WriteShards) -> Iterator[list[str]]:
    """Two sets on this machine, the first of which, with a bad sample, is at `URL` too."""
    images = random_images(24)
    images[3] = b"no image at all"
    near = write_shards([8, 10, 6], ("a", "b"), images, name="near")
    write_measured(near, [0.3] * 3, [0.2] * 3)
    other = write_shards([12, 12], ("a", "b"), name="other")
    for path in near.iterdir():
        (RemotePath(URL) / path.name).upload(path)
    yield [str(near), str(other)]
    fsspec.filesystem("memory").store.clear()


def settings_of(first: str, second: str, cache: Path, **options: object) -> DataSettings:
    sets = (WeightedShards(shards=first), WeightedShards(shards=second, weight=2.0))
    return DataSettings(shards=sets, cache_dir=str(cache), validation_shards=0, **options)


def batches(shards: Shards, account: BadSamples, workers: int = 0) -> TrainingBatches:
    return TrainingBatches(
        shards,
        order_of(shards, seed=1, slots=4),
        TRAIN,
        batch_size=4,
        start_position=0,
        end_position=96,
        workers=workers,
        bad_samples=account,
    )


@pytest.mark.parametrize("remote", ["shards", "ranges"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_of_local_and_remote_sets_equals_a_local_one(
    folders: list[str], tmp_path: Path, remote: str, workers: int
) -> None:
    cache = tmp_path / "cache"
    near = settings_of(*folders, cache).open_shards()
    far = settings_of(URL, folders[1], cache, remote=remote).open_shards()
    assert isinstance(far, MixedShards)
    assert far.fetches_whole_shards == (remote == "shards")
    accounts = [BadSamples(max_share=0.5), BadSamples(max_share=0.5)]
    found, promised = joined(batches(far, accounts[0], workers)), joined(batches(near, accounts[1]))
    renamed = tuple(replace(sample, folder=folders[0]) for sample in found.bad)
    assert equal(replace(found, bad=renamed), promised)
    assert accounts[0].bad == accounts[1].bad > 0
    assert {sample.folder for sample in found.bad} == {URL}
    assert (cache.exists() and held(cache) > 0) == (remote == "shards")


def test_sets_that_are_mixed_share_the_cache(folders: list[str], tmp_path: Path) -> None:
    total = sum(shard.bytes for shard in ShardSet(folders[0]).manifest.shards)
    for room, whole in ((2 * total, True), (2 * total - 1, False)):
        data = settings_of(URL, folders[1], tmp_path, cache_bytes=room)
        assert data.open_shards().fetches_whole_shards == whole


@pytest.mark.parametrize("remote", ["shards", "ranges"])
def test_an_unavailable_shard_stops_the_run_and_is_named(
    folders: list[str], tmp_path: Path, remote: str
) -> None:
    far = settings_of(URL, folders[1], tmp_path, remote=remote, attempts=1).open_shards()
    (RemotePath(URL) / "shard-000001.tar").unlink()
    account = BadSamples(max_share=1.0)
    with pytest.raises(DataError, match=rf"{URL}.*shard-000001\.tar"):
        joined(batches(far, account))
    assert all(sample.shard != "shard-000001" for sample in [account.first] if sample)


def test_classes_splits_statistics_and_pictures_of_a_remote_set(
    folders: list[str], tmp_path: Path
) -> None:
    options = {"classes": ("b",), "fraction": 0.5, "cache_dir": str(tmp_path / "cache")}
    near, far = (DataSettings(shards=place, **options) for place in (folders[0], URL))
    assert far.split_shards()[0].digest == near.split_shards()[0].digest
    measured = with_statistics(DataSettings(shards=URL, mean="measured", std="measured"))
    assert measured.normalisation == ((0.3,) * 3, (0.2,) * 3)
    (RemotePath(URL) / "statistics.json").unlink()
    with pytest.raises(ValueError, match=f"data-prep info {URL} --statistics"):
        with_statistics(DataSettings(shards=URL, mean="measured"))
    config = SwinV2Config(embed_dim=8, depths=(1,), num_heads=(1,), image_size=16)
    trial = trial_image(config, *measured.normalisation, URL)
    assert trial.origin == f"{ShardSet(URL).read(0, 0).name} of {URL}"


@pytest.mark.usefixtures("folders")
def test_a_cache_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = DataSettings(shards=URL, cache_dir=str(tmp_path / "file" / "cache"), remote="shards")
    assert data.open_shards().samples == 24
    with pytest.raises(DataError, match=r"data\.cache_dir"):
        data.open_shards().read(0, 0)
