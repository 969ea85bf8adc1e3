"""The encoder that fine-tuning starts from: random, or from an encoder directory or a run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import torch

from data_prep.channels import describe
from simmim.data.channels import say_once
from simmim.data.settings import CroppedSettings
from simmim.engine.checkpoint.adapting import PATCH_WEIGHT, ChannelChange, find_change
from simmim.engine.checkpoint.directory import complete_checkpoints
from simmim.engine.generators import seeded
from simmim.engine.run import RunFolder
from simmim.tasks.other_encoder import OTHER_FILE, refuse_other_encoder
from simmim.tasks.recipe import HEAD_FOLDER, SCRATCH, EncoderSettings
from swinv2 import SwinV2, build_encoder, load_encoder
from swinv2.config_file import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    EncoderDescription,
    Provenance,
    is_video_encoder,
    read_encoder_config,
)
from swinv2.encoder import HierarchicalEncoder
from swinv2.json_file import load_json
from swinv2.method_file import read_method

FOREIGN_FILES = ("checkpoint.pth", "pytorch_model.bin")
"""Weights in folders of other libraries."""

EncoderT = TypeVar("EncoderT", bound=HierarchicalEncoder)


@dataclass(frozen=True, kw_only=True)
class TrainedWeights:
    """Paths of trained weights."""

    encoder: Path
    """An encoder directory."""
    head: Path | None = None
    """Folder of a classifier's head; None if there is none."""


@dataclass(frozen=True, kw_only=True)
class InitialEncoder(Generic[EncoderT]):
    """An encoder to fine-tune, with its normalisation."""

    encoder: EncoderT
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: tuple[str, ...] | None = None
    """Names of the channels of its images; None if they are not known."""
    head: Path | None = None
    """Folder of a trained classifier head."""
    inflated_from: Provenance | None = None
    """Provenance of the image encoder that an encoder of clips was inflated from."""


def find_weights(init: str) -> TrainedWeights:
    """Return the paths of the weights that `init` names, an encoder directory or a finished run.

    Raises:
        ValueError: it is a run that has not finished, or whose encoder is not a SwinV2, or weights
            of another library, which `simmim import` makes usable.
    """
    refuse_foreign(init)
    run = RunFolder(path=Path(init))
    for folder in (run.encoder, run.path):
        refuse_other_encoder(folder, "fine-tuning, probing and embedding need")
    if run.encoder.is_dir() and not (run.path / "config.json").is_file():
        return TrainedWeights(encoder=run.encoder, head=_folder(run.path / HEAD_FOLDER))
    if complete_checkpoints(run.checkpoints):
        raise ValueError(
            f"init is {init}, a run that has not finished: finish it, or export the encoder of its "
            f"last checkpoint with `simmim export {init} FOLDER` and start from FOLDER."
        )
    return TrainedWeights(encoder=run.path, head=_folder(run.path / HEAD_FOLDER))


def describe_initial(path: Path) -> EncoderDescription | None:
    """Return the description of the encoder that `--init-from` names; None if it has none yet.

    Raises:
        ValueError: it names weights of another library.
    """
    refuse_foreign(str(path))
    folder = _initial_directory(path)
    return None if folder is None else read_encoder_config(folder)


def initial_target(path: Path | None) -> str | None:
    """Return what the decoder that `--init-from` names predicts; None if that is not known."""
    folder = None if path is None else _initial_directory(path)
    method = None if folder is None else read_method(folder)
    return None if method is None else method.target


def _initial_directory(path: Path) -> Path | None:
    folders = (path / "encoder", path, path.parent.parent / "encoder")
    images = (one for one in folders if (one / CONFIG_FILE).is_file() and not is_video_encoder(one))
    return next(images, None)


def refuse_foreign(name: str) -> None:
    """Refuse weights of another library with the command that makes them usable.

    Args:
        name: value of `init` or `--init-from`.

    Raises:
        ValueError: it is a file, a folder of another library, or looks like the name of a model.
    """
    path = Path(name)
    if path.is_file() or path.is_dir():
        kind = "a file" if path.is_file() else _foreign_folder(path)
        if kind is not None:
            raise ValueError(
                f"{name} is {kind}, not an encoder directory: run `simmim import {name} ENCODER`, "
                "then start from ENCODER."
            )
    elif "swin" in path.name.lower() or (name.count("/") == 1 and not path.parent.exists()):
        repository = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
        raise ValueError(
            f"{name} does not exist: give an encoder directory or a run; or if it is the name of a "
            f"model on a hub, run `hf download {repository} --local-dir FOLDER` and `simmim import "
            "FOLDER ENCODER`, then start from ENCODER."
        )


def _foreign_folder(path: Path) -> str | None:
    """Describe a folder of another library; None for encoder directories, runs and the rest."""
    try:
        content = load_json(path / CONFIG_FILE)
    except (OSError, ValueError):
        names = FOREIGN_FILES if (path / OTHER_FILE).is_file() else (*FOREIGN_FILES, WEIGHTS_FILE)
        held = next((name for name in names if (path / name).is_file()), None)
        return None if held is None else f"a folder with {held} of another library"
    if not isinstance(content, dict) or "format" in content:
        return None
    if "model_type" in content:
        return "a folder of transformers"
    return "a folder of timm" if "architecture" in content else None


def _folder(path: Path) -> Path | None:
    return path if path.is_dir() else None


def load_initial_encoder(
    init: str, wanted: EncoderSettings, data: CroppedSettings, seed: int
) -> InitialEncoder[SwinV2]:
    """Load the encoder that `init` names, or build one with random weights, which depend on `seed`.

    Raises:
        ValueError: `init` is neither an encoder directory nor a finished run, or its encoder does
            not fit the image or window size, or takes other channels and no rule says what new ones
            start from.
    """
    if init == SCRATCH:
        with seeded(seed):
            encoder = build_encoder(wanted.config(data.image_size))
        mean, std = data.normalisation
        return InitialEncoder(encoder=encoder, mean=mean, std=std, channels=data.wanted_channels)
    source = find_weights(init)
    directory = read_encoder_config(source.encoder)
    encoder = load_encoder(
        source.encoder,
        image_size=data.image_size,
        window_size=wanted.window_size,
        drop_path=wanted.drop_path,
    )
    mean, std = directory.mean, directory.std
    channels = data.wanted_channels or directory.channels
    change = find_change(
        directory.channels,
        channels,
        wanted.adapt_channels,
        source=f"the encoder of {init}",
        count=directory.config.in_channels,
    )
    if change is not None:
        encoder = adapt_encoder(encoder, change)
        mean, std = data.normalisation
        say_once(f"{init}: {change}")
    elif directory.channels is None and channels is not None:
        say_once(
            f"the encoder of {init} does not name its channels: they are taken as "
            f"{describe(channels)}"
        )
    return InitialEncoder(encoder=encoder, mean=mean, std=std, channels=channels, head=source.head)


def adapt_encoder(encoder: SwinV2, change: ChannelChange) -> SwinV2:
    """Return an encoder for images of other channels, with the weights of those it shares."""
    config = replace(encoder.config, in_channels=len(change.want))
    with torch.random.fork_rng(devices=[]):  # of random weights that are replaced
        adapted = build_encoder(config)
    state = encoder.state_dict()
    state[PATCH_WEIGHT] = change.apply(state[PATCH_WEIGHT])
    adapted.load_state_dict(state)
    return adapted.train(encoder.training)
