"""From our tensors to another library's and back: every learned one is placed, or named."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swinv2.bridges.checkpoints import BridgeError, Classifier, Imported, MaskedImageHead
from swinv2.bridges.sizes import Sizes, settle
from swinv2.config import SwinV2Config
from swinv2.config_file import check_normalisation
from swinv2.encoder import SwinV2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RECORD = "swinv2_encoder"
"""Where an export has its config in our own words, beside what the library reads."""

Split = Callable[[str, Tensor], dict[str, Tensor]]
"""Gives one of our tensors, or the parts of it along its first axis, under their names."""
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the tensors of a checkpoint stand."""

    split: Split
    classifier: str
    """What stands before ``weight`` and ``bias`` of a classifier."""
    prefix: str = ""
    """What stands before the names of the encoder's own."""
    mask: str | None = None
    """The mask token's name, in a checkpoint of SimMIM, where a decoder stands beside it."""
    decoder_channels: int | None = None
    """Channels of the images that the decoder predicts; those of the encoder's if None."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was read of a checkpoint, before anything is made of it."""

    source: str
    """The file, for messages."""
    tensors: Mapping[str, Tensor]
    """Learned ones alone, by their own names."""
    dropped: tuple[str, ...]
    """Names of its buffers."""
    layout: Layout
    architecture: Mapping[str, Any]
    """Fields of `SwinV2Config`."""
    known: Sequence[Sizes]
    """Other sizes by origin in the checkpoint, the most trusted first."""
    drop_path: float
    recorded: object
    """The config that an export of ours wrote beside the tensors."""
    num_classes: int | None
    """Of its classifier; None where there is none."""
    mean: Sequence[float] | None
    """Of each channel, where the checkpoint tells."""
    std: Sequence[float] | None
    classes: tuple[str, ...] = ()
    """Names of its classes."""
    fresh: Mapping[str, Tensor] | None = None
    """Our tensors that such a model has not."""


def convert(encoder: SwinV2, split: Split) -> dict[str, Tensor]:
    """Return copies of the encoder's tensors under their names, on the CPU."""
    return {
        theirs: part.to("cpu", copy=True).contiguous()
        for name, tensor in encoder.state_dict().items()
        for theirs, part in split(name, tensor.detach()).items()
    }


