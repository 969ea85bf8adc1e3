"""Weights to start from: another run's, a checkpoint's or an encoder directory's."""

from pathlib import Path

from torch import nn

from simmim.engine.checkpoint.directory import COMPLETE, MODEL, complete_checkpoints
from simmim.engine.checkpoint.ema import load_average
from simmim.engine.checkpoint.shard_files import Parts
from simmim.engine.checkpoint.sharded_state import restore_model

ENCODER_FOLDER, ENCODER_FILE = "encoder", "model.safetensors"
ENCODER = "model.encoder"
"""Where a stage's module has its encoder."""


def load_initial(path: Path, module: nn.Module) -> str:
    """Load the weights at `path` into what is to be trained: no optimiser, no place in the data.

    A model of other parts than `module`, of another stage for example, gives its encoder alone.
    Where a checkpoint has averages of its weights, they are what is loaded.

    Args:
        path: a checkpoint, a run folder (its last complete checkpoint is taken, or its encoder),
            or an encoder directory.
        module: of a stage; the processes may have shards of it.

    Returns:
        A line that tells what was loaded.

    Raises:
        ValueError: there are no weights at `path`, or the encoder is another one.
    """
    checkpoints = complete_checkpoints(path / "checkpoints")
    if (path / COMPLETE).is_file():
        checkpoints = [path]
    encoder = path / ENCODER_FOLDER if (path / ENCODER_FOLDER).is_dir() else path
    if not checkpoints and not (encoder / ENCODER_FILE).is_file():
        raise ValueError(
            f"{path} holds no weights to start from: give a run folder, a checkpoint in one, or an "
            "encoder directory."
        )
    if not checkpoints:
        with Parts(encoder, MODEL, file=ENCODER_FILE) as parts:
            restore_model(module.get_submodule(ENCODER), parts)
        return f"starting from the encoder in {encoder}"
    with Parts(checkpoints[-1], MODEL) as parts:
        if parts.shapes.keys() == module.state_dict().keys():
            restore_model(module, parts)
            load_average(checkpoints[-1], module)
            return f"starting from the weights of {checkpoints[-1]}"
        parts.keep_below(f"{ENCODER}.")
        restore_model(module.get_submodule(ENCODER), parts)
        load_average(checkpoints[-1], module.get_submodule(ENCODER), f"{ENCODER}.")
    return f"starting from the encoder of {checkpoints[-1]}; all else is new"
