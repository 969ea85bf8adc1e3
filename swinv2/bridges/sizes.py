"""Image size and windows of a checkpoint, which do not follow from its learned tensors.

They come from the position buffers of older files, from settings, from names, and from the caller;
contradictions are refused.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from swinv2.bridges.checkpoints import BridgeError
from swinv2.config import VARIANTS, SwinV2Config, record_windows
from swinv2.field_values import Pair

PretrainedWindows = Sequence[int | Pair] | Literal["same"] | None
"""Pretraining window of each stage; "same" for the present windows; None if not known."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Image size and windows as one source gives them; None for what it leaves open."""

    origin: str
    """Name of the source, for messages."""
    image_size: Pair | None = None
    window_size: Pair | None = None
    pretrained_window_sizes: tuple[Pair, ...] | Literal["same"] | None = None
    stage_windows: tuple[Pair, ...] | None = None
    """Window of each stage, which only buffers have; not compared between sources."""


def read_buffers(tensors: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> Sizes:
    """Return the sizes that buffers imply for square images; none if buffers are missing."""
    origin = "its buffers"
    tables = [
        tensors.get(f"layers.{stage}.blocks.0.attn.relative_coords_table")
        for stage in range(len(architecture["depths"]))
    ]
    if any(table is None or table.ndim != 4 for table in tables):
        return Sizes(origin=origin)
    windows = tuple(
        ((table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2)
        for table in tables
        if table is not None
    )
    references = [
        _reference_window(table, window)
        for table, window in zip(tables, windows, strict=True)
        if table is not None
    ]
    window = max(windows)
    side = _image_side(tensors, windows, architecture)
    if side is not None:
        fitted = SwinV2Config(**architecture, image_size=(side, side), window_size=window)
        # Without their masks, stages would seem smaller than they are.
        side = side if fitted.stage_windows == windows else None
    return Sizes(
        origin=origin,
        image_size=None if side is None else (side, side),
        window_size=window,
        pretrained_window_sizes=(
            None if None in references else tuple(pair for pair in references if pair is not None)
        ),
        stage_windows=windows,
    )


def _reference_window(table: Tensor, window: Pair) -> Pair | None:
    """Return the window that the log-spaced coordinates of a table are relative to."""
    sides = []
    for axis, side in enumerate(window):
        farthest = float(table[0, -1, -1, axis])
        if side == 1 or not math.isfinite(farthest) or farthest <= 0:
            sides.append(side)
            continue
        reference = round(8 * (side - 1) / (8**farthest - 1)) + 1
        again = math.log2(8 * (side - 1) / max(reference - 1, 1) + 1) / 3
        if abs(again - farthest) > 2e-3:
            return None
        sides.append(reference)
    return sides[0], sides[1]


def _image_side(
    tensors: Mapping[str, Tensor], windows: Sequence[Pair], architecture: Mapping[str, Any]
) -> int | None:
    """Return the side in pixels from the first stage that has a shifted block."""
    for stage, (depth, window) in enumerate(zip(architecture["depths"], windows, strict=True)):
        if depth < 2:
            continue
        mask = tensors.get(f"layers.{stage}.blocks.1.attn_mask")
        tokens = window[0] * window[1] if mask is None else mask.shape[0] * mask.shape[1]
        rows = math.isqrt(tokens)
        stride: int = architecture["patch_size"] * 2**stage
        return rows * stride if rows * rows == tokens else None
    return None


def smallest_image(sizes: Sequence[Sizes], architecture: Mapping[str, Any]) -> Sizes | None:
    """Return the size of the smallest square image whose last stage is one of its windows.

    Args:
        sizes: sizes from each source, of which buffers say the windows.
        architecture: fields of `SwinV2Config`.
    """
    stages = len(architecture["depths"])
    windows = next((one.stage_windows for one in sizes if one.stage_windows is not None), None)
    if windows is None:
        return None
    side = windows[-1][0] * architecture["patch_size"] * 2 ** (stages - 1)
    return Sizes(
        origin=f"{side}x{side}, the smallest that its windows fit (the file has none)",
        image_size=(side, side),
    )


def variant_of(architecture: Mapping[str, Any]) -> str | None:
    """Return the published variant with these fields; None if there is none."""
    return next(
        (
            name
            for name, published in VARIANTS.items()
            if all(getattr(published, key) == value for key, value in architecture.items())
        ),
        None,
    )


def missing_sizes(known: Sequence[Sizes], other: Sizes) -> Sizes:
    """Return the sizes of `other` that the known ones leave open."""
    changes: dict[str, Any] = {
        name: None for name in _ARGUMENTS if any(getattr(one, name) is not None for one in known)
    }
    return replace(other, **changes)


def as_pair(size: int | Sequence[int]) -> Pair:
    """Return a size of one or two numbers as (height, width)."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def as_windows(windows: PretrainedWindows) -> tuple[Pair, ...] | Literal["same"] | None:
    """Return the windows as pairs; zeros mean the present windows."""
    if windows is None or windows == "same":
        return windows
    pairs = tuple(as_pair(window) for window in windows)
    return "same" if all(pair == (0, 0) for pair in pairs) else pairs


def resolve_config(
    architecture: Mapping[str, Any],
    sizes: Sequence[Sizes],
    source: str,
    drop_path: float,
    own_config: object = None,
) -> SwinV2Config:
    """Return the config of an encoder from its tensors and the sizes of each source.

    Args:
        architecture: fields that follow from the tensors.
        sizes: sizes from each source, the most trusted first.
        source: the checkpoint, for messages.
        drop_path: largest rate of stochastic depth.
        own_config: fields of the config that our export stored. They are used if they compute the
            same, since they include what other libraries cannot express, such as the variant.

    Raises:
        BridgeError: a size is given by no source, or differently by two.
    """
    given = {
        name: [(one.origin, value) for one in sizes if (value := getattr(one, name)) is not None]
        for name in _ARGUMENTS
    }
    unknown = [name for name, values in given.items() if not values]
    if unknown:
        raise BridgeError(
            f"{source} does not record its {', '.join(unknown)}: give "
            + " and ".join(_ARGUMENTS[name] for name in unknown)
            + ". The tensors fit any of these, but the features depend on them."
        )
    first_given = {name: given[name][0][1] for name in ("image_size", "window_size")}
    present = SwinV2Config(**architecture, **first_given)
    windows = given["pretrained_window_sizes"][0][1]
    for name, values in given.items():
        resolved = [(one, present.stage_windows if v == "same" else v) for one, v in values]
        first, value = resolved[0]
        for other, another in resolved[1:]:
            if not _agree(value, another):
                raise BridgeError(
                    f"{source}: {name} is {value} according to {first} and {another} according to "
                    f"{other}. Import it with the saved size, and change that with set_input or "
                    "load_encoder."
                )
    config = SwinV2Config(
        **architecture,
        **first_given,
        pretrained_window_sizes=None if windows == "same" else windows,
        drop_path=drop_path,
    )
    return _prefer_own_config(config, own_config)


def _prefer_own_config(config: SwinV2Config, own_config: object) -> SwinV2Config:
    """Return the config that our export stored, unless it computes something else."""
    if not isinstance(own_config, Mapping):
        return config
    try:
        ours = SwinV2Config(**own_config)
        alike = replace(
            ours,
            variant=config.variant,
            mlp_ratio=config.mlp_ratio,
            pretrained_window_sizes=config.pretrained_window_sizes,
        )
    except (TypeError, ValueError):  # edited by hand
        return config
    same = (
        alike == config
        and _agree(record_windows(ours), record_windows(config))
        and int(ours.mlp_ratio * ours.embed_dim) == int(config.mlp_ratio * config.embed_dim)
    )
    return ours if same else config


_ARGUMENTS = {
    "image_size": "image_size (pixels)",
    "window_size": "window_size (tokens)",
    "pretrained_window_sizes": (
        'pretrained_window_sizes (tokens, one per stage, or "same" if trained at these)'
    ),
}


def _agree(one: Any, other: Any) -> bool:
    """Return whether two sizes agree; windows of 1 and of 2 tokens have the same coordinates."""
    if one and isinstance(one[0], tuple):
        return len(one) == len(other) and all(
            max(ours, 2) == max(theirs, 2)
            for pair, another in zip(one, other, strict=True)
            for ours, theirs in zip(pair, another, strict=True)
        )
    return bool(one == other)
