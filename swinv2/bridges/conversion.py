"""Conversion of tensors to another library's names and back, strictly: none is lost or ignored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swinv2.bridges.checkpoints import BridgeError, ClassifierHead, ImportedEncoder, MaskedImageHead
from swinv2.bridges.importing.options import ImportOptions
from swinv2.bridges.importing.reading import list_names
from swinv2.bridges.preprocessing import channel_names
from swinv2.bridges.sizes import Sizes, missing_sizes, resolve_config
from swinv2.config import SwinV2Config
from swinv2.config_file import check_normalisation, list_problems
from swinv2.encoder import SwinV2
from swinv2.weights import build_on_meta

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CONFIG_KEY = "swinv2_encoder"
"""Key under which an export also stores its `SwinV2Config`, next to the library's own fields."""

RenameTensor = Callable[[str, Tensor], dict[str, Tensor]]
"""Returns one of our tensors, or its parts along the first axis, under the library's names."""
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    """Names of the tensors in a checkpoint."""

    rename: RenameTensor
    classifier: str
    """Prefix of `weight` and `bias` of a classifier."""
    prefix: str = ""
    """Prefix of the names of the encoder's tensors."""
    mask: str | None = None
    """Name of the mask token, in a checkpoint of SimMIM, which also has a decoder."""
    decoder_channels: int | None = None
    """Channels that the decoder predicts; None for those of the encoder's images."""


@dataclass(frozen=True, kw_only=True)
class ParsedCheckpoint:
    """A checkpoint as read, before an encoder is built from it."""

    source: str
    """The file, for messages."""
    tensors: Mapping[str, Tensor]
    """Learned tensors by the library's names."""
    dropped: tuple[str, ...]
    """Names of its buffers, which are not read."""
    layout: TensorLayout
    architecture: Mapping[str, Any]
    """Fields of `SwinV2Config`."""
    sizes: Sequence[Sizes]
    """Image and window sizes from each place in the checkpoint, the most trusted first."""
    drop_path: float
    own_config: object
    """Value of CONFIG_KEY, if `swinv2` exported the checkpoint."""
    num_classes: int | None
    """Number of classes of its classifier; None if it has none."""
    mean: Sequence[float] | None
    """Mean per channel, if the checkpoint records it."""
    std: Sequence[float] | None
    preparation: object = None
    """How its images are prepared, if `swinv2` exported the checkpoint; see `describe`."""
    classes: tuple[str, ...] = ()
    """Names of its classes."""
    fresh: Mapping[str, Tensor] | None = None
    """Tensors of the encoder that such a model lacks, with their initial values."""
    norm_target: bool | None = None
    """Whether a decoder predicts normalised pixels; None if that is not recorded."""
    usual: Sizes | None = None
    """Sizes to take where no other source has one."""
    notes: tuple[str, ...] = ()
    """What was imported from the file and what was not, one line per item."""


def convert(encoder: SwinV2, rename: RenameTensor) -> dict[str, Tensor]:
    """Return copies of the encoder's tensors under the library's names, on the CPU."""
    return {
        theirs: part.to("cpu", copy=True).contiguous()
        for name, tensor in encoder.state_dict().items()
        for theirs, part in rename(name, tensor.detach()).items()
    }


def assemble(found: ParsedCheckpoint, options: ImportOptions) -> ImportedEncoder:
    """Build the encoder of a checkpoint, with its heads and normalisation.

    Args:
        found: the parsed checkpoint.
        options: sizes from the caller, which must not contradict the checkpoint, and mean and std,
            by default the checkpoint's, or ImageNet's.

    Raises:
        BridgeError: a tensor is missing, unexpected, of a wrong shape or not finite, or a size is
            unknown or contradictory.
        ValueError: mean or std does not fit the channels.
    """
    _check_finite(found.tensors, found.source)
    sizes = [options.sizes, *found.sizes]
    notes = list(found.notes)
    if found.usual is not None:
        usual = missing_sizes(sizes, found.usual)
        sizes.append(usual)
        if usual.image_size is not None:
            notes.append(
                f"image size: {usual.origin}; give --image-size if it was trained at another"
            )
    config = resolve_config(
        found.architecture, sizes, found.source, found.drop_path, found.own_config
    )
    layout = found.layout
    head_shapes: Shapes = {}
    if layout.mask is not None:
        head_shapes |= decoder_shapes(config, layout)
    if found.num_classes is not None:
        head_shapes |= classifier_shapes(config, layout.classifier, found.num_classes)
    encoder = load_renamed(
        found.tensors,
        config,
        layout.rename,
        source=found.source,
        head_shapes=head_shapes,
        prefix=layout.prefix,
        fresh=found.fresh,
    )
    mean = tuple(options.mean or found.mean or IMAGENET_MEAN)
    std = tuple(options.std or found.std or IMAGENET_STD)
    check_normalisation(mean, std, config.in_channels)
    return ImportedEncoder(
        encoder=encoder,
        mean=mean,
        std=std,
        channels=channel_names(found.preparation, config.in_channels),
        head=_masked_image_head(found),
        classifier=_classifier(found),
        dropped=found.dropped,
        classes=found.classes,
        fresh=tuple(found.fresh or ()),
        notes=tuple(notes),
    )


def _masked_image_head(found: ParsedCheckpoint) -> MaskedImageHead | None:
    if found.layout.mask is None:
        return None
    return MaskedImageHead(
        mask_token=found.tensors[found.layout.mask].float().reshape(1, 1, 1, -1),
        weight=found.tensors["decoder.0.weight"].float(),
        bias=found.tensors["decoder.0.bias"].float(),
        norm_target=found.norm_target,
    )


