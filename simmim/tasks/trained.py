"""A trained model as its task hands it to exports: encoder, head, and how pictures are prepared."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from simmim.engine.checkpoint.directory import load_state
from simmim.recipe import recipe_hash
from swinv2 import SwinV2, VideoSwinV2, load_video_encoder, read_video_config
from swinv2.atomic import atomic_folder
from swinv2.bridges.checkpoints import ClassifierHead, MaskedImageHead
from swinv2.bridges.preprocessing import Preparation
from swinv2.config import SwinV2Config
from swinv2.config_file import Provenance, is_video_encoder, read_encoder_config
from swinv2.method_file import MethodTensors, read_method
from swinv2.weights import load_encoder, read_tensors, write_tensors

MODEL_PREFIX = "model."
"""Prefix of encoder and head in the names of a fine-tuning checkpoint's tensors."""

HEAD_FILE = "model.safetensors"

PIXELS, NORMALISED_PIXELS, FEATURES = "pixels", "normalised_pixels", "features"
"""What a decoder predicts, as `loss.target` names it."""
FEATURE_DECODER = "mask token and decoder (they predict features, not pixels)"
"""Parts of a model of features that are not exported."""


@dataclass(frozen=True, kw_only=True)
class WrittenHead:
    """What was written of a head."""

    line: str
    """What is in its folder, for a person."""
    comparison: str = ""
    """A line that compares its output with the source's; empty if it was not compared."""
    readme: str = ""
    """Text for the README of the encoder directory."""


class TrainedHead(Protocol):
    """The head of a fine-tuned model, as the native export writes it."""

    @property
    def task(self) -> str:
        """Name of its task."""

    @property
    def folder(self) -> str:
        """Name of its folder in a run or a native export."""

    def write(self, folder: Path, model: "TrainedModel", images: Tensor) -> WrittenHead:
        """Write it into an encoder directory.

        Args:
            folder: the encoder directory.
            model: the model that it belongs to.
            images: normalised input to compare its output on.

        Raises:
            ValueError: after loading it computes something else.
        """


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A trained encoder with its head, normalisation and provenance."""

    encoder: SwinV2 | VideoSwinV2
    mean: tuple[float, ...]
    std: tuple[float, ...]
    provenance: Provenance
    channels: tuple[str, ...] | None = None
    """Names of the channels of its images; None if they are not known."""
    inflated_from: Provenance | None = None
    """Provenance of the image encoder that an encoder of clips was inflated from."""
    masked_image: MaskedImageHead | None = None
    """Mask token and decoder, from a pretraining run that predicts pixels."""
    left_out: str | None = None
    """What else the model has that no format has a place for, and why."""
    classifier: ClassifierHead | None = None
    """Linear head, from a classification of images or clips."""
    classes: tuple[str, ...] = ()
    """Class names of the classifier; empty if they are no longer known."""
    head: TrainedHead | None = None
    """The head of a fine-tuning."""
    preparation: Preparation | None = None
    """How validation prepares pictures, apart from mean and std; None if unknown."""
    shards: str | None = None
    """Training data of the run."""
    image_channels: tuple[str, ...] | None = None
    """Names of the channels of files in `shards` that do not tell them; None if they are not known.
    """
    origin: str
    """Source of the weights, for messages."""


@dataclass(frozen=True, kw_only=True)
class PlainHead:
    """A head of which only the weights are stored: its task builds the modules."""

    task: str
    folder: str
    tensors: Mapping[str, Tensor]
    """Its weights by name, without the encoder's."""

    def write(self, folder: Path, model: TrainedModel, images: Tensor) -> WrittenHead:
        """Write the weights; see `TrainedHead`."""
        del model, images
        save_plain_head(folder / self.folder, self.tensors)
        return WrittenHead(line="weights of the head")


def save_plain_head(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the weights of a head as a folder."""
    with atomic_folder(folder, may_replace=_is_plain_head) as written:
        whole = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
        write_tensors(written / HEAD_FILE, whole)


def read_plain_head(folder: Path, task: str) -> PlainHead:
    """Read the weights of a head.

    Raises:
        ValueError: the file is missing or damaged.
    """
    return PlainHead(task=task, folder=folder.name, tensors=read_tensors(folder / HEAD_FILE))


def _is_plain_head(path: Path) -> bool:
    return (path / HEAD_FILE).is_file() and not (path / "config.json").is_file()


def read_directory(path: Path) -> TrainedModel:
    """Load an encoder directory, of images or of clips."""
    if is_video_encoder(path):
        clips = read_video_config(path)
        return TrainedModel(
            encoder=load_video_encoder(path),
            mean=clips.mean,
            std=clips.std,
            channels=clips.channels,
            provenance=clips.provenance,
            inflated_from=clips.inflated_from,
            origin=str(path),
        )
    images, method = read_encoder_config(path), read_method(path)
    of_features = method is not None and method.target == FEATURES
    return TrainedModel(
        encoder=load_encoder(path),
        mean=images.mean,
        std=images.std,
        channels=images.channels,
        provenance=images.provenance,
        masked_image=masked_image_of(method, images.config),
        left_out=FEATURE_DECODER if of_features else None,
        origin=str(path),
    )


def masked_image_of(found: MethodTensors | None, config: SwinV2Config) -> MaskedImageHead | None:
    """Return mask token and decoder of an encoder directory, if the decoder predicts pixels."""
    if found is None or found.target == FEATURES:
        return None
    if len(found.bias) != config.strides[-1] ** 2 * config.in_channels:
        return None
    return MaskedImageHead(
        mask_token=found.mask_token,
        weight=found.weight,
        bias=found.bias,
        norm_target=None if found.target is None else found.target == NORMALISED_PIXELS,
    )


def method_tensors(head: MaskedImageHead) -> MethodTensors:
    """Return mask token and decoder of pixels, as an encoder directory has them."""
    known = {None: None, True: NORMALISED_PIXELS, False: PIXELS}
    return MethodTensors(
        mask_token=head.mask_token.reshape(1, 1, 1, -1),
        weight=head.weight,
        bias=head.bias,
        target=known[head.norm_target],
    )


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def provenance_of(checkpoint: Path, recipe: Any) -> Provenance:
    """Return the provenance of the weights in a checkpoint."""
    state = load_state(checkpoint)
    return Provenance(step=state.step, samples_seen=state.cursor, recipe_hash=recipe_hash(recipe))
