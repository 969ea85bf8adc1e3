"""Checkpoints of other libraries: their contents, read without running code."""

import argparse
import errno
import os
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from swinv2.encoder import SwinV2
from swinv2.json_file import load_json
from swinv2.weights import read_tensors


class BridgeError(ValueError):
    """An encoder or a checkpoint that the other library, or ours, cannot express."""


@dataclass(frozen=True, kw_only=True)
class MaskedImageHead:
    """Mask token and decoder, which SimMIM adds to an encoder."""

    mask_token: Tensor
    """Mask token, which replaces masked tokens: `embed_dim` values in any shape."""
    weight: Tensor
    """Weight of the decoder, a 1x1 convolution: (stride² · in_channels, num_features, 1, 1)."""
    bias: Tensor
    """Bias of the decoder: (stride² · in_channels,)."""


@dataclass(frozen=True, kw_only=True)
class ClassifierHead:
    """A linear head on average-pooled features."""

    weight: Tensor
    """(classes, num_features)."""
    bias: Tensor
    """(classes,)."""

    def logits(self, features: Tensor) -> Tensor:
        """Turn features (batch, rows, columns, num_features) into (batch, classes)."""
        return features.mean((1, 2)) @ self.weight.T.to(features) + self.bias.to(features)


@dataclass(frozen=True, kw_only=True)
class ImportedEncoder:
    """An encoder from a checkpoint of another library, with its heads and normalisation."""

    encoder: SwinV2
    """The encoder, in float32, on the CPU, in evaluation mode."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: MaskedImageHead | None
    """Mask token and decoder, from a SimMIM pretraining."""
    classifier: ClassifierHead | None
    """Linear head of a classification model."""
    dropped: tuple[str, ...]
    """Buffers of the file that are not read: they are computed from the sizes."""
    classes: tuple[str, ...] = ()
    """Names of the classifier's classes, if the checkpoint has them."""
    fresh: tuple[str, ...] = ()
    """Tensors of the encoder that such a model lacks: they start as ones and zeros."""


PICKLES_BEFORE_TENSORS = 5
"""Pickles at the start of a file of torch before 1.6: number, protocol, system, content, keys."""
SHARED = 1000
"""Tensors that may share a storage; each names its size again."""
INTEGERS = {"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2"}
"""Operations of a pickle that put an integer on its stack."""
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that data parallelism and torch.compile add to every name."""


@dataclass(frozen=True, kw_only=True)
class CheckpointContents:
    """Contents of a checkpoint file."""

    source: str
    """The file, for messages."""
    tensors: dict[str, Tensor]
    """Tensors by name, without WRAPPERS."""
    extras: dict[str, Any]
    """Other entries by name; empty for a file of tensors only."""


def read_checkpoint(path: str | os.PathLike[str], entries: Iterable[str]) -> CheckpointContents:
    """Read a safetensors file or a pickle of tensors and plain values on to the CPU.

    Args:
        path: path of the file; safetensors files have the suffix .safetensors.
        entries: names that may hold the tensors, the preferred one first.

    Raises:
        BridgeError: the file is missing or damaged, holds no tensors, or needs code to be read.
    """
    file = Path(path)
    if not file.is_file():
        raise BridgeError(f"{file} {_describe_missing(file)}: give a checkpoint file.")
    safe = file.suffix == ".safetensors"
    content: Any = read_tensors(file, remedy="copy it again") if safe else _read_pickle(file)
    if not isinstance(content, Mapping):
        raise BridgeError(
            f"{file} holds a {type(content).__name__}, not tensors by name: give a checkpoint of a "
            "model."
        )
    held = next((name for name in entries if isinstance(content.get(name), Mapping)), None)
    named = content if held is None else content[held]
    extras = {} if held is None else {k: part for k, part in content.items() if k != held}
    tensors = {
        _unwrapped(str(name)): part for name, part in named.items() if isinstance(part, Tensor)
    }
    if not safe:
        _check_expanded(file, tensors)
    strange = [str(name) for name, part in named.items() if not isinstance(part, Tensor)]
    if strange or not tensors:
        raise BridgeError(
            f"{file} holds no tensors by name, at its top or under {', '.join(entries)}"
            + (f"; it has {', '.join(strange[:5])}" if strange else "")
            + ": give a checkpoint of a model."
        )
    return CheckpointContents(source=str(file), tensors=tensors, extras=extras)


def _describe_missing(file: Path) -> str:
    """Say why a path is not a file, with the files next to it."""
    if file.is_dir():
        return "is a folder"
    others = sorted(path.name for path in file.parent.iterdir()) if file.parent.is_dir() else []
    found = f" (the folder has {', '.join(others[:5])})" if others else ""
    return f"does not exist{found}"


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        BridgeError: it is missing or holds something else; the message ends with the remedy.
    """
    if not file.is_file():
        raise BridgeError(f"{file} {_describe_missing(file)}: {remedy}.")
    try:
        content = load_json(file)
    except ValueError as error:
        raise BridgeError(f"{file} is not valid JSON ({error}): {remedy}.") from error
    if not isinstance(content, dict):
        raise BridgeError(f"{file} does not hold a JSON object: {remedy}.")
    return content


