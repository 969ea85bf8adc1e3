"""Loading: resume a training, start from other weights, or read a checkpoint."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data_prep.channels import ChannelNames, describe
from simmim.engine.checkpoint.adapting import (
    PATCH_WEIGHT,
    ChannelChange,
    described_channels,
    find_change,
    trained_channels,
)
from simmim.engine.checkpoint.choosing import chosen_checkpoint
from simmim.engine.checkpoint.directory import (
    COMPLETE,
    MODEL,
    OPTIMIZER,
    RECIPE_FILE,
    SCALARS_FILE,
    Scalars,
    TrainingState,
    complete_checkpoints,
    load_state,
    read_json,
)
from simmim.engine.checkpoint.ema import RunningAverage, load_average, read_average
from simmim.engine.checkpoint.shard_files import ShardFiles
from simmim.engine.checkpoint.sharded_state import (
    is_sharded,
    local_rows,
    local_tensor,
    restore_model,
    restore_optimizer,
)
from simmim.recipe import read_values

ENCODER_FOLDER, ENCODER_FILE = "encoder", "model.safetensors"
ENCODER = "model.encoder"
"""Dotted name of the encoder in a stage's module."""
METHOD, METHOD_FILE = "model.", "simmim.safetensors"
"""Prefix in a pretraining's module, and file in an encoder directory, of mask token and decoder."""

StageT = TypeVar("StageT", bound="Resumable")


class Resumable(Protocol):
    """The members of a stage that resuming needs; see `simmim.engine.stage.TrainingStage`."""

    @property
    def recipe(self) -> Any:
        """The recipe, with its training settings."""

    @property
    def module(self) -> nn.Module:
        """The trained module."""

    @property
    def training_shards(self) -> Any:
        """The training data, with its `digest`."""

    def fresh(self) -> Any:
        """Return a stage of the same recipe with initial weights on the CPU."""


def restore(
    path: Path,
    stage: Resumable,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    average: RunningAverage | None = None,
    *,
    allow_changes: bool,
) -> TrainingState:
    """Load a checkpoint, written by any number of ranks, into a stage and its optimiser.

    It is one that `choose_checkpoint` has verified. Its running averages are loaded into `average`.

    Raises:
        ValueError: the checkpoint belongs to another model, does not fit or cannot be read.
    """
    state = resumable_state(path, stage, allow_changes=allow_changes)
    load_model(path, stage.module, verified=True)
    load_optimizer(path, optimizer, verified=True)
    if average is not None:
        average.load(path, verified=True)
    if accelerator.scaler is not None and state.scaler is not None:
        accelerator.scaler.load_state_dict(state.scaler)
    return state


def resumable_state(path: Path, stage: Resumable, *, allow_changes: bool) -> TrainingState:
    """Return the training state of a checkpoint after checking that `stage` can resume from it.

    Raises:
        ValueError: data or optimiser differ, or batch size or seed do and changes are not allowed,
            or the checkpoint cannot be read.
    """
    state = load_state(path)
    batch_size = stage.recipe.training.batch_size
    if state.batch_size != batch_size and not allow_changes:
        raise ValueError(
            f"{path} was trained with batch size {state.batch_size}, the recipe has {batch_size}: "
            "steps and learning rate would change their meaning. Restore the batch size, or accept "
            "this with --allow-recipe-changes."
        )
    seed = stage.recipe.training.seed
    if state.seed != seed and not allow_changes:
        raise ValueError(
            f"{path} was trained with training.seed {state.seed}, the recipe has {seed}: order and "
            "masks of the images would change. Restore the seed, or accept this with "
            "--allow-recipe-changes."
        )
    if state.data_digest != stage.training_shards.digest:
        raise ValueError(
            f"{path} was trained on other images than the recipe names now (other shards, or a "
            "folder whose files have changed since); its position in the data would be lost. Name "
            "the images it was started with, or start another run."
        )
    wanted = stage.recipe.training.optimizer.name
    saved = read_values(path / RECIPE_FILE)["training"]["optimizer"].get("name", wanted)
    if saved != wanted:
        raise ValueError(
            f"{path} holds the state of the optimiser {saved}, the recipe has {wanted}: set "
            f"training.optimizer.name to {saved}, or start a new run from its weights with "
            "--init-from."
        )
    return state


