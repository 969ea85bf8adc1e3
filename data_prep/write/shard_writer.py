"""WebDataset tar writer that hashes and indexes in the same pass.

The bytes are identical to those of webdataset's TarWriter (tested). Headers are filled in from a
template, since building each with tarfile would take longer than all the rest.
"""

import hashlib
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.format.index import IndexedTar, ShardIndex
from data_prep.format.manifest import IMAGE_EXTENSIONS

_BLOCK = 512
"""Block size of a tar; a member is a header block and its data, padded with zeros."""
_ZEROS = bytes(_BLOCK)
_RECORD = 20 * _BLOCK
_BUFFER = 2**20
_MAX_NAME_BYTES = 100
_MAX_MEMBER_BYTES = 8**11 - 1


class ShardWriter:
    """Writes samples into a tar and records the offsets of their images.

    The tar depends on the samples alone, not on date or user.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=_BUFFER)
        self._digest = hashlib.sha256()
        self._length = 0
        self._places: list[tuple[int, int, int]] = []
        self._names: list[tuple[str, str]] = []

    def write(self, key: str, members: Mapping[str, bytes], label: int) -> None:
        """Write a sample.

        Args:
            key: key, at most 90 ASCII characters.
            members: extension → data, exactly one of which is an image.
            label: class, -1 if it has none.
        """
        parts: list[bytes] = []
        for extension in sorted(members):
            data = members[extension]
            parts.append(_header(f"{key}.{extension}".encode("ascii"), len(data)))
            self._length += _BLOCK
            if extension in IMAGE_EXTENSIONS:
                self._places.append((self._length, len(data), label))
                self._names.append((key, extension))
            fill = _ZEROS[: -len(data) % _BLOCK]
            parts += (data, fill)
            self._length += len(data) + len(fill)
        self._put(b"".join(parts))  # at once, since each write and digest has its own overhead

    def finish(self) -> IndexedTar:
        """End the tar, sync it to disk, and return its index.

        Raises:
            OSError: the disk is full.
        """
        end = bytes(2 * _BLOCK + -(self._length + 2 * _BLOCK) % _RECORD)
        self._length += len(end)
        self._put(end)
        self._file.flush()
        os.fsync(self._file.fileno())
        places = np.array(self._places, dtype=np.int64).reshape(-1, 3)
        index = ShardIndex(
            offsets=places[:, 0],
            sizes=places[:, 1],
            labels=places[:, 2],
            keys=np.array([key for key, _ in self._names], dtype=np.str_),
            extensions=np.array([extension for _, extension in self._names], dtype=np.str_),
        )
        return IndexedTar(
            index=index,
            bytes=self._length,
            sha256=self._digest.hexdigest(),
            without_image=0,
        )

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)


def _make_template() -> bytes:
    member = tarfile.TarInfo("")
    member.mode = 0o444
    return member.tobuf(tarfile.USTAR_FORMAT)


_TEMPLATE = _make_template()
# Name, size and checksum are left out of the sum; the checksum's own bytes count as spaces.
_TEMPLATE_SUM = sum(_TEMPLATE[:124]) + sum(_TEMPLATE[136:148]) + 8 * 32 + sum(_TEMPLATE[156:])


def _header(name: bytes, size: int) -> bytes:
    """Return the header of a plain member without a date."""
    assert len(name) <= _MAX_NAME_BYTES, name
    if size > _MAX_MEMBER_BYTES:
        raise ValueError(
            f"{name.decode()} has {size:,} bytes; a tar member has at most 8 GiB. Exclude it."
        )
    length = b"%011o\0" % size
    total = _TEMPLATE_SUM + sum(name) + sum(length)
    return b"".join(
        (
            name.ljust(_MAX_NAME_BYTES, b"\0"),
            _TEMPLATE[100:124],
            length,
            _TEMPLATE[136:148],
            b"%06o\0 " % total,
            _TEMPLATE[156:],
        )
    )
