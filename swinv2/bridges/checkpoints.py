"""Checkpoint files of other libraries: read without running anything that they hold."""

import argparse
import errno
import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swinv2.encoder import SwinV2
from swinv2.weights import read_tensors


class BridgeError(ValueError):
    """An encoder or a checkpoint that the other side cannot express as it is."""


@dataclass(frozen=True, kw_only=True)
class MaskedImageHead:
    """The tensors that SimMIM adds to an encoder."""

    mask_token: Tensor
    """What stands for a hidden token, ``embed_dim`` values in any shape."""
    weight: Tensor
    """The decoder's 1x1 convolution (stride² · in_channels, num_features, 1, 1)."""
    bias: Tensor
    """Its bias (stride² · in_channels,)."""


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A linear head on average-pooled features."""

    weight: Tensor
    """(classes, num_features)."""
    bias: Tensor
    """(classes,)."""

    def logits(self, features: Tensor) -> Tensor:
        """Turn features (batch, rows, columns, num_features) into (batch, classes)."""
        return features.mean((1, 2)) @ self.weight.T.to(features) + self.bias.to(features)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What a checkpoint of another library holds, as ours."""

    encoder: SwinV2
    """In float32, on the CPU, in evaluation mode."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: MaskedImageHead | None
    """Mask token and decoder, from a SimMIM pretraining."""
    classifier: Classifier | None
    """From a classification."""
    dropped: tuple[str, ...]
    """Buffers of the file, which are computed from the sizes."""
    classes: tuple[str, ...] = ()
    """Names of the classifier's classes, where the checkpoint has them."""
    fresh: tuple[str, ...] = ()
    """Our tensors that a model of that kind has not: they start as ones and zeros."""


WRAPPERS = ("module.", "_orig_mod.")
"""What data parallelism and torch.compile put before every name."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a file holds."""

    source: str
    """The file, for messages."""
    tensors: dict[str, Tensor]
    """By their own names, without wrappers."""
    extras: dict[str, Any]
    """What stands beside the tensors, by name; empty for a file of tensors alone."""


def read_checkpoint(path: str | os.PathLike[str], entries: Iterable[str]) -> Checkpoint:
    """Read a safetensors file or a pickle of tensors and plain values on to the CPU.

    Args:
        path: ends in .safetensors where it is one.
        entries: under which names the tensors may stand, the preferred one first.

    Raises:
        BridgeError: the file is absent or damaged, holds no tensors, or needs code to be read.
    """
    file = Path(path)
    if not file.is_file():
        raise BridgeError(f"{file} {_instead(file)}: give a checkpoint file.")
    safe = file.suffix == ".safetensors"
    content: Any = read_tensors(file, remedy="copy it again") if safe else _read_pickle(file)
    if not isinstance(content, Mapping):
        raise BridgeError(f"{file} holds a {type(content).__name__}, not tensors by name.")
    held = next((name for name in entries if isinstance(content.get(name), Mapping)), None)
    named = content if held is None else content[held]
    extras = {} if held is None else {k: part for k, part in content.items() if k != held}
    tensors = {
        _unwrapped(str(name)): part for name, part in named.items() if isinstance(part, Tensor)
    }
    strange = [str(name) for name, part in named.items() if not isinstance(part, Tensor)]
    if strange or not tensors:
        raise BridgeError(
            f"{file} holds no tensors by name, at its top or under {', '.join(entries)}"
            + (f"; it has {', '.join(strange[:5])}" if strange else "")
            + ": give a checkpoint of a model."
        )
    return Checkpoint(source=str(file), tensors=tensors, extras=extras)


def _instead(file: Path) -> str:
    """Say what there is in the place of a file that is none."""
    if file.is_dir():
        return "is a folder"
    beside = sorted(path.name for path in file.parent.iterdir()) if file.parent.is_dir() else []
    return f"does not exist (there are {', '.join(beside[:5])})" if beside else "does not exist"


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """Read a file of fields by name.

    Raises:
        BridgeError: it is absent or holds something else; the message ends with the remedy.
    """
    if not file.is_file():
        raise BridgeError(f"{file} {_instead(file)}: {remedy}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BridgeError(f"{file} is not valid JSON ({error}): {remedy}.") from error
    if not isinstance(content, dict):
        raise BridgeError(f"{file} does not hold fields by name: {remedy}.")
    return content


def _read_pickle(file: Path) -> Any:
    # Published checkpoints carry their settings too: those of timm are a plain namespace, and the
    # nodes of yacs are read as dictionaries, without yacs.
    known: list[Any] = [(OrderedDict, "yacs.config.CfgNode"), argparse.Namespace]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        # A file that is cut short in some places makes torch look before its start.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise BridgeError(
                f"{file} is cut short, or no checkpoint of PyTorch with tensors and plain values "
                "alone: copy it again."
            ) from error
        raise BridgeError(
            f"{file} was not read: it holds {refused[1]}, and reading that would run code. Where "
            "you trust it, keep its tensors alone with torch.save({'model': state_dict}, ...)."
        ) from error


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name