def load_model(path: Path, model: nn.Module, *, verified: bool = False) -> None:
    """Load the weights of a checkpoint.

    Args:
        path: a checkpoint.
        model: its weights are replaced.
        verified: the digests have been compared already.

    Raises:
        ValueError: a file cannot be read, or a tensor is missing, unexpected or of another shape.
    """
    with ShardFiles(path, MODEL, verified=verified) as files:
        restore_model(model, files)


def read_model(path: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, unsharded and on the CPU.

    Raises:
        ValueError: a file cannot be read.
    """
    with ShardFiles(path, MODEL) as files:
        return files.read_all()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint as `read_model`, or their averages if it has some."""
    return read_model(path) | read_average(path)


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, *, verified: bool = False) -> None:
    """Load the optimiser state of a checkpoint by the names of the parameters.

    Hyperparameters such as weight decay and betas are kept from `optimizer`, that is, the recipe.

    Args:
        path: a checkpoint.
        optimizer: its state is replaced.
        verified: the digests have been compared already.

    Raises:
        ValueError: a file cannot be read, or lacks a parameter of `optimizer`.
    """
    scalars = read_json(path / SCALARS_FILE, Scalars)
    with ShardFiles(path, OPTIMIZER, verified=verified) as files:
        restore_optimizer(optimizer, files, scalars)


def load_initial(path: Path, module: nn.Module, recipe: Any = None) -> str:
    """Load only weights into a module that is to be trained, without optimiser and data position.

    If the module has other parts than the model at `path`, or takes other channels, only its
    encoder is loaded. If a checkpoint has averages of its weights, they are loaded.

    Args:
        path: a checkpoint, a run folder (its best checkpoint if it has kept one, else its last, or
            else its encoder), or an encoder directory.
        module: the module of a stage, sharded or not.
        recipe: its recipe, whose channels the weights are adapted to by name; None takes them as
            they are.

    Returns:
        A message that says what was loaded.

    Raises:
        ValueError: there are no weights at `path`, or the encoder does not fit, or takes other
            channels and the recipe does not say how to adapt it.
    """
    checkpoint = None
    if (path / COMPLETE).is_file() or complete_checkpoints(path / "checkpoints"):
        checkpoint = chosen_checkpoint(path)
    encoder = path / ENCODER_FOLDER if (path / ENCODER_FOLDER).is_dir() else path
    if checkpoint is None and not (encoder / ENCODER_FILE).is_file():
        raise ValueError(
            f"{path} holds no weights to start from: give a run folder, a checkpoint in one, or an "
            "encoder directory."
        )
    if checkpoint is None:
        with ShardFiles(encoder, MODEL, file=ENCODER_FILE) as files:
            change = _channel_change(recipe, encoder, described_channels(encoder), files.shapes)
            _adapt(change, files, "")
            restore_model(module.get_submodule(ENCODER), files)
            said = _unnamed(recipe, described_channels(encoder)) or _described(change)
        loaded = load_method(encoder, module, same_channels=change is None)
        return f"Starting from {loaded}.{said}"
    with ShardFiles(checkpoint, MODEL) as files:
        shapes = {name.removeprefix(f"{ENCODER}."): shape for name, shape in files.shapes.items()}
        names = trained_channels(read_values(checkpoint / RECIPE_FILE))
        change = _channel_change(recipe, checkpoint, names, shapes)
        said = _unnamed(recipe, names) or _described(change)
        if change is None and files.shapes.keys() == module.state_dict().keys():
            restore_model(module, files)
            load_average(checkpoint, module)
            return f"Starting from the weights of {checkpoint}.{said}"
        files.keep_below(f"{ENCODER}.")
        _adapt(change, files, "")
        restore_model(module.get_submodule(ENCODER), files)
        adapt = None if change is None else partial(_adapt, change)
        load_average(checkpoint, module.get_submodule(ENCODER), f"{ENCODER}.", adapt=adapt)
    return f"Starting from the encoder of {checkpoint}; everything else is initialised.{said}"


