"""What a fine-tuning starts from: fresh weights, an encoder directory, or a run of any stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from simmim.data.settings import CroppedSettings
from simmim.engine.checkpoint.directory import complete_checkpoints
from simmim.engine.run import RunFolder
from simmim.tasks.classification.classifier import read_head
from simmim.tasks.recipe import SCRATCH, EncoderSettings
from swinv2 import SwinV2, build_encoder, load_encoder
from swinv2.config_file import read_encoder_config
from swinv2.encoder import HierarchicalEncoder

HEAD_FOLDER = "classifier"
"""Folder in the run, or the native export, of a classifier: the head and its classes' names."""

Encoder = TypeVar("Encoder", bound=HierarchicalEncoder)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where trained weights are."""

    encoder: Path
    """An encoder directory."""
    head: Path | None = None
    """The head of a classifier, with the names of its classes."""


@dataclass(frozen=True, kw_only=True)
class Start(Generic[Encoder]):
    """What training starts from."""

    encoder: Encoder
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: Path | None = None
    """Folder of a trained head, with the names of its classes."""


def source_of(init: str) -> Source:
    """Return what a recipe starts from.

    Raises:
        ValueError: it is a run that has not handed on its encoder yet.
    """
    run = RunFolder(path=Path(init))
    if run.encoder.is_dir() and not (run.path / "config.json").is_file():
        return Source(encoder=run.encoder, head=_folder(run.path / HEAD_FOLDER))
    if complete_checkpoints(run.checkpoints):
        raise ValueError(
            f"init is {init}, a run that has not ended: let it end, or write the encoder of its "
            f"last checkpoint with `simmim export {init} FOLDER` and start from FOLDER."
        )
    return Source(encoder=run.path, head=_folder(run.path / HEAD_FOLDER))


def _folder(path: Path) -> Path | None:
    return path if path.is_dir() else None


def start_from(
    init: str, wanted: EncoderSettings, data: CroppedSettings, seed: int
) -> Start[SwinV2]:
    """Build the encoder that `init` asks for, with the normalisation that goes with it.

    Fresh weights depend on the seed alone.

    Raises:
        ValueError: `init` is neither an encoder directory nor a run that has ended, or its encoder
            cannot take the sizes.
    """
    if init == SCRATCH:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = build_encoder(wanted.config(data.image_size))
        mean, std = data.normalisation
        return Start(encoder=encoder, mean=mean, std=std)
    source = source_of(init)
    directory = read_encoder_config(source.encoder)
    encoder = load_encoder(
        source.encoder,
        image_size=data.image_size,
        window_size=wanted.window_size,
        drop_path=wanted.drop_path,
    )
    return Start(encoder=encoder, mean=directory.mean, std=directory.std, head=source.head)


@torch.no_grad()
def take_head(head: nn.Linear, classes: Sequence[str], source: Path) -> bool:
    """Copy a trained head, class by class of the same name.

    Args:
        head: to be filled, an output for each of `classes`.
        classes: that are to be told apart.
        source: folder of the trained head; it may know more classes.

    Returns:
        Whether it knew all of them; else nothing is changed.

    Raises:
        ValueError: a file is absent or damaged, or it is of another encoder.
    """
    tensors, known = read_head(source)
    places = {name: place for place, name in enumerate(known)}
    if any(name not in places for name in classes):
        return False
    rows = [places[name] for name in classes]
    if tensors["weight"].shape[1] != head.in_features:
        raise ValueError(
            f"{source} has a head for {tensors['weight'].shape[1]} features, and the encoder has "
            f"{head.in_features}: the two are not of one run."
        )
    head.weight.copy_(tensors["weight"][rows])
    head.bias.copy_(tensors["bias"][rows])
    return True