def assemble(
    found: Found,
    given: Sizes,
    *,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Imported:
    """Make an encoder of a checkpoint, with its heads and normalisation.

    Args:
        found: what the checkpoint holds.
        given: sizes that the caller says, which may not contradict it.
        mean: of each channel; by default what the checkpoint tells, or ImageNet's.
        std: of each channel, in the same way.

    Raises:
        BridgeError: a tensor is missing, unexpected or misshapen, or holds no finite numbers, or a
            size is unknown or told differently by two.
        ValueError: mean or std does not fit the channels.
    """
    _check_numbers(found.tensors, found.source)
    known = [given, *found.known]
    config = settle(found.architecture, known, found.source, found.drop_path, found.recorded)
    layout = found.layout
    also: Shapes = {}
    if layout.mask is not None:
        also |= decoder_shapes(config, layout)
    if found.num_classes is not None:
        also |= classifier_shapes(config, layout.classifier, found.num_classes)
    encoder = place(
        found.tensors,
        config,
        layout.split,
        source=found.source,
        also=also,
        prefix=layout.prefix,
        fresh=found.fresh,
    )
    mean = tuple(mean or found.mean or IMAGENET_MEAN)
    std = tuple(std or found.std or IMAGENET_STD)
    check_normalisation(mean, std, config.in_channels)
    return Imported(
        encoder=encoder,
        mean=mean,
        std=std,
        head=_masked_image_head(found),
        classifier=_classifier(found),
        dropped=found.dropped,
        classes=found.classes,
        fresh=tuple(found.fresh or ()),
    )


def _masked_image_head(found: Found) -> MaskedImageHead | None:
    if found.layout.mask is None:
        return None
    return MaskedImageHead(
        mask_token=found.tensors[found.layout.mask].float().reshape(1, 1, 1, -1),
        weight=found.tensors["decoder.0.weight"].float(),
        bias=found.tensors["decoder.0.bias"].float(),
    )


def _classifier(found: Found) -> Classifier | None:
    if found.num_classes is None:
        return None
    return Classifier(
        weight=found.tensors[f"{found.layout.classifier}weight"].float(),
        bias=found.tensors[f"{found.layout.classifier}bias"].float(),
    )


def count_classes(tensors: Mapping[str, Tensor], classifier: str) -> int | None:
    """Return how many classes the classifier of that prefix has; None where there is none."""
    parts = [tensors[name] for leaf in ("weight", "bias") if (name := classifier + leaf) in tensors]
    return len(parts[0]) if parts and parts[0].ndim else None


def decoder_shapes(config: SwinV2Config, layout: Layout) -> Shapes:
    """Return the shapes of mask token and decoder by name."""
    assert layout.mask is not None
    pixels = config.strides[-1] ** 2 * (layout.decoder_channels or config.in_channels)
    return {
        layout.mask: (1, 1, config.embed_dim),
        "decoder.0.weight": (pixels, config.num_features, 1, 1),
        "decoder.0.bias": (pixels,),
    }


def classifier_shapes(config: SwinV2Config, classifier: str, classes: int) -> Shapes:
    """Return the shapes of a classifier by name."""
    return {
        f"{classifier}weight": (classes, config.num_features),
        f"{classifier}bias": (classes,),
    }


def checked_head(tensors: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """Return the tensors of a head on the CPU.

    Raises:
        BridgeError: one is of another shape.
    """
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in shapes.items()
        if tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise BridgeError(f"the head does not fit the encoder: {'; '.join(wrong)}.")
    return {name: part.detach().cpu().contiguous() for name, part in tensors.items()}


def place(
    tensors: Mapping[str, Tensor],
    config: SwinV2Config,
    split: Split,
    *,
    source: str,
    also: Mapping[str, tuple[int, ...]],
    prefix: str = "",
    fresh: Mapping[str, Tensor] | None = None,
) -> SwinV2:
    """Build the encoder of `config` from learned tensors under their names.

    Args:
        tensors: without buffers.
        config: of the encoder.
        split: what they call our tensors.
        source: where the tensors come from, for the message.
        also: names and shapes that must be there beside the encoder's own.
        prefix: what stands before the names of the encoder's own.
        fresh: tensors of ours that are not looked for.

    Raises:
        BridgeError: a tensor is missing, unexpected or of another shape; all are listed.
    """
    fresh = fresh or {}
    with torch.device("meta"):
        encoder = SwinV2(config)
    ours = encoder.state_dict()
    parts = {
        name: {prefix + theirs: tuple(part.shape) for theirs, part in split(name, tensor).items()}
        for name, tensor in ours.items()
        if name not in fresh
    }
    expected = {theirs: shape for part in parts.values() for theirs, shape in part.items()}
    _check_tensors(tensors, expected | dict(also), config, source)
    # Copies, since a tensor that lies askew in a file's memory is multiplied by other kernels.
    placed = {
        name: torch.cat([tensors[theirs].float() for theirs in names]).reshape(ours[name].shape)
        for name, names in parts.items()
    }
    encoder.load_state_dict(placed | dict(fresh), strict=True, assign=True)
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
            f"{source} does not fit a Swin Transformer V2 of {config.variant or 'these'} sizes:\n  "
            + "\n  ".join(problems)
        )


def _check_numbers(tensors: Mapping[str, Tensor], source: str) -> None:
    problems = [
        f"{name} holds {reason}"
        for name, tensor in tensors.items()
        if (reason := _not_numbers(tensor)) is not None
    ]
    if problems:
        raise BridgeError(
            f"{source} does not hold finite floating-point numbers alone:\n  "
            + "\n  ".join(problems)
        )


def _not_numbers(tensor: Tensor) -> str | None:
    """Say what a tensor holds instead of finite floating-point numbers, or None."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return f"none in plain memory ({tensor.device}, {tensor.layout})"
    if not tensor.is_floating_point():
        return f"{tensor.dtype}"
    # One number that is not finite makes the sum so; half precision would overflow in it.
    return None if tensor.sum(dtype=torch.float64).isfinite() else "some that are not finite"