def _check_sizes(file: Path) -> None:
    """Check, before anything of a pickle is unpacked, that it holds no more than the file.

    `torch.save` stores tensors as they are: in a zip archive without compression, and earlier
    behind a pickle.

    Raises:
        BridgeError: an entry is compressed, or what the file says of its tensors is larger than it.
    """
    length = file.stat().st_size
    try:
        if not zipfile.is_zipfile(file):
            with file.open("rb") as stream:
                for _ in range(PICKLES_BEFORE_TENSORS):
                    _check_pickle(stream, length)
            return
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            packed = [one.filename for one in entries if one.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise _TooLargeError(f"its entry {packed[0][:80]!r} is compressed")
            if (claimed := sum(one.file_size for one in entries)) > length:
                raise _TooLargeError(f"its entries claim {claimed:,} bytes")
            for one in entries:
                if one.filename.endswith("data.pkl"):
                    with archive.open(one) as stream:
                        _check_pickle(stream, length)
    except _TooLargeError as error:
        raise BridgeError(
            f"{file} was not read: it has {length:,} bytes, and {error}, which torch.save never "
            "writes: unpacked it could take any amount of memory. Save its tensors anew with "
            "torch.save({'model': state_dict}, ...)."
        ) from None
    except (ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, OverflowError):
        raise _damaged(file) from None


class _TooLargeError(Exception):
    """A pickle that claims to hold more than its file does."""


def _check_pickle(stream: IO[bytes], length: int) -> None:
    """Check the sizes that a pickle names for its tensors, without running it."""
    number, claimed = 0, 0
    for operation, argument, _ in pickletools.genops(stream):
        if isinstance(argument, int) and operation.name in INTEGERS:
            number = argument
        elif operation.name == "BINPERSID":  # a reference to a storage, which ends in its elements
            claimed += abs(number)
            if max(number, claimed // SHARED) > length:
                raise _TooLargeError(f"its tensors claim {number:,} elements")
            number = 0
        elif isinstance(argument, str) and "bytearray" in argument[:40]:
            raise _TooLargeError("it holds a bytearray, of whatever length")


def _check_expanded(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check that no tensor repeats its elements so often that it is larger than the file."""
    length = file.stat().st_size
    for name, part in tensors.items():
        if part.layout == torch.strided and part.numel() * part.element_size() > length:
            raise BridgeError(
                f"{file} was not read: it has {length:,} bytes, and its tensor {name} repeats "
                f"its elements to the shape {tuple(part.shape)}. Save it with .contiguous()."
            )


def _damaged(file: Path) -> BridgeError:
    return BridgeError(
        f"{file} is truncated, or not a PyTorch checkpoint of tensors and plain values: copy it "
        "again."
    )


def _read_pickle(file: Path) -> Any:
    _check_sizes(file)
    # Published checkpoints also hold their settings: those of timm are a plain namespace, and yacs
    # nodes are read as dictionaries, without yacs.
    known: list[Any] = [(OrderedDict, "yacs.config.CfgNode"), argparse.Namespace]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        # Some truncated files make torch seek before their start.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise _damaged(file) from error
        raise BridgeError(
            f"{file} was not read: it holds {refused[1]}, and reading that would run code. If you "
            "trust it, save only its tensors with torch.save({'model': state_dict}, ...)."
        ) from error


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name
