"""Digests of the files of a checkpoint: taken while they are written, compared when they are read.

Every rank notes the size and SHA-256 of what it has written in a file of its own; rank 0 joins the
notes in the file that marks the checkpoint complete. Checkpoints of earlier versions have none.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

READ_AT_ONCE = 2**20
"""Bytes that are read at once to take the digest of a file."""
NOTE = re.compile(r"digests-\d+\.json")
"""Name of a rank's note, as long as the checkpoint is being written."""


@dataclass(frozen=True)
class FileDigest:
    """Size and digest of a file."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    bytes: int
    sha256: str
    """SHA-256 in hexadecimal digits, as `sha256sum` prints it."""


@dataclass(frozen=True)
class _Marker:
    """Content of the file that marks a checkpoint complete."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    files: dict[str, FileDigest]
    """Every other file of the checkpoint, by name."""


_MARKER, _NOTE = TypeAdapter(_Marker), TypeAdapter(dict[str, FileDigest])


def digest_text(text: str) -> FileDigest:
    """Return the digest of a file that holds `text` as UTF-8."""
    data = text.encode()
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


def digest_file(file: Path) -> FileDigest:
    """Read a file and return its digest.

    Raises:
        OSError: it cannot be read.
    """
    hashed, length = hashlib.sha256(), 0
    with file.open("rb", buffering=0) as stream:
        while data := stream.read(READ_AT_ONCE):
            hashed.update(data)
            length += len(data)
    return FileDigest(length, hashed.hexdigest())


def note_digests(folder: Path, rank: int, digests: Mapping[str, FileDigest]) -> Path:
    """Write the digests of the files that one rank has written into `folder`."""
    file = folder / f"digests-{rank:05d}.json"
    file.write_text(json.dumps({name: asdict(found) for name, found in digests.items()}))
    return file


def join_notes(folder: Path) -> str:
    """Return the text of the marker for the files in `folder`, and remove the ranks' notes.

    Raises:
        OSError: a file cannot be read.
    """
    digests: dict[str, FileDigest] = {}
    notes = [path for path in folder.iterdir() if NOTE.fullmatch(path.name)]
    for note in notes:
        digests |= _NOTE.validate_json(note.read_bytes())
        note.unlink()
    for file in folder.iterdir():
        if file.name not in digests:
            digests[file.name] = digest_file(file)
    return json.dumps({"files": {name: asdict(digests[name]) for name in sorted(digests)}}) + "\n"


def read_marker(file: Path) -> dict[str, FileDigest] | None:
    """Return the digests in the marker of a checkpoint; None if it was written without any.

    Raises:
        ValueError: the marker cannot be read; the message is the reason.
    """
    try:
        data = file.read_bytes()
        return _MARKER.validate_json(data).files if data else None
    except OSError as error:
        raise ValueError(error.strerror or type(error).__name__) from None
    except ValidationError:
        raise ValueError("it does not hold the digests of the checkpoint's files") from None


def describe_difference(recorded: FileDigest, found: FileDigest) -> str | None:
    """Return how a file differs from what was written; None if it does not."""
    if found.bytes != recorded.bytes:
        return f"it has {found.bytes:,} bytes, and {recorded.bytes:,} were written"
    if found.sha256 != recorded.sha256:
        return "its content is not what was written (the SHA-256 differs)"
    return None
