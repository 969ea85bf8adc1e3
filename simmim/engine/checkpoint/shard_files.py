"""Tensors in files: safetensors, in one part or in one for each process that holds rows of them.

A part is written from memory as it lies there, without a copy and without holding up other threads,
and forced to disk. Which rows of a tensor a part holds stands in its metadata; a tensor that is not
named there is whole.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Entry = TypeVar("Entry")

NAMES = {
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
"""What safetensors calls the types."""

ALIGNMENT = 8
"""Bytes that the header is padded to a multiple of."""


@dataclass(frozen=True, eq=False)
class Piece:
    """What one process holds of a tensor: neighbouring rows, which are indices along axis 0."""

    rows: Tensor
    first: int
    """Number of the first of them."""
    shape: tuple[int, ...]
    """Of the whole tensor."""

    @property
    def is_whole(self) -> bool:
        """Tell whether these are all rows."""
        return tuple(self.rows.shape) == self.shape


def whole(tensor: Tensor) -> Piece:
    """Return all of a tensor as a piece."""
    return Piece(tensor, 0, tuple(tensor.shape))


def part_path(folder: Path, kind: str, number: int, count: int) -> Path:
    """Return the path of one part: `model-00000-of-00001.safetensors`."""
    return folder / f"{kind}-{number:05d}-of-{count:05d}.safetensors"


def write_part(file: Path, pieces: Mapping[str, Piece]) -> None:
    """Write pieces, which lie on the CPU, as one safetensors file that is on disk at the return.

    Raises:
        OSError: it cannot be written, for want of space for example.
    """
    ordered = sorted(pieces.items(), key=lambda item: (-item[1].rows.element_size(), item[0]))
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            "rows": json.dumps(
                {name: [piece.first, *piece.shape] for name, piece in ordered if not piece.is_whole}
            ),
        }
    }
    end = 0
    for name, piece in ordered:
        start, end = end, end + piece.rows.numel() * piece.rows.element_size()
        entries[name] = {
            "dtype": NAMES[piece.rows.dtype],
            "shape": list(piece.rows.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    with file.open("wb", buffering=0) as raw:
        _write_all(raw.fileno(), len(header).to_bytes(8, "little") + header)
        for _, piece in ordered:
            if piece.rows.numel():
                flat = piece.rows.detach().contiguous().view(-1).view(torch.uint8)
                _write_all(raw.fileno(), flat.numpy().data)
        os.fsync(raw.fileno())


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


class Parts:
    """All parts of one kind in a folder, read by rows, whatever processes wrote them.

    Args:
        folder: where they are.
        kind: what their names begin with.
        file: another name, of the one file that holds everything.

    Raises:
        ValueError: parts are missing or damaged.
    """

    def __init__(self, folder: Path, kind: str, *, file: str | None = None) -> None:
        self.folder, self.kind = folder, kind
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._prefix = ""
        self._open = ExitStack()
        self._held: dict[str, list[tuple[int, int, Path, Any]]] = {}
        try:
            for path in self._files() if file is None else [folder / file]:
                self._look_into(path)
            self._check_rows()
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> "Parts":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def _files(self) -> list[Path]:
        pattern = re.compile(rf"{self.kind}-(\d+)-of-(\d+)\.safetensors")
        found = [match for path in self.folder.glob("*") if (match := pattern.fullmatch(path.name))]
        counts = {int(match[2]) for match in found} or {1}
        if len(counts) > 1:
            raise _damaged(self.folder, f"parts of {sorted(counts)} {self.kind} files lie in it")
        (count,) = counts
        return [part_path(self.folder, self.kind, number, count) for number in range(count)]

    def _look_into(self, file: Path) -> None:
        try:
            part = self._open.enter_context(safe_open(file, framework="pt", device="cpu"))
            rows = json.loads((part.metadata() or {}).get("rows", "{}"))
            for name in part.keys():  # noqa: SIM118 (no dict)
                shape = tuple(part.get_slice(name).get_shape())
                first, *of_all = rows.get(name, [0, *shape])
                count = shape[0] if shape else 1
                self._held.setdefault(name, []).append((first, first + count, file, part))
                if self.shapes.setdefault(name, tuple(of_all)) != tuple(of_all):
                    raise _damaged(file, f"{name} has another shape in another part")
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise _damaged(file, error) from None

    def _check_rows(self) -> None:
        for name, held in self._held.items():
            held.sort(key=lambda part: part[0])
            ends = [0, *(last for _, last, _, _ in held)]
            rows = self.shapes[name][0] if self.shapes[name] else 1
            if [first for first, _, _, _ in held] != ends[:-1] or ends[-1] != rows:
                raise _damaged(self.folder, f"rows of {name} are in no {self.kind} part")

    def keep_below(self, prefix: str) -> None:
        """Forget all tensors but those whose names begin with a prefix, and forget that prefix."""
        self.shapes = _below(self.shapes, prefix)
        self._held = _below(self._held, prefix)
        self._prefix = prefix

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Return rows `first` to before `last` of a tensor, on the CPU; by default all of it."""
        shape = self.shapes[name]
        if not shape:
            tensor: Tensor = self._held[name][0][3].get_tensor(self._prefix + name)
            return tensor
        last = shape[0] if last is None else last
        found = [
            part.get_slice(self._prefix + name)[max(first, begin) - begin : min(last, end) - begin]
            for begin, end, _, part in self._held[name]
            if max(first, begin) < min(last, end)
        ]
        if not found:
            _, _, _, part = self._held[name][0]
            return torch.empty(
                (0, *shape[1:]), dtype=part.get_slice(self._prefix + name)[0:1].dtype
            )
        return found[0] if len(found) == 1 else torch.cat(found)

    def read_all(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return whole tensors by name; by default all."""
        return {name: self.read(name) for name in (self.shapes if names is None else names)}


def _below(entries: Mapping[str, Entry], prefix: str) -> dict[str, Entry]:
    return {
        name.removeprefix(prefix): entry
        for name, entry in entries.items()
        if name.startswith(prefix)
    }


def _damaged(place: Path, reason: object) -> ValueError:
    text = (str(reason).splitlines() or [type(reason).__name__])[0]
    return ValueError(
        f"{place} cannot be read: {text}. Resume from an earlier checkpoint with --resume PATH."
    )
