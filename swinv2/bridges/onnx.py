"""The encoder as an ONNX model, for onnxruntime and others.

The batch is open; height and width are those of the encoder, or open too with `any_size`: then
windows, shifts, padding and masks are computed in the graph, and one pixel is enough. The model is
of opset 18, which torch writes without converting, in float32. Weights that do not fit into one
file with the model, two gigabytes, are in ``model.onnx.data`` beside it.

Measured with torch 2.13 and onnxruntime 1.32, in seconds of one CPU core, comparison included:

    tiny, 256 pixels, window 8     118 MB, 25 s     any size  112 MB, 59 s
    base, 192 pixels, window 12    358 MB, 48 s     any size  350 MB, 77 s
"""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swinv2.atomic import atomic_folder
from swinv2.bridges.contents import BridgeError
from swinv2.bridges.graphs import (
    INPUT,
    compare_maps,
    is_graph_export,
    output_names,
    trace,
    write_description,
    write_readme,
)
from swinv2.bridges.verification import Report, ignore, plain_copy
from swinv2.config import SwinV2Config
from swinv2.config_file import check_normalisation
from swinv2.encoder import SwinV2

MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
OPSET = 18
LARGEST_FILE = 2**31 - 2**27
"""Bytes of weights that go into one file with the model, which ends at 2**31."""

_SEES_EXTENSIONS = "torch.onnx._internal.exporter._registration"


def export_onnx(
    encoder: SwinV2,
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    any_size: bool = False,
    images: Tensor | None = None,
    report: Report = ignore,
) -> Path:
    """Write ``encoder`` as ``model.onnx``, run and compared with PyTorch before it is kept.

    Args:
        encoder: left as it is; use `SwinV2.set_input` first to export it at another size.
        path: a new or empty folder, or an earlier export.
        mean: one value a channel, for images in [0, 1].
        std: one positive value a channel.
        any_size: leave height and width open.
        images: to compare the maps on, as the encoder takes them; a picture where there are none.
        report: is told how far the maps are apart.

    Raises:
        BridgeError: onnx or onnxscript is missing, or what the model gives differs from PyTorch.
        ValueError: ``mean`` or ``std`` does not fit the channels, or ``path`` is occupied.
    """
    config = encoder.config
    check_normalisation(mean, std, config.in_channels)
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise BridgeError(
            f"{' and '.join(missing)} not installed, which write the model: "
            "pip install 'simmim[export]'"
        )
    with atomic_folder(path, may_replace=is_onnx_export) as folder:
        plain = plain_copy(encoder).requires_grad_(False)
        _write_model(plain, folder / MODEL_FILE, any_size=any_size)
        report(_compare(plain, folder / MODEL_FILE, images, any_size=any_size))
        write_description(folder, "onnx", config, mean=mean, std=std, any_size=any_size)
        write_readme(folder, config, _lines(config), any_size=any_size)
    return Path(path)


def is_onnx_export(path: Path) -> bool:
    """Tell whether ``path`` is what `export_onnx` wrote, and holds nothing else."""
    return is_graph_export(path, "onnx", {MODEL_FILE, WEIGHTS_FILE})


def _write_model(plain: SwinV2, file: Path, *, any_size: bool) -> None:
    names = {0: "batch", 2: "height", 3: "width"} if any_size else {0: "batch"}
    program = trace(plain, any_size=any_size)
    with _quiet():
        model: Any = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=output_names(plain.config),
            opset_version=OPSET,
            dynamic_shapes={INPUT: names},
            dynamo=True,
            verbose=False,
        )
    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    model.save(file, external_data=weights > LARGEST_FILE)


def _compare(plain: SwinV2, file: Path, images: Tensor | None, *, any_size: bool) -> str:
    if find_spec("onnxruntime") is None:
        return "not compared: onnxruntime is not installed (pip install 'simmim[export]')"
    import onnxruntime  # noqa: PLC0415 - an optional part

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        maps = session.run(output_names(plain.config), {INPUT: images.numpy()})
        return [torch.from_numpy(one) for one in maps]

    return compare_maps(plain, run, images, any_size=any_size)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch says to itself from users: a form it uses is old, torchvision is absent."""
    logger = logging.getLogger(_SEES_EXTENSIONS)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*treespec, LeafSpec", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _lines(config: SwinV2Config) -> str:
    shape = ", ".join(str(side) for side in (1, config.in_channels, *config.image_size))
    return f"""import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{MODEL_FILE}")
images = np.zeros(({shape}), np.float32)  # yours, prepared as below
maps = session.run(None, {{"{INPUT}": images}})"""
