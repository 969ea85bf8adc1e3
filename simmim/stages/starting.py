"""What `init` of a fine-tuning recipe names: an encoder directory, or a run of any stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from simmim.engine.checkpoint import complete_checkpoints
from simmim.engine.run import RunFolder
from simmim.stages.classifier import read_head

HEAD_FOLDER = "classifier"
"""Folder in a classification run with the head and the names of its classes."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where trained weights are."""

    encoder: Path
    """An encoder directory."""
    head: Path | None = None
    """The head of a classification run, with the names of its classes."""


def source_of(init: str) -> Source:
    """Return what a recipe starts from.

    Raises:
        ValueError: it is a run that has not handed on its encoder yet.
    """
    run = RunFolder(path=Path(init))
    if run.encoder.is_dir() and not (run.path / "config.json").is_file():
        head = run.path / HEAD_FOLDER
        return Source(encoder=run.encoder, head=head if head.is_dir() else None)
    if complete_checkpoints(run.checkpoints):
        raise ValueError(
            f"init is {init}, a run that has not ended: let it end, or write the encoder of its "
            f"last checkpoint with `simmim export {init} FOLDER` and start from FOLDER."
        )
    return Source(encoder=run.path)


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
