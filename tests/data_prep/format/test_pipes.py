"""Shards from commands: run only if allowed, then equal to files."""

import json
import shlex
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.format import storage
from data_prep.format.manifest import ManifestError, read_manifest
from data_prep.format.pipes import PipedFile
from data_prep.format.storage import StorageError
from data_prep.write.build import build_shards
from data_prep.write.options import ShardOptions


@pytest.fixture
def shards(image_folder: Path, tmp_path: Path) -> Path:
    options = ShardOptions(samples_per_shard=2)
    build_shards(image_folder, tmp_path / "shards", options)
    return tmp_path / "shards"


def pattern(shards: Path, log: Path) -> str:
    """Return a command that writes a shard out, and a line into `log` when it is run."""
    last = len(list(shards.glob("*.tar"))) - 1
    log_, tars = shlex.quote(str(log)), shlex.quote(str(shards))
    return f"pipe:echo run >>{log_}; cat {tars}/shard-{{000000..{last:06d}}}.tar"


def test_commands_run_only_if_allowed(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, folder = tmp_path / "log", tmp_path / "set"
    index = ["index", pattern(shards, log), "--output", str(folder), "--workers", "1"]
    assert main(index) == 2
    assert "--allow-pipe" in capsys.readouterr().err
    assert not log.exists()
    assert not folder.exists()

    assert main([*index, "--allow-pipe"]) == 0
    found, promised = read_manifest(folder, allow_pipe=True), read_manifest(shards)
    assert [one.sha256 for one in found.shards] == [one.sha256 for one in promised.shards]
    assert [one.name for one in found.shards] == [one.name for one in promised.shards]
    assert log.read_text() == "run\n" * len(promised.shards)  # each is fetched once

    log.unlink()
    looks = (["verify"], ["verify", "--deep"], ["info"], ["info", "--statistics"])
    for look in looks:
        assert main([look[0], str(folder), *look[1:]]) == 2
        assert "data.allow_pipe=true" in capsys.readouterr().err
    with pytest.raises(ManifestError, match=r"allow_pipe"):
        read_manifest(folder)
    assert not log.exists()
    for look in looks:
        assert main([look[0], str(folder), *look[1:], "--allow-pipe", "--workers", "1"]) == 0
    assert log.exists()


def test_the_output_of_a_command_is_compared_with_the_manifest(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    allowed = ["--allow-pipe", "--workers", "1"]
    assert (
        main(["index", pattern(shards, tmp_path / "log"), "--output", str(folder), *allowed]) == 0
    )
    tar = shards / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    assert main(["verify", str(folder), *allowed]) == 2
    assert "shard-000001.tar: its SHA-256" in capsys.readouterr().err


def test_a_remote_manifest_may_not_name_commands(tmp_path: Path, shards: Path) -> None:
    path = shards / "manifest.json"
    values = json.loads(path.read_text())
    for place in ("pipe:cat other.tar", "pipe:cat", "pipe:touch x # shard-000001.tar"):
        values["shards"][0]["place"] = place
        path.write_text(json.dumps(values))
        with pytest.raises(ManifestError):  # it is of another name, or of none
            read_manifest(shards, allow_pipe=True)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("cat /data/shard-000.tar", "shard-000.tar"),
        ("curl -s 'https://host/a/shard-000.tar?key=1'", "shard-000.tar"),
        ("zstd -dc /a/other.tar | tee x; zstd -dc shard-001.tar.zst", "shard-001.tar"),
        ("fetch 17 # shard-017.tar", "shard-017.tar"),
    ],
)
def test_a_piped_tar_is_named_by_its_command(command: str, name: str) -> None:
    assert PipedFile(command).name == name


def test_commands_without_a_tar_or_a_folder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output", str(tmp_path / "set"), "--allow-pipe", "--workers", "1"]
    assert main(["index", "pipe:cat {0..3}", *out]) == 2
    assert "no tar name" in capsys.readouterr().err
    assert main(["index", "pipe:cat {0..3} # a.tar", *out]) == 2
    assert "must be in the name" in capsys.readouterr().err
    assert main(["index", "pipe:cat a.tar", "--allow-pipe"]) == 2
    assert "--output" in capsys.readouterr().err


def test_a_failed_command_is_retried_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_DELAY", 0.001)
    count = shlex.quote(str(tmp_path / "count"))
    # It writes one number more each time, and is content at the fourth.
    command = f"echo x >>{count}; n=$(wc -l <{count}); seq 1 $n; test $n -ge 4 # shard-0.tar"
    assert b"".join(PipedFile(command).blocks()) == b"1\n2\n3\n4\n"
    (tmp_path / "count").unlink()
    assert b"".join(PipedFile(command).blocks(5)) == b"\n4\n"
    with pytest.raises(StorageError, match="failed 2 times in a row, last with exit code 3"):
        list(PipedFile("exit 3 # a.tar", attempts=2).blocks())


def test_a_command_ends_with_its_reader(tmp_path: Path) -> None:
    blocks = PipedFile("yes | cat # endless.tar").blocks()
    assert next(blocks)
    blocks.close()  # which hangs, were the command not ended
