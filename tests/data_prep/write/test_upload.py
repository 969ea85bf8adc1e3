"""Uploads: the bytes of a local run, wherever a run is interrupted."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_prep.cli import main
from data_prep.format.manifest import read_manifest
from data_prep.format.storage import RemotePath
from data_prep.inspect.verify import verify_shards
from data_prep.sources.files import Selection
from data_prep.write.options import RunOptions, ShardOptions
from data_prep.write.progress import Progress
from tests.data_prep.write.stores import EACH, Death, Killed, held, local, ship, tars


@pytest.mark.parametrize("shuffle", [False, True], ids=["streamed", "shuffled"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_at_any_moment_leaves_the_bytes_of_a_local_run(
    shuffle: bool,
    overwrite: bool,
    gappy: Path,
    store: RemotePath,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some = Selection(include=("test/cat/*",))  # six, of which the first and the last are bad
    options = ShardOptions(samples_per_shard=1, shuffle=shuffle, selection=some)
    whole = local(gappy, tmp_path / "local", options)
    old = local(gappy, tmp_path / "old", ShardOptions(samples_per_shard=3, seed=1))
    death, kills = Death(monkeypatch), 0
    system, staging = fsspec.filesystem("memory"), tmp_path / "staging"
    for after in (False, True):
        for moment in range(1, 1000):
            death.begin(10**9, after=False)
            system.store.clear()
            if overwrite:
                for name, data in {**old, "statistics.json": b"{}"}.items():
                    (store / name).write_bytes(data)
            death.begin(moment, after=after)
            try:
                ship(gappy, store, staging, options, overwrite=overwrite)
            except Killed:
                kills += 1
            else:
                break
            death.begin(10**9, after=False)
            found = held(store)
            logged = _logged(staging)
            if "manifest.json" in found:  # then the set that it is of is there
                of = whole if found["manifest.json"] == whole["manifest.json"] else old
                assert of.items() <= found.items()
            ship(gappy, store, staging, options, overwrite=overwrite)
            assert held(store) == whole
            assert not staging.exists()
            if "uploading.txt" in found:  # else it is complete, which --overwrite makes anew
                assert logged.isdisjoint(death.sent), "what was there is not sent again"
    assert kills > 6 * 4, "before and after each of at least three changes for each shard"


def _logged(staging: Path) -> set[str]:
    """Return the names of the shards that are noted to be on the store."""
    path = staging / ".partial" / "uploaded.txt"
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    return {line.split(" ")[0] for line in lines}


def test_bytes_do_not_depend_on_workers(gappy: Path, store: RemotePath, tmp_path: Path) -> None:
    whole = local(gappy, tmp_path / "local", EACH)
    built = ship(gappy, store, tmp_path / "staging", EACH, run=RunOptions(workers=2))
    assert held(store) == whole
    assert not (tmp_path / "staging").exists()
    assert built.manifest == read_manifest(store)
    names = [shard.name for shard in read_manifest(store).shards]
    assert names == [f"shard-{number:06d}.tar" for number in range(21)]
    assert verify_shards(read_manifest(store), decode=True).count == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # ray's own
def test_a_cluster_uploads_the_same_bytes(gappy: Path, store: RemotePath, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    counts, staging = list[int](), tmp_path / "staging"
    progress = Progress(finished=lambda _: counts.append(tars(staging)))
    run = RunOptions(workers=2, executor="ray")
    ship(gappy, store, staging, EACH, run=run, progress=progress)
    assert held(store) == local(gappy, tmp_path / "local", EACH)
    assert max(counts) <= 6


def test_the_staging_folder_holds_a_few_shards(
    image_folder: Path, store: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = local(image_folder, tmp_path / "local", EACH)
    staging, counts, finished = tmp_path / "staging", list[int](), list[int]()
    seen = list[tuple[int, int]]()
    put = RemotePath.upload

    def slow(self: RemotePath, path: Path, sent: Any) -> None:
        time.sleep(0.15)  # far slower than shards are written
        counts.append(tars(staging))
        put(self, path, sent)

    def note(report: Any) -> None:
        counts.append(tars(staging))
        finished.append(report.number)

    monkeypatch.setattr(RemotePath, "upload", slow)
    progress = Progress(finished=note, uploaded=lambda *pair: seen.append(pair))
    ship(image_folder, store, staging, EACH, run=RunOptions(workers=2), progress=progress)
    assert held(store) == whole
    assert len(finished) == 24
    assert 3 <= max(counts) <= 6, "at most 3 for each worker"
    shards, sent = seen[-1]
    assert (shards, sent) == (24, sum(len(whole[n]) for n in whole if n.startswith("shard-")))
    assert seen == sorted(seen)
    assert len(seen) > 24, "it is told meanwhile, too"


def test_workers_do_not_run_ahead_of_a_slow_shard(
    image_folder: Path, store: RemotePath, tmp_path: Path, draw_image: Callable[..., bytes]
) -> None:
    slow = draw_image(0, image_format="PNG", size=3000)  # a second, as long as a hundred others
    (image_folder / "a-first.png").write_bytes(slow)
    finished: list[int] = []
    progress = Progress(finished=lambda report: finished.append(report.number))
    ship(
        image_folder,
        store,
        tmp_path / "staging",
        EACH,
        run=RunOptions(workers=2),
        progress=progress,
    )
    assert sorted(finished) == list(range(25))
    assert 0 < finished.index(0) <= 3, "others were written meanwhile, but not beyond the fourth"
    assert held(store) == local(image_folder, tmp_path / "local", EACH)


def test_the_command_uploads_and_reshards(
    gappy: Path, store: RemotePath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--workers", "1", "--samples-per-shard", "5", "--max-rejected", "1"]
    staging = ["--staging", str(tmp_path / "staging")]
    for place in (str(tmp_path / "near"), str(store)):
        assert main(["shard", str(gappy), place, *options, *staging]) == 0
    assert held(store) == held(tmp_path / "near")
    assert f"complete: {len(read_manifest(store).shards)} shards" in capsys.readouterr().out
    again = RemotePath("memory://bucket/again")
    for place in (str(tmp_path / "again"), str(again)):
        assert main(["reshard", str(tmp_path / "near"), place, "--seed", "3", *options]) == 0
    assert held(again) == held(tmp_path / "again")
    assert main(["shard", str(gappy), str(store), *options, *staging]) == 0
    assert "already complete" in capsys.readouterr().out
    assert not list((tmp_path / "staging").iterdir())
    assert main(["shard", str(gappy), str(store), *options, "--part", "1/2"]) == 2
    assert "--part writes to a folder" in capsys.readouterr().err


ON_DISK = """
from data_prep.format import storage
storage.PROTOCOLS["file"] = "fsspec"
from data_prep.cli import run
if __name__ == "__main__":
    run()
"""


@pytest.mark.parametrize("order", [(), ("--shuffle-window", "50")], ids=["all", "window"])
def test_kills_of_the_process_leave_the_bytes_of_a_local_run(
    order: tuple[str, ...], gappy: Path, tmp_path: Path
) -> None:
    store, script = tmp_path / "store", tmp_path / "on_disk.py"
    store.mkdir()
    script.write_text(ON_DISK)
    options = ["--samples-per-shard", "1", "--max-rejected", "1", "--workers", "2", *order]
    command = [sys.executable, str(script), "shard", str(gappy), f"file://{store}", *options]
    command += ["--staging", str(tmp_path / "staging")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    killed = 0
    for min_shards in (1, 8, 15):
        with subprocess.Popen(command, env=environment, start_new_session=True) as process:
            while process.poll() is None and len(list(store.glob("*.tar"))) < min_shards:
                time.sleep(0.002)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                killed += 1
        assert killed == 3 or not (store / "manifest.json").exists()
    assert killed, "it ended before any kill"
    subprocess.run(command, env=environment, check=True)
    assert main(["shard", str(gappy), str(tmp_path / "local"), *options]) == 0
    assert held(store) == held(tmp_path / "local")
    assert not list((tmp_path / "staging").iterdir())