def _channel_change(
    recipe: Any,
    source: Path,
    have: ChannelNames | None,
    shapes: Mapping[str, Sequence[int]],
) -> ChannelChange | None:
    """Return how the weights at `source` are adapted to the channels of a recipe, if they are.

    Args:
        recipe: the recipe; None takes the weights as they are.
        source: a checkpoint or an encoder directory.
        have: names of the channels of the weights.
        shapes: shapes of the tensors of the encoder.

    Raises:
        ValueError: see `find_change`.
    """
    if recipe is None or PATCH_WEIGHT not in shapes:  # not a SwinV2
        return None
    return find_change(
        have,
        recipe.data.wanted_channels,
        recipe.encoder.adapt_channels,
        source=source,
        count=shapes[PATCH_WEIGHT][1],
    )


def _adapt(change: ChannelChange | None, files: ShardFiles, prefix: str) -> None:
    """Replace the patch weights of an encoder, if its channels change."""
    name = f"{prefix}{PATCH_WEIGHT}"
    if change is not None and name in files.shapes:
        files.replace(name, change.apply(files.read(name)))


def _unnamed(recipe: Any, have: ChannelNames | None) -> str:
    """Return a sentence if weights without names are taken for channels that have some."""
    if recipe is None or have is not None or recipe.data.wanted_channels is None:
        return ""
    return f" Its channels have no names: they are taken as {describe(recipe.data.channels)}."


def _described(change: ChannelChange | None) -> str:
    return "" if change is None else f" {str(change)[0].upper()}{str(change)[1:]}."


def load_method(encoder: Path, module: nn.Module, *, same_channels: bool = True) -> str:
    """Load mask token and decoder of an encoder directory into a pretraining, if it has them.

    Args:
        encoder: the directory, whose encoder has been loaded.
        module: the module of a stage, sharded or not.
        same_channels: whether images have the channels of the directory, which the decoder
            predicts.

    Returns:
        Which parts the module has from the directory, and why others are initialised.

    Raises:
        ValueError: the file is damaged.
    """
    expected = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if name.startswith(METHOD) and not name.startswith(f"{ENCODER}.")
    }
    if f"{METHOD}mask_token" not in expected:  # another task
        return f"the encoder in {encoder}"
    if not (encoder / METHOD_FILE).is_file():
        return (
            f"the encoder in {encoder}; mask token and decoder are initialised, since it has no "
            f"{METHOD_FILE}"
        )
    with ShardFiles(encoder, MODEL, file=METHOD_FILE) as files:
        fitting = [
            name
            for name, tensor in expected.items()
            if files.shapes.get(name.removeprefix(METHOD)) == tuple(tensor.shape)
            and (same_channels or name == f"{METHOD}mask_token")
        ]
        for name in fitting:
            tensor = expected[name]
            rows = files.read(name.removeprefix(METHOD), *local_rows(tensor))
            local_tensor(tensor).copy_(rows)
    if len(fitting) == len(expected):
        return f"the encoder, mask token and decoder in {encoder}"
    others = ", ".join(name.removeprefix(METHOD) for name in expected if name not in fitting)
    reason = "have other shapes" if same_channels else "are for other channels"
    return f"the encoder in {encoder}; {others} are initialised, since they {reason} there"


def stage_to_export(stage: StageT, checkpoint: Path, *, trained: bool) -> StageT:
    """Return the stage, or if it is sharded a new one, with the weights of `checkpoint`.

    They are the averages of the weights, if the checkpoint has some.

    Args:
        stage: the stage that was trained.
        checkpoint: the checkpoint to export.
        trained: whether it is the one of the present weights, which are then taken as they are.
    """
    sharded = is_sharded(stage.module)
    if trained and not sharded:
        return stage
    filled: StageT = stage.fresh() if sharded else stage
    load_model(checkpoint, filled.module)
    load_average(checkpoint, filled.module)
    return filled
