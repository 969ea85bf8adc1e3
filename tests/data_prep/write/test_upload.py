"""Uploads: the bytes of a local run, wherever a run is interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_prep.cli import main
from data_prep.format import storage
from data_prep.format.manifest import ManifestError, read_manifest
from data_prep.format.storage import RemotePath, StorageError
from data_prep.inspect.verify import verify_shards
from data_prep.sources.files import Selection
from data_prep.write import upload
from data_prep.write.build import BuildResult, build_shards
from data_prep.write.finalize import TooManyRejectedError
from data_prep.write.options import RunOptions, ShardOptions
from data_prep.write.output_dir import OutputDirError
from data_prep.write.progress import Progress

EACH = ShardOptions(samples_per_shard=1, shuffle=False)  # streams
SHUFFLED = ShardOptions(samples_per_shard=3)  # lists all before


@pytest.fixture
def store() -> Iterator[RemotePath]:
    """An empty prefix of a store in memory."""
    fsspec.filesystem("memory").store.clear()
    yield RemotePath("memory://bucket/set")
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def gappy(image_folder: Path) -> Path:
    """24 images of which three are bad, so that shards of one or three come out empty."""
    for name in ("test/cat/0.jpg", "test/cat/5.jpg", "train/dog/3.JPEG"):
        (image_folder / name).write_bytes(b"some text")
    return image_folder


def held(place: Path | RemotePath) -> dict[str, bytes]:
    """Return what is at a place: name → bytes."""
    if not place.exists():
        return {}
    return {path.name: path.read_bytes() for path in place.glob("*") if path.name != ".partial"}


def local(source: Path, folder: Path, options: ShardOptions) -> dict[str, bytes]:
    """Return what a run that stays on this machine writes."""
    build_shards(source, folder, options)
    return held(folder)


def ship(
    source: Path, store: RemotePath, staging: Path, options: ShardOptions, **rest: Any
) -> BuildResult:
    """Write shards to the store."""
    return build_shards(source, staging, options, store=store, **rest)


def tars(folder: Path) -> int:
    """Count the shards on disk, half written ones too."""
    return sum(".tar" in path.name for path in folder.rglob("*"))


class Killed(BaseException):
    """The process was killed."""


class Death:
    """Ends all work at the n-th change of the store or of the log, just before or after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.after, self.is_dead = 10**9, False, False
        self.sent: list[str] = []
        whole_system, whole_add = storage._file_system, upload._Log.add

        def add(log: upload._Log, name: str, digest: str) -> None:
            self.change(whole_add, log, name, digest)

        monkeypatch.setattr(upload._Log, "add", add)
        monkeypatch.setattr(storage, "_file_system", lambda url: Mortal(whole_system(url), self))

    def change(self, action: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Do it, unless dead before."""
        self.left -= 1
        self.is_dead = self.is_dead or (self.left <= 0 and not self.after)
        if self.is_dead:
            raise Killed
        result = action(*arguments, **options)
        self.is_dead = self.left <= 0
        if self.is_dead:
            raise Killed
        return result

    def begin(self, left: int, *, after: bool) -> None:
        """Live until then."""
        self.left, self.after, self.is_dead, self.sent = left, after, False, []


class Mortal:
    """A file system that nothing changes any more after a death."""

    def __init__(self, system: Any, death: Death) -> None:
        self._system, self._death = system, death

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._system, name)
        if name not in ("put_file", "pipe_file", "rm_file", "rm"):
            return method

        def call(*arguments: Any, **options: Any) -> Any:
            if name == "put_file":
                self._death.sent.append(arguments[1].rsplit("/", 1)[-1])
            return self._death.change(method, *arguments, **options)

        return call


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
    run = RunOptions(workers=2, ray=True)
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


def stop_after(shards: int) -> Progress:
    """Return a progress that stops the run when so many shards are written."""
    finished: list[int] = []

    def note(report: Any) -> None:
        finished.append(report.number)
        if len(finished) == shards:
            raise KeyboardInterrupt

    return Progress(finished=note)


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
