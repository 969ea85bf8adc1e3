"""Paths in lists: relative to the root, whatever system or form they are written in."""

import os
import re
from functools import lru_cache
from urllib.parse import unquote

from data_prep.format.manifest import IMAGE_SUFFIXES
from data_prep.format.storage import Location, RemotePath

_SPECIAL = re.compile(r"\A/|[:\\]|\.\.")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_SUFFIXES = "|".join(suffix[1:] for suffix in sorted(IMAGE_SUFFIXES))
_JOINED = re.compile(rf"(.+\.(?:{_SUFFIXES}))(?:\s*[,;|]\s*|\s+)(\S.*)", re.IGNORECASE)
_FILE_URL = "file://"
_ROOT_HINT = "give the folder that holds all files as --root"


class PathRules:
    """Turns the paths of a list into paths below a root folder.

    A backslash separates folders as a slash does. Absolute paths and URLs must lead into the root.
    Blanks around a path do not belong to it, unless there is a local file of exactly that name.
    """

    def __init__(self, root: Location) -> None:
        self._root = root
        self._prefixes: tuple[str, ...] = ()
        if not isinstance(root, RemotePath):
            places = (os.path.abspath(root), os.path.realpath(root))  # noqa: PTH100
            self._prefixes = tuple(os.path.join(place, "") for place in places)  # noqa: PTH118

    def place(self, given: object) -> tuple[str, str]:
        """Return the path below the root, and its problem, which is empty if there is none.

        Args:
            given: the cell of the list.

        Raises:
            ValueError: the cell holds no text; the message is a clause.
        """
        if given is None:
            return "", ""
        if isinstance(given, bytes):
            given = os.fsdecode(given)
        if isinstance(given, list | tuple | dict | float):
            raise ValueError(f"holds {type(given).__name__} values, not paths")
        path = str(given)
        if path != path.strip() and not self._is_there(path):
            path = path.strip()
        if path.isascii() and not _SPECIAL.search(path):
            return path, ""  # nearly always, and much faster
        try:
            path.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return path.encode("utf-8", "backslashreplace").decode(), "its name is not text"
        return self._place(path)

    def _is_there(self, path: str) -> bool:
        """Return whether a local file has this name, blanks included."""
        if not self._prefixes or "\0" in path:
            return False
        try:
            return bool(path.strip()) and os.path.lexists(self._prefixes[0] + path)
        except (OSError, ValueError):
            return False

    def _place(self, path: str) -> tuple[str, str]:
        if path.startswith(_FILE_URL) and self._prefixes:
            path = unquote(path[len(_FILE_URL) :])
        if _URL.match(path):
            return self._below_url(path)
        if _WINDOWS.match(path):
            return path, "it is a Windows path: write it relative to --root"
        path = path.replace("\\", "/")
        if path.startswith("/"):
            return self._below_root(path)
        if ".." in path and ".." in path.split("/"):
            inside = os.path.normpath(path)
            if inside == ".." or inside.startswith("../"):
                return path, f"it leads out of the list's folder: {_ROOT_HINT}"
            return inside, ""
        return path, ""

    def _below_url(self, path: str) -> tuple[str, str]:
        below = f"{self._root}/"
        if not self._prefixes and path.startswith(below):
            return path[len(below) :], ""
        return path, f"it is a URL outside of the list's folder: {_ROOT_HINT}, or download it"

    def _below_root(self, path: str) -> tuple[str, str]:
        path = os.path.normpath(path)
        folder, _, name = path.rpartition("/")
        for place in (path, f"{_real_folder(folder)}/{name}") if self._prefixes else ():
            for prefix in self._prefixes:
                if place.startswith(prefix):
                    return place[len(prefix) :], ""
        return path, f"it is an absolute path outside of the list's folder: {_ROOT_HINT}"


@lru_cache(maxsize=10_000)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder or "/").rstrip("/")


def describe_mistake(path: str) -> str:
    """Return what may be wrong with the path of a missing file, as a clause after a semicolon."""
    joined = _JOINED.fullmatch(path)
    if joined:
        return (
            f"; if {joined[1]!r} is the path and {joined[2]!r} its label, put a tab between them "
            "(a comma in a CSV)"
        )
    if not path.isascii() and any("\udc80" <= char <= "\udcff" for char in path):
        return "; its name is not UTF-8: if the list is, say, Latin-1, save it as UTF-8"
    return ""
