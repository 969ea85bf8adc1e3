"""The encoder directory, ``model.safetensors`` and ``config.json``: saved whole, loaded strictly.

The folder holds all that is needed to use the encoder: every size, the windows it was pretrained
with, how its images were normalised and where it comes from; ``README.md`` has the lines that load
it. Nothing in it can run code.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swinv2.atomic import OccupiedError, atomic_folder, atomic_write_bytes, atomic_write_text
from swinv2.config import record_windows
from swinv2.encoder import SwinV2
from swinv2.encoder_file import (
    FORMATS,
    EncoderFile,
    Provenance,
    WeightsError,
    from_json,
    to_json,
    to_readme,
)

__all__ = [
    "EncoderFile",
    "OccupiedError",
    "Provenance",
    "WeightsError",
    "atomic_folder",
    "atomic_write_bytes",
    "atomic_write_text",
    "load_encoder",
    "load_strictly",
    "read_encoder_config",
    "read_tensors",
    "save_encoder",
    "write_tensors",
]

Encoder = TypeVar("Encoder", bound=nn.Module)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
README_FILE = "README.md"
HEAD_FOLDERS = frozenset({"classifier", "segmentation", "detection"})
"""Folders that may stand beside these files, with heads that were trained on the encoder."""


def save_encoder(
    encoder: SwinV2,
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    provenance: Provenance | None = None,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Write ``encoder`` as the directory ``path`` and return it; an earlier encoder is replaced.

    The windows of the present sizes are recorded as pretraining windows, unless some are recorded
    already: whatever size the encoder is loaded at, its position bias keeps its coordinates.

    Args:
        encoder: on any device; it is left as it is.
        path: a new or empty folder, or an encoder directory.
        mean: one value a channel, for images in [0, 1].
        std: one positive value a channel.
        provenance: steps, samples and recipe behind the weights.
        check: is given the written folder before it takes its place; where it raises, ``path``
            stays as it was.

    Raises:
        ValueError: ``mean`` or ``std`` does not fit the channels, or ``path`` is occupied.
    """
    config = encoder.config
    if config.pretrained_window_sizes is None:
        config = replace(config, pretrained_window_sizes=record_windows(config))
    description = EncoderFile(
        config=config,
        mean=tuple(float(value) for value in mean),
        std=tuple(float(value) for value in std),
        provenance=provenance or Provenance(),
    )
    return write_directory(
        encoder, path, config=to_json(description), readme=to_readme(description), check=check
    )


