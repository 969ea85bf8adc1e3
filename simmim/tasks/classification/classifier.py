"""A classifier: encoder, average pooling and a linear head; and its files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.format.text import count_noun
from simmim.tasks.features import pool, pooled_features
from simmim.tasks.recipe import HEAD_FOLDER
from simmim.tasks.trained import TrainedModel, WrittenHead
from swinv2 import SwinV2
from swinv2.atomic import atomic_folder
from swinv2.bridges.checkpoints import ClassifierHead
from swinv2.bridges.preprocessing import Preparation, describe, from_description
from swinv2.bridges.verification import compare, plain_copy
from swinv2.config_file import (
    EncoderDescription,
    is_video_encoder,
    read_encoder_config,
    read_video_config,
)
from swinv2.encoder import HierarchicalEncoder
from swinv2.weights import (
    load_encoder,
    load_strictly,
    load_video_encoder,
    read_tensors,
    write_tensors,
)

HEAD_FILE = "model.safetensors"
CLASSES_FILE = "classes.json"
PREPARATION = "preparation"
"""Key in the classes' file with the preparation of pictures, `swinv2.bridges.preprocessing`."""


class Classifier(nn.Module):
    """Encoder, average pooling and a linear head, initialised with std 0.02."""

    def __init__(self, encoder: HierarchicalEncoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, drop_path_noise: Tensor | None = None) -> Tensor:
        """Map normalised images or clips to (batch, classes) logits; see `pooled_features`.

        For `drop_path_noise` see `SwinV2.encode`.
        """
        logits: Tensor = self.head(pooled_features(self.encoder, images, drop_path_noise))
        return logits


def save_head(
    head: nn.Linear,
    path: Path,
    classes: Sequence[str],
    preparation: Mapping[str, Any] | None = None,
) -> None:
    """Write a head, its class names and the preparation of pictures as the folder `path`."""
    tensors = {name: part.detach().cpu().contiguous() for name, part in head.state_dict().items()}
    with atomic_folder(path, may_replace=_is_head) as folder:
        write_tensors(folder / HEAD_FILE, tensors)
        content: dict[str, Any] = {"classes": list(classes)}
        content |= {} if preparation is None else {PREPARATION: dict(preparation)}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / CLASSES_FILE).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class TrainedClassifier:
    """The classifier of a finished run, with class names and normalisation."""

    model: Classifier
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_classifier(encoder: Path, head: Path) -> TrainedClassifier:
    """Load the classifier of a run, on the CPU, in evaluation mode.

    Args:
        encoder: encoder directory of the run, of images or of clips.
        head: `classifier` folder of the run.

    Raises:
        ValueError: a file is missing or damaged, or the two do not belong together.
    """
    description: EncoderDescription
    trained: HierarchicalEncoder
    if is_video_encoder(encoder):
        description, trained = read_video_config(encoder), load_video_encoder(encoder)
    else:
        description, trained = read_encoder_config(encoder), load_encoder(encoder)
    classes = _read_classes(head / CLASSES_FILE)
    with torch.random.fork_rng(devices=[]):
        model = Classifier(trained, len(classes))
    load_strictly(model.head, read_tensors(head / HEAD_FILE), str(head / HEAD_FILE))
    return TrainedClassifier(
        model=model.eval(), classes=classes, mean=description.mean, std=description.std
    )


def read_head(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors of a saved head, `weight` and `bias`, and its class names.

    Raises:
        ValueError: a file is missing or damaged.
    """
    return read_tensors(path / HEAD_FILE), _read_classes(path / CLASSES_FILE)


def read_preparation(path: Path) -> Preparation | None:
    """Return the preparation of pictures for a saved head; None if it was saved without."""
    try:
        content = json.loads((path / CLASSES_FILE).read_text(encoding="utf-8"))
        return from_description(content[PREPARATION])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


@torch.no_grad()
def copy_head(head: nn.Linear, classes: Sequence[str], source: Path) -> bool:
    """Copy the rows of a trained head to a new one by class name.

    Args:
        head: the new head, with one output per class.
        classes: class names of the new head.
        source: folder of the trained head, which may have more classes.

    Returns:
        Whether the trained head has all classes; otherwise nothing is copied.

    Raises:
        ValueError: a file is missing or damaged, or the head is of another encoder.
    """
    tensors, known = read_head(source)
    places = {name: place for place, name in enumerate(known)}
    if any(name not in places for name in classes):
        return False
    rows = [places[name] for name in classes]
    if tensors["weight"].shape[1] != head.in_features:
        raise ValueError(
            f"{source} has a head for {tensors['weight'].shape[1]} features, and the encoder has "
            f"{head.in_features}: they are from different runs."
        )
    head.weight.copy_(tensors["weight"][rows])
    head.bias.copy_(tensors["bias"][rows])
    return True


def _read_classes(file: Path) -> tuple[str, ...]:
    """Read the class names, which is shorter by hand than with a declaration of the file."""
    try:
        classes = json.loads(file.read_text(encoding="utf-8"))["classes"]
        return tuple(str(name) for name in classes)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{file} has no class names: give the `classifier` folder of a finished fine-tuning "
            "run."
        ) from None


def _is_head(path: Path) -> bool:
    return {place.name for place in path.iterdir()} == {HEAD_FILE, CLASSES_FILE}


README_LINES = """
With its head, and `simmim` installed:

```python
from pathlib import Path

from simmim.tasks.classification.classifier import load_classifier

trained = load_classifier(Path("."), Path("{folder}"))
```

`trained.model` gives a score for each of `trained.classes`. For pictures, `preparation` in
`{folder}/classes.json` has the steps to its input.
"""


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """The linear head of a classifier, as exports write it; see `TrainedHead`."""

    task: str
    weights: ClassifierHead
    folder: str = HEAD_FOLDER

    def write(self, folder: Path, model: TrainedModel, images: Tensor) -> WrittenHead:
        """Write head and class names, and compare the logits; see `TrainedHead`."""
        weight, bias = self.weights.weight, self.weights.bias
        head = nn.Linear(weight.shape[1], weight.shape[0])
        head.load_state_dict({"weight": weight, "bias": bias})
        names = model.classes or tuple(f"class {number}" for number in range(len(bias)))
        prepared = None
        if isinstance(model.encoder, SwinV2):
            assert model.preparation is not None
            prepared = describe(model.encoder.config, model.preparation, model.mean, model.std)
        save_head(head, folder / self.folder, names, prepared)
        with torch.no_grad():
            ours = head(pool(plain_copy(model.encoder)(images)))
            loaded = load_classifier(folder, folder / self.folder).model(images)
        return WrittenHead(
            line=f"the head with {count_noun(len(bias), 'class', 'classes')}",
            comparison=compare("its logits after loading", ours, loaded, tolerance=0),
            readme=README_LINES.format(folder=self.folder),
        )


def read_linear_head(found: TrainedModel, folder: Path, task: str) -> TrainedModel:
    """Return a model with the head, class names and preparation saved in a folder.

    Raises:
        ValueError: a file is missing or damaged, or the head does not fit the encoder.
    """
    tensors, classes = read_head(folder)
    linear = nn.Linear(found.encoder.num_features, len(classes))
    load_strictly(linear, tensors, str(folder))
    weights = ClassifierHead(weight=linear.weight.detach(), bias=linear.bias.detach())
    return replace(
        found,
        classifier=weights,
        head=LinearHead(task=task, weights=weights),
        classes=classes,
        preparation=read_preparation(folder),
    )
