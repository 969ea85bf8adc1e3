"""On Windows every command says so in one line, before it imports what Windows lacks."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AS_ON_WINDOWS = """
import os, runpy, signal, sys
import argparse, subprocess, threading  # Python's own, which have imported what this system has
sys.platform = "win32"
for name in ("fcntl", "resource", "pwd", "grp"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGHUP", "SIGKILL", "pthread_sigmask"):
    delattr(signal, name)
for name in ("pread", "fork", "sched_getaffinity"):
    delattr(os, name)
module, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--config", "absent.yaml"], []])
@pytest.mark.parametrize("module", ["simmim", "data_prep", "simmim.launch"])
def test_windows_is_named_with_exit_code_2(module: str, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AS_ON_WINDOWS, module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Linux and macOS, not on Windows" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_the_readme_names_the_systems() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "Linux" in text
    assert "macOS" in text
    assert "Windows" in text
