"""A disk that fills up while training writes to it: a small tmpfs, or a limit on files."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simmim.data.loader.bad_samples import BadSample, BadSamples
from simmim.disk import append_line, why_not_written
from simmim.engine.checkpoint.directory import complete_checkpoints
from simmim.engine.checkpoint.saver import Saver
from simmim.engine.devices import build_accelerator
from simmim.engine.loop import train
from simmim.engine.run import RunFolder
from simmim.recipe import parse
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage

TMPFS_BYTES = 8 * 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "none", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError as error:
        pytest.skip(f"there is no mount: {error}")
    if done.returncode:
        pytest.skip(f"may not mount a tmpfs: {done.stderr.decode().strip()}")
    yield place
    # Lazily: weights that were read from a checkpoint may still be mapped.
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path, *, leaving: int = 0) -> Path:
    """Write a file that leaves this many bytes free."""
    ballast = place / "ballast"
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    ballast.write_bytes(b"\0" * (free - leaving))
    return ballast


@pytest.fixture
def prompt_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each step wait for the writing thread: what is on disk is then known."""
    flags = Saver.flags

    def settled(saver: Saver) -> tuple[int, int]:
        if saver._writing is not None and saver._writing.future is not None:
            saver._writing.future.exception()
        return flags(saver)

    monkeypatch.setattr(Saver, "flags", settled)


def test_append_line_writes_the_whole_line_or_nothing(small_disk: Path) -> None:
    path = small_disk / "lines"
    path.write_bytes(b"first\n")
    ballast = fill(small_disk)
    with path.open("ab", buffering=0) as file, pytest.raises(OSError, match="No space") as raised:
        append_line(file, b"x" * 3 * 2**14 + b"\n")
    assert path.read_bytes() == b"first\n"
    text = why_not_written(raised.value, small_disk, needed=2**20)
    assert text == f"No space left on device (1.0 MiB are needed, 0.0 MiB are free in {small_disk})"
    ballast.unlink()
    with path.open("ab", buffering=0) as file:
        append_line(file, b"second\n")
    assert path.read_bytes() == b"first\nsecond\n"


def test_a_bad_sample_is_recorded_once_there_is_space(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    account = BadSamples()
    account.write_to(small_disk / "bad_samples.jsonl")
    sample = BadSample(kind="replaced", folder="f", shard="s", key="k", reason="r")
    ballast = fill(small_disk)
    account.record(100, [sample])
    assert account.bad == 1
    assert (
        "WARNING: the name of a bad sample cannot be written: No space" in capsys.readouterr().err
    )
    ballast.unlink()
    account.record(100, [sample])
    assert (small_disk / "bad_samples.jsonl").read_text().count('"key": "k"') == 1


@pytest.mark.usefixtures("prompt_writing")
def test_training_survives_a_full_disk(
    small_disk: Path,
    pretrain_values: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk fills after step 5 and has room again after step 9."""
    run = RunFolder(path=small_disk / "run")
    settings = {"checkpoint_every": 2, "keep_last": 1, "log_every": 1, "look_every": 6}
    values = pretrain_values | {"training": pretrain_values["training"] | settings}
    stage = PretrainStage(parse(PretrainRecipe, values, "test"))
    forward, taken = stage.module.forward, 0
    held: list[list[str]] = []

    def counting(batch: Any) -> Any:
        nonlocal taken
        if stage.module.training:
            taken += 1
            if taken == 6:
                fill(small_disk)
            if taken == 10:
                held.append([path.name for path in complete_checkpoints(run.checkpoints)])
                (small_disk / "ballast").unlink()
        return forward(batch)

    monkeypatch.setattr(stage.module, "forward", counting)
    result = train(stage, run, build_accelerator("fp32"), None)
    assert result.step == 12
    assert held == [["step-00000004"]]  # the old one stays while no new one can be written
    warned = capsys.readouterr().err
    for step in (6, 8):
        assert f"checkpoint of step {step} " in warned
    assert "MiB are free" in warned
    assert "MiB are needed" in warned
    assert "a picture cannot be written" in warned
    assert [path.name for path in complete_checkpoints(run.checkpoints)] == ["step-00000012"]
    steps = [line["step"] for line in run.read_metrics() if "loss" in line]
    assert set(steps) >= {1, 2, 3, 4, 5, 10, 11, 12}
    assert train(stage, run, build_accelerator("fp32"), "auto").step == 12


@pytest.mark.usefixtures("prompt_writing")
def test_a_stop_on_a_full_disk_keeps_the_previous_checkpoint(
    small_disk: Path,
    pretrain_values: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever asked for the stop will start it again, and there may be room then."""
    run = RunFolder(path=small_disk / "run")
    settings = {"checkpoint_every": 4, "keep_last": 1, "log_every": 1}
    values = pretrain_values | {"training": pretrain_values["training"] | settings}
    stage = PretrainStage(parse(PretrainRecipe, values, "test"))
    forward, taken = stage.module.forward, 0

    def counting(batch: Any) -> Any:
        nonlocal taken
        taken += stage.module.training
        if stage.module.training and taken == 7:
            fill(small_disk)
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(batch)

    monkeypatch.setattr(stage.module, "forward", counting)
    result = train(stage, run, build_accelerator("fp32"), None)
    assert result.stopped
    assert result.step == 4
    assert [path.name for path in complete_checkpoints(run.checkpoints)] == ["step-00000004"]
    warned = capsys.readouterr().err
    assert "WARNING: the checkpoint of step 7 was not written: " in warned
    assert "MiB are free" in warned
    (small_disk / "ballast").unlink()
    again = train(stage.fresh(), run, build_accelerator("fp32"), "auto")
    assert (again.step, again.stopped) == (12, False)


def test_a_limit_on_the_size_of_files_is_a_full_disk_too(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\n"
        "from simmim.engine.run import RunFolder\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "run = RunFolder(path=Path(sys.argv[1]))\n"
        "run.log({'step': 1})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "run.log({'step': 2})\n"
        "print([line['step'] for line in run.read_metrics()])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=True, text=True
    )
    assert done.stdout.strip() == "[1]"
    assert "File too large" in done.stderr
