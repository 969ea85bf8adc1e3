"""Standard streams that are closed, broken or full, as shells and schedulers leave them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.format.terminal import BROKEN_PIPE, CANNOT_WRITE

PROGRAM = """
import os, sys
from contextlib import suppress
from data_prep.format.terminal import flush_output, protect_output
protect_output(optional={optional})
for number in range(3000):
    print("a line that is long enough to fill a pipe that nobody reads", number)
    sys.stderr.write("and another one\\n")
opened = os.open("data", os.O_CREAT | os.O_WRONLY)
with suppress(OSError):
    os.write(1, b"a library prints")
open("end", "w").write(str(opened))
sys.exit(flush_output(0))
"""


def run(
    folder: Path, redirection: str, *, optional: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run PROGRAM under bash with a redirection; `$?` of the program itself is in `stdout`."""
    program = folder / "program.py"
    program.write_text(PROGRAM.format(optional=optional))
    script = f'{{ "{sys.executable}" program.py {redirection}; }}; echo "code ${{PIPESTATUS[0]}}"'
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    "redirection",
    [
        "| true",
        "2>&1 | true",
        ">/dev/full 2>/dev/full",
        ">&- 2>&- <&-",
        ">&-",
        "2>&-",
    ],
)
def test_a_program_to_which_output_is_optional_goes_on(tmp_path: Path, redirection: str) -> None:
    done = run(tmp_path, redirection, optional=True)
    assert done.stdout.splitlines()[-1] == "code 0"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    # No file took the number of a closed stream, where a library would have printed into it.
    assert int((tmp_path / "end").read_text()) > 2
    assert (tmp_path / "data").read_bytes() == b""


@pytest.mark.parametrize("redirection", ["| true", "2>&1 | true", "| head -1"])
def test_a_program_ends_quietly_when_nobody_reads_it(tmp_path: Path, redirection: str) -> None:
    done = run(tmp_path, redirection)
    assert done.stdout.splitlines()[-1] == f"code {BROKEN_PIPE}"
    assert not (tmp_path / "end").exists()
    assert set(done.stderr.splitlines()) <= {"and another one"}


def test_a_full_disk_is_an_error_that_is_named_once(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    text = PROGRAM.format(optional=False).replace("3000", "3").replace("sys.stderr.write", "len")
    program.write_text(text)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, str(program)],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == CANNOT_WRITE
    assert done.stderr == "<stdout>: No space left on device.\n"


@pytest.mark.parametrize("columns", ["30", "200"])  # more and less than a buffer of output
def test_help_that_cannot_be_written_is_an_error(columns: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "data_prep", "shard", "--help"],
            env=os.environ | {"COLUMNS": columns},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (
        CANNOT_WRITE,
        "data-prep: <stdout>: No space left on device.\n",
    )


def test_a_message_that_cannot_be_written_changes_no_exit_code() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "data_prep", "info", "missing"]
        done = subprocess.run(command, stdout=full, stderr=full, timeout=60, check=False)
    assert done.returncode == CANNOT_WRITE


CONTROLS = """
import sys
from data_prep.format.terminal import protect_output
protect_output(optional=False)
sys.stderr.write("\\x1b[A")  # as tqdm moves up
sys.stderr.write("\\ra name \\x1b]0;title\\x07 \\x9b \\u202e \\udcff \\tend\\n")
"""


def test_control_characters_are_shown_as_escapes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CONTROLS], capture_output=True, timeout=60, check=True
    )
    shown = rb"\x1b]0;title\x07 \x9b \u202e \udcff"
    assert done.stderr == b"\x1b[A\ra name " + shown + b" \tend\n"
