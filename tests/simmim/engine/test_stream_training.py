"""Two processes train from tars without a manifest: a folder, a web server, commands; resume."""

import json
import os
import re
import shlex
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import webdataset
import yaml

import simmim.cli
from simmim.engine.checkpoint.directory import complete_checkpoints
from tests.simmim.data.datasets.test_tar_stream import add
from tests.simmim.engine.test_processes import arguments, losses, wait_for_step
from tests.simmim.forked import finish, forked

STEPS = 48
LOGGED = str(Path(__file__).with_name("train_logged.py"))


@pytest.fixture
def written(shards: Path, tmp_path: Path) -> Path:
    """Tars of 96 images by webdataset's ShardWriter."""
    images = sorted((shards.parent / "images").rglob("*.png"))
    folder = tmp_path / "written"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "s-%06d.tar"), maxcount=20, verbose=0) as writer:
        for number, path in enumerate(images):
            writer.write({"__key__": f"{number:04d}", "png": path.read_bytes(), "cls": 1})
    return folder


@pytest.fixture
def crawled(shards: Path, tmp_path: Path) -> Path:
    """Tars of the same images in the layout of img2dataset."""
    images = sorted((shards.parent / "images").rglob("*.png"))
    folder = tmp_path / "crawled"
    folder.mkdir()
    for tar in range(4):
        members: dict[str, bytes] = {}
        for row, path in enumerate(images[tar * 24 : tar * 24 + 24]):
            key = f"{tar:05d}{row:04d}"
            members |= {
                f"{key}.jpg": path.read_bytes(),
                f"{key}.txt": b"text",
                f"{key}.json": b"{}",
            }
        add(folder / f"{tar:05d}.tar", members)
        (folder / f"{tar:05d}_stats.json").write_text("{}")
    return folder


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The URL of `tmp_path` on a local server."""
    pytest.importorskip("aiohttp")
    handler = partial(SimpleHTTPRequestHandler, directory=os.fspath(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def stream_config(pretrain_values: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe that reads a stream."""

    def write(tars: object, **data: Any) -> Path:
        stream = {"tars": str(tars), "samples": 96, "shuffle": 16}
        shared = {"image_size": 16, "workers": 1, "stream": stream}
        pretrain_values["data"] = shared | data
        pretrain_values["training"] |= {"steps": STEPS, "log_every": 4, "checkpoint_every": 12}
        path = tmp_path / "stream.yaml"
        path.write_text(yaml.safe_dump(pretrain_values))
        return path

    return write


def train_killed_and_resumed(config: Path, folder: Path) -> None:
    """Kill two ranks after a checkpoint, resume, and check samples, losses and messages."""
    run, log = folder / "run", folder / "log"

    def command(start: str, *more: str) -> list[str]:
        return [LOGGED, str(folder / start), *arguments(config, run, *more)[1:]]

    with forked(command("first"), log, ranks=2) as job:
        wait_for_step(run, 16, log)
        job.kill()
    last = complete_checkpoints(run / "checkpoints")[-1].name
    assert "step-00000012" <= last < f"step-{STEPS:08}"
    text = finish(command("second", "--resume", "auto"), log, ranks=2)
    assert log.read_text().count("Not guaranteed: the same order") == 2
    assert "a resumed run starts a new shuffle at its step" in text
    assert "data-prep index" in text
    found = losses(run)
    assert [*found] == [*range(4, STEPS + 1, 4)]
    assert sum([*found.values()][-4:]) < sum([*found.values()][:4])
    for start in ("first", "second"):
        taken = Counter(
            tuple(one)
            for rank in range(2)
            for line in (folder / f"{start}-{rank}").read_text().splitlines(keepends=True)
            if line.endswith("\n")  # not cut by the kill
            for one in json.loads(line)
            if ".tar" in one[1]
        )
        assert set(taken.values()) == {1}  # at most once an epoch, over both ranks
        epochs = Counter(epoch for epoch, _ in taken)
        assert start == "first" or len(epochs) > 1
        assert all(count >= 72 for count in [*epochs.values()][:-1])  # of 96