def _classifier(found: ParsedCheckpoint) -> ClassifierHead | None:
    if found.num_classes is None:
        return None
    return ClassifierHead(
        weight=found.tensors[f"{found.layout.classifier}weight"].float(),
        bias=found.tensors[f"{found.layout.classifier}bias"].float(),
    )


def count_classes(tensors: Mapping[str, Tensor], classifier: str) -> int | None:
    """Return the number of classes of the classifier with this prefix; None if there is none."""
    parts = [tensors[name] for leaf in ("weight", "bias") if (name := classifier + leaf) in tensors]
    return len(parts[0]) if parts and parts[0].ndim else None


def fresh_norm(architecture: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the final norm of a model that has none: ones and zeros, not allocated yet."""
    features = architecture["embed_dim"] * 2 ** (len(architecture["depths"]) - 1)
    initial = {"norm.weight": torch.ones(1), "norm.bias": torch.zeros(1)}
    return {name: part.expand(features) for name, part in initial.items()}


def describe_beside(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a line on the tensors beside the encoder that are not imported, if any."""
    if not tensors:
        return []
    plural = "" if len(tensors) == 1 else "s"
    names = list_names(list(tensors))
    return [f"not imported: {len(tensors)} tensor{plural} beside the encoder ({names})"]


def decoder_shapes(config: SwinV2Config, layout: TensorLayout) -> Shapes:
    """Return the shapes of mask token and decoder, by name."""
    assert layout.mask is not None
    pixels = config.strides[-1] ** 2 * (layout.decoder_channels or config.in_channels)
    return {
        layout.mask: (1, 1, config.embed_dim),
        "decoder.0.weight": (pixels, config.num_features, 1, 1),
        "decoder.0.bias": (pixels,),
    }


def classifier_shapes(config: SwinV2Config, classifier: str, classes: int) -> Shapes:
    """Return the shapes of a classifier, by name."""
    return {
        f"{classifier}weight": (classes, config.num_features),
        f"{classifier}bias": (classes,),
    }


def class_names(classifier: ClassifierHead, classes: Sequence[str]) -> list[str]:
    """Return the names of the classes; LABEL_0, LABEL_1, ... if there are none.

    Raises:
        BridgeError: there are more or fewer names than classes.
    """
    count = len(classifier.bias)
    if classes and len(classes) != count:
        raise BridgeError(
            f"there are {len(classes)} names for {count} classes: give one for each, or none."
        )
    return list(classes) or [f"LABEL_{number}" for number in range(count)]


def checked_head(tensors: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """Return the tensors of a head on the CPU.

    Raises:
        BridgeError: a tensor has another shape.
    """
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in shapes.items()
        if tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise BridgeError(
            f"the head does not fit the encoder: {'; '.join(wrong)}. Give a head trained on it."
        )
    return {name: part.detach().cpu().contiguous() for name, part in tensors.items()}


def load_renamed(
    tensors: Mapping[str, Tensor],
    config: SwinV2Config,
    rename: RenameTensor,
    *,
    source: str,
    head_shapes: Mapping[str, tuple[int, ...]],
    prefix: str = "",
    fresh: Mapping[str, Tensor] | None = None,
) -> SwinV2:
    """Build the encoder of `config` from learned tensors under the library's names.

    Args:
        tensors: without buffers.
        config: config of the encoder.
        rename: maps our names to the library's.
        source: source of the tensors, for the message.
        head_shapes: names and shapes that must be there in addition to the encoder's.
        prefix: prefix of the names of the encoder's tensors.
        fresh: tensors of the encoder that the library lacks.

    Raises:
        BridgeError: tensors are missing, unexpected or of another shape; all are listed.
    """
    fresh = fresh or {}
    shapes = {name: tuple(part.shape) for name, part in tensors.items()}
    try:
        encoder = build_on_meta(config, lambda: SwinV2(config), shapes, source)
    except ValueError as error:
        raise BridgeError(str(error)) from None
    ours = encoder.state_dict()
    parts = {
        name: {prefix + theirs: tuple(part.shape) for theirs, part in rename(name, tensor).items()}
        for name, tensor in ours.items()
        if name not in fresh
    }
    expected = {theirs: shape for part in parts.values() for theirs, shape in part.items()}
    _check_tensors(tensors, expected | dict(head_shapes), config, source)
    # Copies, since tensors misaligned in a file's memory are multiplied by other kernels.
    placed = {
        name: torch.cat([tensors[theirs].float() for theirs in names]).reshape(ours[name].shape)
        for name, names in parts.items()
    }
    new = {name: part.contiguous() for name, part in fresh.items()}
    encoder.load_state_dict(placed | new, strict=True, assign=True)
    return encoder.requires_grad_().eval()


def _check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    config: SwinV2Config,
    source: str,
) -> None:
    problems = [f"missing: {name}" for name in expected if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in expected]
    problems += [
        f"shape of {name}: {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if problems:
        raise BridgeError(
            f"{source} does not fit a Swin Transformer V2 ({config.variant or 'custom'}):\n  "
            + list_problems(problems)
        )


def _check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    problems = [
        f"{name}: {reason}"
        for name, tensor in tensors.items()
        if (reason := _invalid_values(tensor)) is not None
    ]
    if problems:
        raise BridgeError(
            f"{source} has tensors that are not finite floating-point numbers:\n  "
            + "\n  ".join(problems)
        )


def _invalid_values(tensor: Tensor) -> str | None:
    """Say why a tensor does not hold finite floating-point numbers; None if it does."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return f"not stored as plain values ({tensor.device}, {tensor.layout})"
    if not tensor.is_floating_point():
        return f"of type {tensor.dtype}"
    # One NaN or Inf makes the sum non-finite; in half precision the sum could overflow.
    return None if tensor.sum(dtype=torch.float64).isfinite() else "values that are not finite"
