"""The encoder as an ONNX model, for onnxruntime and others.

It is converted from the graph of `swinv2.bridges.torch_export`: the same input and maps, a dynamic
batch size, and with `any_size` dynamic height and width. The model has opset 18, which torch writes
without a version conversion, in float32. Weights that do not fit into one file with the model, two
gigabytes, are in `model.onnx.data` next to it.

Measured with torch 2.13 and onnxruntime 1.32, in seconds on one CPU core, comparison included:

    tiny, 256 pixels, window 8     117 MB, 17 s     any size  114 MB, 34 s
    base, 192 pixels, window 12    350 MB, 36 s     any size  351 MB, 38 s
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

from swinv2.bridges.checkpoints import BridgeError, ClassifierHead
from swinv2.bridges.preprocessing import WHOLE_PICTURES, Preparation
from swinv2.bridges.torch_export import (
    INPUT,
    PlainModel,
    compare_outputs,
    trace,
    write_graph,
)
from swinv2.bridges.verification import Report, ignore
from swinv2.encoder import SwinV2

MODEL_FILE = "model.onnx"
EXTERNAL_DATA_FILE = "model.onnx.data"
OPSET = 18
LARGEST_FILE = 2**31 - 2**27
"""Bytes of weights that fit into one file with the model, which ends at 2**31."""

_EXTENSION_LOGGER = "torch.onnx._internal.exporter._registration"


def export_onnx(
    encoder: SwinV2,
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    classifier: ClassifierHead | None = None,
    classes: Sequence[str] = (),
    any_size: bool = False,
    preparation: Preparation = WHOLE_PICTURES,
    images: Tensor | None = None,
    report: Report = ignore,
) -> Path:
    """Write `encoder` as `model.onnx`, run and compared with PyTorch before it is kept.

    Args:
        encoder: not changed; use `SwinV2.set_input` first to export it at another size.
        path: a new or empty folder, or an earlier export.
        mean: one value per channel, for images in [0, 1].
        std: one positive value per channel.
        classifier: a linear head on average-pooled features.
        classes: names of its classes, if known.
        any_size: make height and width dynamic.
        preparation: how pictures are prepared.
        images: normalised (batch, channels, height, width), to compare the outputs on; by default
            a zone plate.
        report: called with the largest difference of the outputs.

    Raises:
        BridgeError: onnx or onnxscript is not installed, the model computes something different
            from PyTorch, or the classifier or the names of its classes do not fit.
        ValueError: `mean` or `std` does not fit the channels, or `path` holds other files.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise BridgeError(
            f"{' and '.join(missing)} {verb} not installed, and needed to write the model: "
            "pip install 'simmim[export]'."
        )

    def write(model: PlainModel, folder: Path) -> str:
        _write_model(model, folder / MODEL_FILE, any_size=any_size)
        return _compare(model, folder / MODEL_FILE, images, any_size=any_size)

    return write_graph(
        encoder,
        path,
        kind="onnx",
        files={MODEL_FILE, EXTERNAL_DATA_FILE},
        write=write,
        example=_EXAMPLE,
        mean=mean,
        std=std,
        classifier=classifier,
        classes=classes,
        any_size=any_size,
        preparation=preparation,
        report=report,
    )


_EXAMPLE = f"""import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{MODEL_FILE}")
images = np.zeros((SHAPE), np.float32)  # yours, prepared as below
RESULT = session.run(None, {{"{INPUT}": images}})"""


def _write_model(model: PlainModel, file: Path, *, any_size: bool) -> None:
    names = {0: "batch", 2: "height", 3: "width"} if any_size else {0: "batch"}
    program = trace(model, any_size=any_size)
    with _silence_torch():
        written: Any = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=model.output_names,
            opset_version=OPSET,
            dynamic_shapes={INPUT: names},
            dynamo=True,
            verbose=False,
        )
    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    written.save(file, external_data=weights > LARGEST_FILE)


def _compare(model: PlainModel, file: Path, images: Tensor | None, *, any_size: bool) -> str:
    if find_spec("onnxruntime") is None:
        return "not compared: onnxruntime is not installed (pip install 'simmim[export]')"
    import onnxruntime  # noqa: PLC0415 - an optional part

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        outputs = session.run(model.output_names, {INPUT: images.numpy()})
        return [torch.from_numpy(array) for array in outputs]

    return compare_outputs(model, run, images, any_size=any_size)


@contextmanager
def _silence_torch() -> Iterator[None]:
    """Silence torch about its own code: a deprecated call, and a missing torchvision."""
    logger = logging.getLogger(_EXTENSION_LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*treespec, LeafSpec", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
