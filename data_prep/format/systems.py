"""The systems that the commands run on."""

import sys

UNSUPPORTED = ("win32",)
"""Systems without what the commands need: locks, signals and positioned reads of POSIX."""


def require_posix(command: str) -> None:
    """Exit with 2 on Windows, before anything is imported that it lacks."""
    if sys.platform in UNSUPPORTED:
        sys.stderr.write(
            f"{command} runs on Linux and macOS, not on Windows: use WSL 2 (`wsl --install`), a "
            "container or another machine.\n"
        )
        raise SystemExit(2)
