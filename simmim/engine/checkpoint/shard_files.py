"""Safetensors files that hold whole tensors, or rows of tensors that ranks share.

A file is written straight from memory, without a copy and without the GIL, and flushed to disk. Its
metadata says which rows of a tensor it holds; a tensor that is not listed there is whole.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simmim.engine.checkpoint.digests import FileDigest
from simmim.engine.checkpoint.directory import check_file, shard_path, unreadable_message

Entry = TypeVar("Entry")

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the dtypes in safetensors."""

_RANGES = TypeAdapter(dict[str, Annotated[list[NonNegativeInt], Field(min_length=1)]])
ALIGNMENT = 8
"""The header is padded to a multiple of this many bytes."""


@dataclass(frozen=True, eq=False)
class TensorShard:
    """Consecutive rows (indices along axis 0) of a tensor, held by one rank."""

    rows: Tensor
    first: int
    """Index of the first row."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows."""
        return tuple(self.rows.shape) == self.shape


def whole_tensor(tensor: Tensor) -> TensorShard:
    """Return a shard that holds all rows of a tensor."""
    return TensorShard(tensor, 0, tuple(tensor.shape))


def write_shards(file: Path, shards: Mapping[str, TensorShard]) -> FileDigest:
    """Write shards of tensors on the CPU to one safetensors file and flush it to disk.

    Returns:
        The digest of what was written.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    ordered = sorted(shards.items(), key=lambda item: (-item[1].rows.element_size(), item[0]))
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            "rows": json.dumps(
                {name: [shard.first, *shard.shape] for name, shard in ordered if not shard.is_whole}
            ),
        }
    }
    end = 0
    for name, shard in ordered:
        start, end = end, end + shard.rows.numel() * shard.rows.element_size()
        entries[name] = {
            "dtype": DTYPE_NAMES[shard.rows.dtype],
            "shape": list(shard.rows.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    begin = len(header).to_bytes(8, "little") + header
    hashed = hashlib.sha256(begin)
    with file.open("wb", buffering=0) as raw:
        _write_all(raw.fileno(), begin)
        for _, shard in ordered:
            if shard.rows.numel():
                flat = shard.rows.detach().contiguous().view(-1).view(torch.uint8)
                hashed.update(flat.numpy().data)  # 1 s of one core for each GiB, without the GIL
                _write_all(raw.fileno(), flat.numpy().data)
        os.fsync(raw.fileno())
    return FileDigest(len(begin) + end, hashed.hexdigest())


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def shard_files(folder: Path, kind: str) -> list[Path]:
    """Return the paths of all shard files of one kind in a folder, the missing ones included.

    Raises:
        ValueError: there are files of several sets.
    """
    pattern = re.compile(rf"{kind}-(\d+)-of-(\d+)\.safetensors")
    found = [match for path in folder.glob("*") if (match := pattern.fullmatch(path.name))]
    counts = {int(match[2]) for match in found} or {1}
    if len(counts) > 1:
        raise _damaged(folder, f"it mixes sets of {sorted(counts)} {kind} files")
    (count,) = counts
    if count > max(1, 2 * len(found)):
        raise _damaged(folder, f"it has {len(found)} of {count:,} {kind} files")
    return [shard_path(folder, kind, number, count) for number in range(count)]


def read_ranges(text: str) -> dict[str, list[int]]:
    """Read the part of a header that says which rows a file holds: name → first row and shape.

    Raises:
        ValueError: it says something else; the message is the reason.
    """
    try:
        return _RANGES.validate_json(text, strict=True)
    except ValidationError:
        raise ValueError("its header does not say which rows it holds") from None


class ShardFiles:
    """Reader of all shard files of one kind in a folder, by rows, for any number of ranks.

    Args:
        folder: folder of the files.
        kind: prefix of their names.
        file: name of a single file to read instead.
        verified: the digests have been compared already.

    Raises:
        ValueError: files or rows are missing or damaged.
    """

    def __init__(
        self, folder: Path, kind: str, *, file: str | None = None, verified: bool = False
    ) -> None:
        self.folder, self.kind = folder, kind
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._prefix = ""
        self._open = ExitStack()
        self._held: dict[str, list[tuple[int, int, Path, Any]]] = {}
        self._replaced: dict[str, Tensor] = {}
        try:
            for path in shard_files(folder, kind) if file is None else [folder / file]:
                self._read_header(path)
                if not verified:
                    check_file(path)
            self._check_rows()
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> "ShardFiles":
        return self

    def close(self) -> None:
        """Close the files."""
        self._open.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def _read_header(self, path: Path) -> None:
        try:
            file = self._open.enter_context(safe_open(path, framework="pt", device="cpu"))
            ranges = read_ranges((file.metadata() or {}).get("rows", "{}"))
            held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError, ValueError) as error:
            raise _damaged(path, error) from None
        unknown = sorted(ranges.keys() - held.keys())
        if unknown:
            raise _damaged(path, f"it has rows of {unknown[0]} in its header, but no such tensor")
        for name, held_shape in held.items():
            first, *shape = ranges.get(name, [0, *held_shape])
            count = held_shape[0] if held_shape else 1
            if name in ranges and (not shape or held_shape[1:] != tuple(shape[1:])):
                raise _damaged(
                    path, f"{name} has the shape {list(held_shape)} in it, as rows of {shape}"
                )
            if shape and not 0 <= first <= first + count <= shape[0]:
                raise _damaged(
                    path,
                    f"it has rows {first} to {first + count} of {name}, which has {shape[0]} rows",
                )
            self._held.setdefault(name, []).append((first, first + count, path, file))
            if self.shapes.setdefault(name, tuple(shape)) != tuple(shape):
                raise _damaged(path, f"{name} has another shape in another file")

    def _check_rows(self) -> None:
        for name, held in self._held.items():
            held.sort(key=lambda shard: shard[0])
            ends = [0, *(last for _, last, _, _ in held)]
            rows = self.shapes[name][0] if self.shapes[name] else 1
            if [first for first, _, _, _ in held] != ends[:-1] or ends[-1] != rows:
                raise _damaged(self.folder, f"rows of {name} are missing in the {self.kind} files")

    def replace(self, name: str, tensor: Tensor) -> None:
        """Read this tensor under a name from now on, in place of the one in the files."""
        self._replaced[name] = tensor
        self.shapes[name] = tuple(tensor.shape)

    def keep_below(self, prefix: str) -> None:
        """Drop all tensors whose names do not begin with a prefix; strip it from the others."""
        self.shapes = _below(self.shapes, prefix)
        self._held = _below(self._held, prefix)
        self._prefix = prefix

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Return rows `first` to `last` (exclusive) of a tensor, on the CPU; all by default."""
        shape = self.shapes[name]
        if name in self._replaced:
            return self._replaced[name][first:last]
        if not shape:
            tensor: Tensor = self._held[name][0][3].get_tensor(self._prefix + name)
            return tensor
        last = shape[0] if last is None else last
        found = [
            file.get_slice(self._prefix + name)[max(first, begin) - begin : min(last, end) - begin]
            for begin, end, _, file in self._held[name]
            if max(first, begin) < min(last, end)
        ]
        if not found:
            _, _, _, file = self._held[name][0]
            return torch.empty(
                (0, *shape[1:]), dtype=file.get_slice(self._prefix + name)[0:1].dtype
            )
        return found[0] if len(found) == 1 else torch.cat(found)

    def read_all(self) -> dict[str, Tensor]:
        """Return all tensors, whole, by name."""
        return {name: self.read(name) for name in self.shapes}


def _below(entries: Mapping[str, Entry], prefix: str) -> dict[str, Entry]:
    return {
        name.removeprefix(prefix): entry
        for name, entry in entries.items()
        if name.startswith(prefix)
    }


def _damaged(path: Path, reason: object) -> ValueError:
    text = (str(reason).splitlines() or [type(reason).__name__])[0]
    return ValueError(unreadable_message(path, text))
