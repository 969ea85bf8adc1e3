"""The command line: exit codes, one message per mistake, interrupts and resuming."""

import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from data_prep.cli import main
from data_prep.format.manifest import ManifestError, read_manifest
from data_prep.format.statistics_file import read_statistics

WriteTar = Callable[[Path, dict[str, bytes]], None]
DATA = Path(__file__).parents[2].parent / "shared" / "data"


def test_shard_info_and_verify(
    image_zip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "out")
    assert main(["shard", str(image_zip), folder, "--workers", "1"]) == 0
    output = capsys.readouterr()
    assert "accepted 24 + rejected 0 = 24 found" in output.out
    assert output.err == ""
    assert main(["verify", folder, "--workers", "1"]) == 0
    assert "24 samples in 8 shards: checksums and indexes are" in capsys.readouterr().out
    assert main(["verify", folder, "--deep", "--workers", "1"]) == 0
    assert "24 samples in 8 shards: checksums, indexes and images are" in (capsys.readouterr().out)
    assert main(["info", folder]) == 0
    assert "samples     24" in capsys.readouterr().out
    (tmp_path / "out" / "manifest.json").unlink()
    assert main(["index", folder, "--workers", "1"]) == 0
    assert "24 samples in 8 shards, 3 classes" in capsys.readouterr().out
    assert main(["verify", folder, "--workers", "1"]) == 0
    assert "--deep" in capsys.readouterr().out


