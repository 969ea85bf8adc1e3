"""A classifier: the encoder, its average-pooled features, and a linear head."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2.atomic import atomic_folder
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


def pooled_features(
    encoder: HierarchicalEncoder, images: Tensor, drop_path_noise: Tensor | None = None
) -> Tensor:
    """Return the mean over all places of the encoder's output.

    Normalised images (batch, channels, height, width), or clips (batch, frames, channels, height,
    width), become (batch, num_features).
    """
    return pool(encoder(images, drop_path_noise))


def pool(tokens: Tensor) -> Tensor:
    """Return the mean over all places: (batch, *map, channels) to (batch, channels)."""
    return tokens.mean(dim=tuple(range(1, tokens.ndim - 1)))


class Classifier(nn.Module):
    """Encoder, average pool and a linear layer, whose fresh weights are small (std 0.02)."""

    def __init__(self, encoder: HierarchicalEncoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, drop_path_noise: Tensor | None = None) -> Tensor:
        """Turn normalised images, or clips, into (batch, classes) logits; see `pooled_features`.

        For `drop_path_noise` see `SwinV2.encode`.
        """
        logits: Tensor = self.head(pooled_features(self.encoder, images, drop_path_noise))
        return logits


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Sums over classified images, so that parts can be added up."""

    top1: float = 0.0
    """Images whose class has the highest score."""
    top5: float = 0.0
    """Images whose class is among the five highest."""
    loss: float = 0.0
    """Sum of the cross entropy."""
    samples: int = 0

    def __add__(self, other: "Scores") -> "Scores":
        return Scores(
            top1=self.top1 + other.top1,
            top5=self.top5 + other.top5,
            loss=self.loss + other.loss,
            samples=self.samples + other.samples,
        )


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Score (samples, classes) logits against int64 (samples,) labels."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    return Scores(
        top1=float(hits[:, 0].sum()),
        top5=float(hits.sum()),
        loss=float(F.cross_entropy(logits.float(), labels, reduction="sum")),
        samples=len(labels),
    )


def save_head(head: nn.Linear, path: Path, classes: Sequence[str]) -> None:
    """Write a head and the names of its classes as the folder `path`."""
    tensors = {name: part.detach().cpu().contiguous() for name, part in head.state_dict().items()}
    with atomic_folder(path, may_replace=_is_head) as folder:
        write_tensors(folder / HEAD_FILE, tensors)
        text = json.dumps({"classes": list(classes)}, indent=1, ensure_ascii=False)
        (folder / CLASSES_FILE).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class TrainedClassifier:
    """A classifier as a finished run holds it, with what using it needs."""

    model: Classifier
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_classifier(encoder: Path, head: Path) -> TrainedClassifier:
    """Load the classifier of a run, on the CPU, in evaluation mode.

    Args:
        encoder: the run's encoder directory, of images or of clips.
        head: the run's `classifier` folder.

    Raises:
        ValueError: a file is absent or damaged, or the two do not belong together.
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
    """Return the tensors of a saved head, `weight` and `bias`, and the names of its classes.

    Raises:
        ValueError: a file is absent or damaged.
    """
    return read_tensors(path / HEAD_FILE), _read_classes(path / CLASSES_FILE)


def _read_classes(file: Path) -> tuple[str, ...]:
    try:
        classes = json.loads(file.read_text(encoding="utf-8"))["classes"]
        return tuple(str(name) for name in classes)
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{file} does not hold the names of classes: give the `classifier` folder of a "
            "fine-tuning run that has ended."
        ) from None


def _is_head(path: Path) -> bool:
    return {place.name for place in path.iterdir()} == {HEAD_FILE, CLASSES_FILE}
