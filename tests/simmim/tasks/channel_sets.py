"""Channels of sets for tests: arrays whose values depend on the name of a channel alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data_prep.channels import RGB
from simmim.recipe import parse
from simmim.tasks.classification.recipe import ClassificationRecipe
from simmim.tasks.classification.stage import ClassificationStage
from simmim.tasks.pretrain.recipe import PretrainRecipe
from simmim.tasks.pretrain.stage import PretrainStage
from swinv2.weights import save_encoder
from tests.simmim.conftest import MEAN, STD, small_encoder

FIRES = ("blue", "green", "red", "nir", "swir2")
SWAPPED = ("red", "green", "blue", "nir", "swir2")
TWELVE = (*SWAPPED, *(f"rededge{number}" for number in (1, 2, 3)), "swir1", "coastal", "a", "b")
SETS = {1: ("green",), 4: (*RGB, "nir"), 5: FIRES, 12: TWELVE}
MakeSet = Callable[..., str]


def scene(number: int, names: tuple[str, ...]) -> np.ndarray:
    """An image in which a channel has the same values wherever it stands."""
    planes = [
        np.random.default_rng([number, *name.encode()]).integers(0, 60_000, (20, 24))
        for name in names
    ]
    return np.stack(planes, axis=-1).astype(np.uint16)


def pretraining(values: dict[str, Any], count: int = 5, **data: Any) -> PretrainStage:
    values = values | {"encoder": values["encoder"] | {"in_channels": count}}
    values["data"] = values["data"] | {"mean": [0.45] * count, "std": [0.26] * count} | data
    return PretrainStage(parse(PretrainRecipe, values, "test"))


def images_of(stage: Any) -> dict[str, Tensor]:
    """Return the validation images of a stage, by their names."""
    transform = stage._whole_images() if isinstance(stage, PretrainStage) else None
    transform = transform or stage.validation_transform()
    source, found = stage.training_shards, {}
    for shard, size in enumerate(source.sizes):
        for row in range(size):
            raw = source.read(shard, row)
            name = f"{source.folder_of(shard)} {json.loads(raw.about)['path']}"
            found[name] = transform(raw, None).image
    return found


def saved(tmp_path: Path, channels: tuple[str, ...] | None, name: str = "trained") -> str:
    """Save a trained encoder of three channels."""
    path = tmp_path / name
    return str(save_encoder(small_encoder(), path, mean=MEAN, std=STD, channels=channels))


def finetuning(values: dict[str, Any], init: str, **changes: Any) -> ClassificationStage:
    rule = changes.pop("rule", None)
    encoder = values["encoder"] | ({} if rule is None else {"adapt_channels": rule})
    changes.setdefault("slots", None)
    values = values | {"encoder": encoder, "init": init, "data": values["data"] | changes}
    return ClassificationStage(parse(ClassificationRecipe, values, "test"))