def test_files_that_an_index_leaves_out_need_other_shards(
    write_tar: WriteTar,
    draw_image: Callable[..., bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_tar(tmp_path / "a.tar", {"x.jpg": draw_image(0), "y": draw_image(1)})
    assert main(["index", str(tmp_path), "--workers", "1"]) == 0
    output = capsys.readouterr().out
    assert "skipped: no suffix (1); `data-prep shard TAR DST --include GLOB` takes" in output
    found = ["shard", str(tmp_path / "a.tar"), str(tmp_path / "out"), "--include", "*"]
    assert main([*found, "--workers", "1"]) == 0
    assert "accepted 2 + rejected 0" in capsys.readouterr().out


def test_pictures_are_shrunk_measured_and_shown(
    image_zip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sheet = str(tmp_path / "out"), tmp_path / "sheet.png"
    small = ("shard", str(image_zip), folder, "--short-side", "12", "--format", "webp")
    assert main([*small, "--workers", "1"]) == 0
    assert "written anew: 24" in capsys.readouterr().out
    assert main(["info", folder, "--statistics", "--contact-sheet", str(sheet)]) == 0
    output = capsys.readouterr().out
    assert "short side  12 pixels" in output
    assert "statistics  24 pictures, 3 channels, 0 to 1" in output
    assert sheet.read_bytes().startswith(b"\x89PNG")
    (measured,) = read_statistics(read_manifest(folder))
    assert len(measured.mean) == 3
    # What was measured does not stand in the way of the same command, nor outlive other pictures.
    assert main([*small, "--workers", "1"]) == 0
    assert "already complete" in capsys.readouterr().out
    assert main([*small, "--overwrite", "--quality", "80", "--workers", "1"]) == 0
    with pytest.raises(ManifestError, match="--statistics"):
        read_statistics(read_manifest(folder))


def test_verify_fails_with_every_problem_named(
    image_zip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["shard", str(image_zip), str(folder), "--workers", "1"]) == 0
    for name in ("shard-000001.tar", "shard-000005.tar"):
        with (folder / name).open("r+b") as file:
            file.seek(600)
            file.write(b"0000")
    capsys.readouterr()
    assert main(["verify", str(folder), "--workers", "2"]) == 2
    errors = capsys.readouterr().err
    assert "has 2 problems" in errors
    assert "shard-000001.tar: " in errors
    assert "shard-000005.tar: " in errors


def _bad_sources(folder: Path, whole: bytes) -> dict[str, tuple[Path, str]]:
    for name in ("empty", "text", "cut", "other"):
        (folder / name).mkdir()
    (folder / "text" / "a.jpg").write_text("not an image")
    (folder / "cut" / "a.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "other" / "a.txt").write_text("text")
    (folder / "broken.zip").write_bytes(b"PK\x03\x04 and nothing else")
    return {
        "empty": (folder / "empty", "is empty"),
        "text": (folder / "text", "a.jpg: it is not an image"),
        "cut": (folder / "cut", "a.jpg: it cannot be decoded"),
        "other": (folder / "other", "has no images"),
        "missing": (folder / "missing", "does not exist"),
        "broken": (folder / "broken.zip", "is a cut or damaged zip"),
    }


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "other", "missing", "broken"])
def test_bad_input_gives_one_message_and_leaves_nothing(
    kind: str,
    tmp_path: Path,
    draw_image: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, message = _bad_sources(tmp_path, draw_image(0))[kind]
    assert main(["shard", str(source), str(tmp_path / "new" / "out")]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.startswith("data-prep: ")
    assert "Traceback" not in output.err
    assert not (tmp_path / "new").exists()


def test_mistakes_in_other_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("info", "verify", "index"):
        assert main([command, str(tmp_path / "nowhere")]) == 2
        assert "nowhere" in capsys.readouterr().err
    for arguments in (["shard", "a", "b", "--workers", "0"], ["shard", "a"], ["reed"]):
        assert main(arguments) == 2
        assert "data-prep" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(image_zip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shard", str(image_zip), "/proc/nothing/out"]) == 2
    assert re.search(r"cannot continue .*/proc/nothing", capsys.readouterr().err)


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from data_prep.cli import main\n"
        "main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'PIL', 'fsspec', 'tqdm', 'asyncio', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    for arguments in (["--help"], ["shard", "--help"], ["shart"]):
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shard", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("samples-per-shard", "include", "exclude", "seed", "workers", "overwrite"):
        assert f"--{option}" in text


@contextmanager
def _running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command in a session of its own, which does not outlive the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "data_prep", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # all of it may have ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)


def _wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate(timeout=60)
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.005)


@pytest.fixture
def many_images(tmp_path: Path, draw_image: Callable[..., bytes]) -> Path:
    """240 images that take a second or two to check."""
    folder = tmp_path / "many"
    folder.mkdir()
    data = draw_image(0, size=300, image_format="PNG")
    first = folder / "0.png"
    first.write_bytes(data)
    for number in range(1, 240):
        (folder / f"{number}.png").hardlink_to(first)
    return folder


@pytest.mark.parametrize(
    ("sent", "to_group", "code"),
    [
        (signal.SIGINT, True, 130),
        (signal.SIGTERM, False, 143),
        (signal.SIGKILL, False, -9),
    ],
)
def test_an_interrupt_stops_all_processes_and_a_rerun_resumes(
    sent: signal.Signals, to_group: bool, code: int, many_images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    arguments = ("shard", str(many_images), str(folder), "--samples-per-shard", "4")
    with _running(*arguments, "--workers", "2") as process:
        _wait_for(lambda: len(list(folder.glob(".partial/*.report.json"))) >= 2, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        if to_group:
            os.killpg(process.pid, sent)
        else:
            process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive
    assert "Traceback" not in errors
    if code > 0:
        assert errors.startswith("data-prep: stopped")
        assert "same command again" in errors
        assert errors.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == [".partial"]
    # A rerun must keep the finished shards, not write them again.
    # A shard is finished with its report: one whose tar alone is there is written again.
    reports = folder.glob(".partial/shard-*.report.json")
    tars = [path.with_name(path.name.replace(".report.json", ".tar")) for path in reports]
    finished = {path.name: path.stat().st_mtime_ns for path in tars}
    assert finished
    assert main([*arguments, "--workers", "1"]) == 0
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.tar")}
    assert finished.items() <= kept.items()
    assert read_manifest(folder).samples == 240


def test_a_killed_worker_ends_the_command_as_worth_retrying(
    many_images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    arguments = ("shard", str(many_images), str(folder), "--samples-per-shard", "4")
    with _running(*arguments, "--workers", "2") as process:
        _wait_for(lambda: len(list(folder.glob(".partial/*.report.json"))) >= 2, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        max(workers, key=lambda worker: worker.memory_info().rss).kill()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 76, errors
    assert "memory" in errors
    assert "--workers" in errors
    assert main([*arguments, "--workers", "1"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "samples", "classes"), [("cifar10.zip", 60_000, 10), ("photos.zip", 122, 1)]
)
def test_real_sets(name: str, samples: int, classes: int, tmp_path: Path) -> None:
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there")
    folder = tmp_path / "out"
    assert main(["shard", str(DATA / name), str(folder)]) == 0
    assert main(["verify", str(folder), "--deep"]) == 0
    manifest = read_manifest(folder)
    assert (manifest.samples, len(manifest.classes)) == (samples, classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from webdataset import WebDataset

        urls = [str(folder / shard.name) for shard in manifest.shards]
        keys = {sample["__key__"] for sample in WebDataset(urls, shardshuffle=False)}
    assert len(keys) == samples


@pytest.mark.parametrize("order", [("--deduplicate",), ("--shuffle-window", "30")])
def test_three_kills_leave_the_bytes_of_an_uninterrupted_run(
    order: tuple[str, ...], many_images: Path, tmp_path: Path
) -> None:
    draw = random.Random(0)
    arguments = ("--samples-per-shard", "4", "--workers", "2", *order)
    for number in range(0, 240, 3):  # files of one name share their bytes unless told apart
        path = many_images / f"{number}.png"
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data + str(number).encode())
    folder = tmp_path / "out"
    assert main(["shard", str(many_images), str(tmp_path / "whole"), *arguments]) == 0
    for _ in range(3):
        with _running("shard", str(many_images), str(folder), *arguments) as process:
            time.sleep(draw.uniform(0.5, 2.5))
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert main(["shard", str(many_images), str(folder), *arguments[:2], *order]) == 0
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_control_characters_in_messages_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\x1b[31m\r\x9b2J\u202eb"
    (tmp_path / f"{name}.zip").write_bytes(b"no zip")
    (tmp_path / name).mkdir()
    for arguments in (
        ["shard", f"{tmp_path}/{name}-missing", str(tmp_path / "out")],
        ["shard", f"{tmp_path}/{name}.zip", str(tmp_path / "out")],
        ["shard", f"{tmp_path}/{name}", str(tmp_path / "out")],
        ["verify", f"{tmp_path}/{name}"],
        ["index", f"{tmp_path}/{name}"],
    ):
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert not set("\x1b\r\x9b\u202e") & set(message), ascii(message)


def test_memory_that_runs_out_ends_with_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise MemoryError

    monkeypatch.setattr("data_prep.commands.describe_set", fail)
    assert main(["info", str(tmp_path)]) == 76
    assert "memory ran out: lower --workers" in capsys.readouterr().err
