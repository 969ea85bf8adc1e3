"""Uploads next to what is on the store already: the same set, others, and what was lost."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_prep.format.manifest import ManifestError, read_manifest
from data_prep.format.storage import RemotePath, StorageError
from data_prep.write.finalize import TooManyRejectedError
from data_prep.write.options import RunOptions, ShardOptions
from data_prep.write.output_dir import OutputDirError
from data_prep.write.progress import Progress
from tests.data_prep.write.stores import (
    EACH,
    SHUFFLED,
    Death,
    held,
    local,
    ship,
    stop_after,
)


def test_a_complete_prefix_is_recognised_without_its_staging_folder(
    image_folder: Path, store: RemotePath, tmp_path: Path
) -> None:
    ship(image_folder, store, tmp_path / "staging", SHUFFLED)
    (store / "statistics.json").write_bytes(b"{}")
    (store / "uploading.txt").write_bytes(b"of a run that was killed as it ended")
    before, ticks = held(store), list[int]()
    for staging in ("staging", "elsewhere"):
        built = ship(
            image_folder, store, tmp_path / staging, SHUFFLED, progress=Progress(tick=ticks.append)
        )
        assert (built.was_complete, built.found) == (True, 24)
        assert not (tmp_path / staging).exists()
    assert not ticks, "nothing is made again"
    del before["uploading.txt"]
    assert held(store) == before
    with pytest.raises(OutputDirError, match=r"memory://.*seed 0 \(now 1\).*--overwrite"):
        ship(image_folder, store, tmp_path / "staging", ShardOptions(samples_per_shard=3, seed=1))
    (image_folder / "train/cat/0.jpg").unlink()
    with pytest.raises(OutputDirError, match=r"other files of the same source.*--overwrite"):
        ship(image_folder, store, tmp_path / "staging", SHUFFLED)
    assert held(store) == before
    ship(image_folder, store, tmp_path / "staging", SHUFFLED, overwrite=True)
    assert held(store) == local(image_folder, tmp_path / "local", SHUFFLED)
    (store / "shard-000002.tar").unlink()
    with pytest.raises(ManifestError, match=r"lacks shard-000002\.tar.*--overwrite"):
        ship(image_folder, store, tmp_path / "staging", SHUFFLED)


def test_shards_of_another_run_are_refused_or_replaced(
    image_folder: Path, store: RemotePath, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        ship(image_folder, store, tmp_path / "here", SHUFFLED, progress=stop_after(4))
    before = held(store)
    assert "shard-000001.tar" in before
    with pytest.raises(ManifestError, match="is not finished"):
        read_manifest(store)
    with pytest.raises(StorageError, match=r"unfinished shards of another run.*--overwrite"):
        ship(image_folder, store, tmp_path / "there", SHUFFLED)
    with pytest.raises(OutputDirError, match=r"memory://.*interrupted run.*seed 0 \(now 1\)"):
        ship(image_folder, store, tmp_path / "here", ShardOptions(samples_per_shard=3, seed=1))
    assert held(store) == before
    assert not (tmp_path / "there").exists()
    with pytest.raises(KeyboardInterrupt):
        ship(
            image_folder,
            store,
            tmp_path / "there",
            SHUFFLED,
            overwrite=True,
            progress=stop_after(3),
        )
    with pytest.raises(StorageError, match="unfinished shards of another run"):
        ship(image_folder, store, tmp_path / "here", SHUFFLED)
    ship(image_folder, store, tmp_path / "there", SHUFFLED)
    assert held(store) == local(image_folder, tmp_path / "local", SHUFFLED)


def test_a_run_stops_if_another_takes_its_prefix(
    image_folder: Path, store: RemotePath, tmp_path: Path
) -> None:
    def take(report: Any) -> None:
        if report.number == 3:
            ship(image_folder, store, tmp_path / "there", EACH, overwrite=True)

    with pytest.raises(StorageError, match="another run"):
        ship(image_folder, store, tmp_path / "here", EACH, progress=Progress(finished=take))
    assert held(store) == local(image_folder, tmp_path / "local", EACH)


def test_objects_that_appear_meanwhile_are_left_alone(
    image_folder: Path, store: RemotePath, tmp_path: Path
) -> None:
    progress = Progress(finished=lambda _: (store / "notes.txt").write_bytes(b"mine"))
    with pytest.raises(StorageError, match=r"other files.*notes\.txt"):
        ship(image_folder, store, tmp_path / "staging", SHUFFLED, progress=progress)
    assert (store / "notes.txt").read_bytes() == b"mine"
    (store / "notes.txt").unlink()
    ship(image_folder, store, tmp_path / "staging", SHUFFLED)
    assert held(store) == local(image_folder, tmp_path / "local", SHUFFLED)


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_objects_are_left_alone(
    overwrite: bool, image_folder: Path, store: RemotePath, tmp_path: Path
) -> None:
    (store / "shard-000000.tar").write_bytes(b"mine")
    for name in ("notes.txt", "folder/a.jpg"):
        (store / name).write_bytes(b"mine")
        with pytest.raises(StorageError, match=f"other files.*{name.split('/')[0]}"):
            ship(image_folder, store, tmp_path / "staging", EACH, overwrite=overwrite)
        (store / name).unlink()
        fsspec.filesystem("memory").pseudo_dirs[:] = [""]
    assert held(store) == {"shard-000000.tar": b"mine"}
    values = {"format": "simmim-shards", "version": 1, "samples": 1, "rejected": 0, "classes": []}
    shard = {"name": "shard-000000.tar", "samples": 1, "bytes": 4, "sha256": "0" * 64}
    values |= {"options": {}, "fingerprint": "", "shards": [{**shard, "index": "a.npy"}]}
    (store / "manifest.json").write_bytes(json.dumps(values).encode())
    with pytest.raises(StorageError, match="did not write"):
        ship(image_folder, store, tmp_path / "staging", EACH, overwrite=overwrite)
    assert (store / "shard-000000.tar").read_bytes() == b"mine"
    assert not (tmp_path / "staging").exists()


def test_too_many_rejected_publish_nothing_and_keep_the_work(
    gappy: Path, store: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TooManyRejectedError):
        ship(gappy, store, tmp_path / "s", EACH, run=RunOptions(max_rejected=0.1))
    with pytest.raises(ManifestError):
        read_manifest(store)
    assert len(list(store.glob("*.tar"))) == 21
    death = Death(monkeypatch)
    ship(gappy, store, tmp_path / "s", EACH, run=RunOptions(max_rejected=0.2))
    assert death.sent == ["rejected.jsonl"]
    assert held(store) == local(gappy, tmp_path / "local", EACH)


def test_a_set_is_replaced_only_by_usable_images(
    image_folder: Path, store: RemotePath, tmp_path: Path
) -> None:
    ship(image_folder, store, tmp_path / "staging", SHUFFLED)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"some text")
    before = held(store)
    with pytest.raises(ValueError, match=r"a\.jpg: it is not an image"):
        ship(tmp_path / "bad", store, tmp_path / "staging", SHUFFLED, overwrite=True)
    assert held(store) == before
    assert not (tmp_path / "staging").exists()


@pytest.mark.parametrize("options", [EACH, SHUFFLED], ids=["streamed", "shuffled"])
def test_shards_that_the_store_lost_are_written_again(
    options: ShardOptions, image_folder: Path, store: RemotePath, tmp_path: Path
) -> None:
    whole = local(image_folder, tmp_path / "local", options)
    with pytest.raises(KeyboardInterrupt):
        ship(image_folder, store, tmp_path / "staging", options, progress=stop_after(7))
    (store / "shard-000001.tar").unlink()
    (store / "shard-000003.index.npy").unlink()
    (store / "shard-000002.tar").write_bytes(whole["shard-000002.tar"][:-512])
    made: list[int] = []
    progress = Progress(finished=lambda report: made.append(report.number))
    ship(image_folder, store, tmp_path / "staging", options, progress=progress)
    assert held(store) == whole
    assert sorted(made)[:4] == [1, 2, 3, 7]


def test_shifted_shard_numbers_are_detected(
    image_folder: Path, store: RemotePath, tmp_path: Path
) -> None:
    """Where the source changes, --overwrite keeps what still fits, if it is where it belongs."""
    same = (image_folder / "train/cat/0.jpg").read_bytes()
    for path in image_folder.rglob("*.jpg"):  # of one length each, so that no length tells
        path.write_bytes(same)
    with pytest.raises(KeyboardInterrupt):
        ship(image_folder, store, tmp_path / "staging", EACH, progress=stop_after(12))
    (image_folder / "test/cat/2.jpg").write_bytes(b"some text")
    with pytest.raises(StorageError, match="Run the same command again"):
        ship(image_folder, store, tmp_path / "staging", EACH, overwrite=True)
    with pytest.raises(ManifestError):
        read_manifest(store)
    ship(image_folder, store, tmp_path / "staging", EACH, overwrite=True)
    assert held(store) == local(image_folder, tmp_path / "local", EACH)


def test_shards_of_removed_files_are_removed(
    image_folder: Path, store: RemotePath, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        ship(image_folder, store, tmp_path / "staging", EACH, progress=stop_after(20))
    assert len(list(store.glob("*.tar"))) > 15
    for path in [*image_folder.rglob("*.jpg"), *image_folder.rglob("*.JPEG")]:
        path.unlink()
    ship(image_folder, store, tmp_path / "staging", EACH, overwrite=True)
    assert held(store) == local(image_folder, tmp_path / "local", EACH)