def test_a_folder_of_shard_writer(
    written: Path, stream_config: Callable[..., Path], tmp_path: Path
) -> None:
    train_killed_and_resumed(stream_config(written), tmp_path)
    assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()
    assert [*(tmp_path / "run" / "reconstructions").glob("*.png")]  # of training images


@pytest.mark.slow
def test_a_crawlers_tars_from_a_web_server(
    crawled: Path, served: str, stream_config: Callable[..., Path], tmp_path: Path
) -> None:
    assert crawled.is_dir()
    train_killed_and_resumed(stream_config(f"{served}/crawled/{{00000..00003}}.tar"), tmp_path)


@pytest.mark.slow
def test_a_crawlers_tars_from_commands_mixed_with_indexed_shards(
    crawled: Path, shards: Path, stream_config: Callable[..., Path], tmp_path: Path
) -> None:
    command = f"pipe:cat {shlex.quote(str(crawled))}/{{00000..00003}}.tar"
    config = stream_config(command, allow_pipe=True, shards=str(shards))
    train_killed_and_resumed(config, tmp_path)
    assert "validation_loss" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_what_a_stream_cannot_do_is_refused_with_the_command_that_does(
    written: Path,
    stream_config: Callable[..., Path],
    classification_values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = stream_config(written)
    command = ["pretrain", "--config", str(config), "--folder", str(tmp_path / "run")]
    for more, told in (
        (["--data.mean", "measured"], "data-prep index"),
        (["--data.stream.samples", "null"], "counts them"),
        (["--data.slots", "4"], "data.slots is for indexed"),
        (["--data.fraction", "0.5"], "fraction chooses from indexed datasets"),
        (["--data.classes", "[cat, dog]"], "classes chooses from indexed datasets"),
        (["--data.stream.tars", "pipe:cat a.tar"], "data.allow_pipe"),
        (["--data.stream.image_key", "image.png"], "image_key"),
        (["--data.stream", "null"], "data.stream"),
        (["--data.stream", str(written)], "must be a section with fields tars, samples, image_key"),
    ):
        assert simmim.cli.main([*command, *more]) == 2, more
        assert told in capsys.readouterr().err
    classification_values["data"]["stream"] = {"tars": str(written), "samples": 96}
    config.write_text(yaml.safe_dump(classification_values))
    assert simmim.cli.main(["finetune", *command[1:]]) == 2
    assert "only pretraining reads tars without a manifest" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_damage_is_listed_in_the_run(
    crawled: Path,
    stream_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add(crawled / "00004.tar", {"9.jpg": b"no image", "8.mp4": b"video", "8.txt": b"text"})
    cut = crawled / "00003.tar"
    cut.write_bytes(cut.read_bytes()[:-2000])
    config = stream_config(crawled, workers=0)
    command = ["pretrain", "--config", str(config), "--folder", str(tmp_path / "run")]
    assert simmim.cli.main(command) == 0
    lines = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    found = {(one["kind"], one["shard"], one["key"]) for one in map(json.loads, lines)}
    assert found == {
        ("skipped", "00004.tar", "9"),
        ("no image", "00004.tar", "8"),
        ("skipped", "00003.tar", ""),
    }
    printed = capsys.readouterr()
    assert "sample 00004.tar/8 in" in printed.err
    assert "has no image, only .mp4" in printed.err
    assert "bad_samples.jsonl" in printed.out
    assert re.search(r"Left out samples without an image.*: \.mp4 \(\d\)", printed.out)


def test_mean_and_std_of_a_stream_are_advised_as_numbers(
    written: Path,
    stream_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`measured` is refused for a stream."""
    config = stream_config(written, workers=0, mean=[0.01] * 3, std=[0.01] * 3)
    command = ["pretrain", "--config", str(config), "--folder", str(tmp_path / "run")]
    simmim.cli.main([*command, "--training.steps", "1"])
    said = capsys.readouterr().err
    assert "set encoder.in_channels to 3, data.mean to [" in said
    assert "measured" not in said