def write_directory(
    encoder: nn.Module,
    path: str | os.PathLike[str],
    *,
    config: str,
    readme: str,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Write the tensors of an encoder and the texts of two files as the directory ``path``.

    Raises:
        ValueError: ``path`` is occupied by something that is no encoder directory.
    """
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in encoder.state_dict().items()
    }
    with atomic_folder(path, may_replace=is_encoder_directory) as folder:
        write_tensors(folder / WEIGHTS_FILE, tensors)
        (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
        (folder / README_FILE).write_text(readme, encoding="utf-8")
        if check is not None:
            check(folder)
    return Path(path)


def load_encoder(
    path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    window_size: int | tuple[int, int] | None = None,
    drop_path: float | None = None,
) -> SwinV2:
    """Build the encoder that the directory ``path`` holds, on the CPU, in evaluation mode.

    ``load_encoder("encoders/mine", image_size=384, window_size=24)`` transfers an encoder to larger
    images. Windows should grow with the images: each then covers the same part of the image, in
    more tokens. No weight changes: the position bias comes from an MLP, evaluated on the offsets of
    the new window, in coordinates of the windows that `save_encoder` recorded (paper, section 3.3).
    Those stay recorded whatever is saved, loaded or set afterwards, so that a transfer in steps
    equals a direct one, and the way back restores the features, bit for bit.

    Args:
        path: what `save_encoder` wrote.
        image_size: nominal (height, width) in pixels, where it differs from the saved one.
        window_size: window (height, width) in tokens, where it differs from the saved one. A stage
            of fewer tokens takes one window over all of it.
        drop_path: greatest rate of stochastic depth, where it differs from the saved one.

    Raises:
        ValueError: ``path`` is no encoder directory, does not hold every tensor of the encoder, or
            a size cannot work.
    """
    folder = Path(path)
    config = read_encoder_config(folder).config
    sizes: dict[str, Any] = {
        "image_size": image_size,
        "window_size": window_size,
        "drop_path": drop_path,
    }
    config = replace(config, **{name: size for name, size in sizes.items() if size is not None})
    return filled(lambda: SwinV2(config), folder / WEIGHTS_FILE)


def filled(build: Callable[[], Encoder], file: Path) -> Encoder:
    """Build an encoder with the weights in a file, in evaluation mode.

    That they fit is seen before it takes memory, since a wrong ``config.json`` may ask for any.

    Raises:
        ValueError: as for `load_strictly`.
    """
    tensors = read_tensors(file)
    with torch.device("meta"):
        check_fit(build(), tensors, str(file))
    encoder = build()
    encoder.load_state_dict(tensors, strict=True)
    return encoder.eval()


def read_encoder_config(path: str | os.PathLike[str]) -> EncoderFile:
    """Return what the ``config.json`` of the encoder directory ``path`` says.

    Raises:
        ValueError: there is none, or it is not one that this version can read.
    """
    return from_json(*config_text(path))


def config_text(path: str | os.PathLike[str]) -> tuple[str, Path]:
    """Return the text of the ``config.json`` of an encoder directory, and the file.

    Raises:
        ValueError: there is none.
    """
    folder = Path(path)
    _check_encoder_directory(folder)
    file = folder / CONFIG_FILE
    return file.read_text(encoding="utf-8", errors="replace"), file


def is_encoder_directory(path: Path) -> bool:
    """Tell whether ``path`` is a folder that `write_directory` wrote, and holds but heads else."""
    names = {place.name for place in path.iterdir()} if path.is_dir() else set()
    required = {CONFIG_FILE, WEIGHTS_FILE}  # early versions wrote no README
    if not required <= names <= required | HEAD_FOLDERS | {README_FILE}:
        return False
    try:
        content = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("format") in FORMATS


def read_tensors(
    path: str | os.PathLike[str], *, remedy: str = "export the encoder again"
) -> dict[str, Tensor]:
    """Read a safetensors file on to the CPU.

    Args:
        path: of the file.
        remedy: how to come by a whole one, for the message.

    Raises:
        ValueError: the file is absent, cut short, or of a format that can run code when read.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        raise WeightsError(
            f"{file} is not a .safetensors file, and formats that can run code are not read: "
            "convert it with safetensors.torch.save_file first."
        )
    if not file.is_file():
        raise WeightsError(f"{file} is absent: the weights are missing; {remedy}.")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise WeightsError(
            f"{file} is cut short or no safetensors file ({error}): {remedy}."
        ) from error


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous tensors as a safetensors file.

    Raises:
        OSError: the file cannot be written, for want of space for example.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{os.fspath(path)} cannot be written ({error}).") from error


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy ``tensors`` into ``module``, which must match them name for name and shape for shape.

    Args:
        module: every persistent tensor of it is overwritten.
        tensors: by name; they are converted to the module's type.
        source: where the tensors come from, for the message.

    Raises:
        ValueError: some are missing, unexpected or of another shape; all of them are listed and the
            module is left as it was.
    """
    check_fit(module, tensors, source)
    module.load_state_dict(dict(tensors), strict=True)


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise what `load_strictly` does, and load nothing."""
    expected = module.state_dict()
    problems = [f"missing: {name}" for name in expected if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in expected]
    problems += [
        f"shape of {name}: {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        raise WeightsError(
            f"{source} does not fit {type(module).__name__}; use the weights of the same variant "
            "and sizes, or change the configuration to theirs:\n  " + "\n  ".join(problems)
        )


def _check_encoder_directory(path: Path) -> None:
    if not path.exists():
        raise WeightsError(f"{path} does not exist: give an encoder directory.")
    if not path.is_dir():
        raise WeightsError(
            f"{path} is a file: give an encoder directory, a folder with {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}. Pickled weights (.pth, .pt, .bin) can run code and are not read."
        )
    if not (path / CONFIG_FILE).is_file():
        raise WeightsError(
            f"{path} holds no {CONFIG_FILE}: give an encoder directory, "
            "as `simmim export --format native` and `save_encoder` write it."
        )
