"""Pickles of `torch.save`: read without running code, and without more memory than the file has."""

import argparse
import errno
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from swinv2.bridges.checkpoints import BridgeError

PICKLES_BEFORE_TENSORS = 5
"""Pickles at the start of a file of torch before 1.6: number, protocol, system, content, keys."""
SHARED = 1000
"""Tensors that may share a storage; each names its size again."""
INTEGERS = {"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2"}
"""Operations of a pickle that put an integer on its stack."""
SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
"""Function that makes a numpy scalar from its type and its bytes, before numpy 2 and since."""


def read_pickle(file: Path) -> Any:
    """Read a pickle of tensors and plain values on to the CPU.

    Numpy scalars become plain values, namespaces stay, and settings of yacs become dictionaries.

    Raises:
        BridgeError: the file is damaged, claims to be larger than it is, or needs code to be read.
    """
    _check_sizes(file)
    # Published checkpoints also hold their settings: those of timm are a plain namespace, and yacs
    # nodes are read as dictionaries, without yacs. Scores are numpy scalars.
    known: list[Any] = [
        (OrderedDict, "yacs.config.CfgNode"),
        argparse.Namespace,
        (NumpyType, "numpy.dtype"),
        *((plain_scalar, name) for name in SCALARS),
    ]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
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


_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OSError,
)


class NumpyType:
    """A `numpy.dtype` of a pickle: its code and byte order; nothing is allocated for it."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take the byte order, the second entry of what numpy writes."""
        order = state[1]
        self.code = (order if order in ("<", ">") else "") + self.code


def plain_scalar(kind: NumpyType, data: bytes = b"") -> Any:
    """Return the plain value of a numpy scalar.

    Raises:
        UnpicklingError: it is something else than a number, a truth value or a text.
    """
    if not re.fullmatch(r"[<>]?(b1|[iu][1248]|f[248]|c8|c16|[US]\d{1,6})", kind.code):
        raise pickle.UnpicklingError(f"GLOBAL numpy.{kind.code.lstrip('<>')[:20]}")
    wanted = np.dtype(kind.code)
    if len(data) != wanted.itemsize:
        raise pickle.UnpicklingError("a numpy scalar of another length than its type")
    return np.frombuffer(data, wanted)[0].item()


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
            "writes: unpacked it could take any amount of memory. Save its tensors again with "
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


def _damaged(file: Path) -> BridgeError:
    return BridgeError(
        f"{file} is truncated, or not a PyTorch checkpoint of tensors and plain values: copy it "
        "again."
    )
