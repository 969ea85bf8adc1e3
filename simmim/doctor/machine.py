"""Memory of this machine, as the system or its container limits it."""

from collections.abc import Iterator
from pathlib import Path

import psutil


def machine_memory(root: Path = Path("/")) -> int:
    """Return the bytes that the processes of this machine may use together.

    It is the lowest limit of this process's control groups (version 1 and 2), else the memory.

    Args:
        root: folder of `proc` and `sys`.
    """
    return min([int(psutil.virtual_memory().total), *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    """Yield the memory limits of this process's control groups and of those around them."""
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, place = rest.partition(":")
        if number == "0":
            mount, file = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        inner = Path(place.strip("/"))
        # In a container the path may be the host's, and the container's own group at the top.
        for folder in (inner, *inner.parents):
            for text in _lines(mount / folder / file):
                if text.isdecimal():  # else it is "max"
                    yield int(text)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
