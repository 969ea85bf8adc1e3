"""Labelled images, split for training and validation, for the stages that need classes."""

import numpy as np

from simmim.data.datasets.mixture import Shards


def open_labelled(
    shards: Shards,
    *,
    validation: Shards | None,
    validation_shards: int,
    fraction: float,
    seed: int,
) -> tuple[Shards, Shards | None]:
    """Return the shards to train on and those to validate on.

    Args:
        shards: labelled ones.
        validation: other shards, all of them for validation; None holds some of `shards` out.
        validation_shards: how many of the last shards are held out; 0 holds out none. Not used
            with `validation`.
        fraction: share of each class's training samples that is kept.
        seed: of the choice of that share.

    Returns:
        Training shards, and validation shards or None.

    Raises:
        ValueError: the shards have no classes or samples without one, or the
            validation shards have other classes.
    """
    if validation is None:
        training, held_out = shards.split(validation_shards)
    else:
        training, held_out = shards, validation
        _check_same_classes(training, held_out)
    _check_labels(training)
    _check_labels(held_out)
    if fraction < 1:
        training = training.share(fraction, seed=seed)
    return training, held_out if held_out.samples else None


def all_labels(shards: Shards) -> np.ndarray:
    """Return the label of every sample of every shard in order, int64 (samples,), -1 for none."""
    labels = [shards.labels(number) for number in range(len(shards.sizes))]
    return np.concatenate([np.zeros(0, dtype=np.int64), *labels])


def _check_labels(shards: Shards) -> None:
    shards.require_labels()
    missing = int((all_labels(shards) < 0).sum())
    if missing:
        raise ValueError(
            f"{missing} of {shards.samples} images in {shards.folder} have no class: put each "
            "image in the folder of its class, and make shards of them again with `data-prep shard`"
            " where they are shards."
        )


def _check_same_classes(training: Shards, validation: Shards) -> None:
    if training.classes == validation.classes:
        return
    unknown = sorted(set(validation.classes) - set(training.classes))
    absent = sorted(set(training.classes) - set(validation.classes))
    raise ValueError(
        f"{training.folder} and {validation.folder} have different classes, so a label does not "
        f"mean the same in both (only in the first: {_listed(absent)}; only in the second: "
        f"{_listed(unknown)}). Give both the same class folders, or hold out shards of the "
        "first with validation_shards."
    )


def _listed(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) or "none"
