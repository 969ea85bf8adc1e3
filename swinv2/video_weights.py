"""The directory of a video encoder: as that of an image encoder, and what it was inflated from."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swinv2.config import VideoConfig, record_windows
from swinv2.encoder_file import (
    VIDEO_FORMAT,
    EncoderFile,
    Provenance,
    read_description,
    to_json,
)
from swinv2.video import VideoSwinV2
from swinv2.weights import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    config_text,
    filled,
    write_directory,
)


@dataclass(frozen=True, kw_only=True)
class VideoEncoderFile(EncoderFile):
    """What ``config.json`` of the directory of a video encoder says."""

    config: VideoConfig
    """Every size of the encoder, with the windows it was trained with."""
    inflated_from: Provenance | None
    """Where the weights of the image encoder come from that these began as; None for none."""


def save_video_encoder(
    encoder: VideoSwinV2,
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    provenance: Provenance | None = None,
    inflated_from: Provenance | None = None,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Write ``encoder`` as the directory ``path`` and return it; see `save_encoder`.

    Args:
        encoder: on any device; it is left as it is.
        path: a new or empty folder, or an encoder directory.
        mean: one value a channel, for frames in [0, 1].
        std: one positive value a channel.
        provenance: steps, clips and recipe behind the weights.
        inflated_from: that of the image encoder the weights began as.
        check: is given the written folder before it takes its place.

    Raises:
        ValueError: ``mean`` or ``std`` does not fit the channels, or ``path`` is occupied.
    """
    config = replace(
        encoder.config,
        pretrained_window_sizes=record_windows(encoder.config),
        pretrained_window_frames=encoder.config.recorded_frames,
    )
    description = VideoEncoderFile(
        config=config,
        mean=tuple(float(value) for value in mean),
        std=tuple(float(value) for value in std),
        provenance=provenance or Provenance(),
        inflated_from=inflated_from,
    )
    text = to_json(description, VIDEO_FORMAT, inflated_from=inflated_from)
    return write_directory(encoder, path, config=text, readme=_readme(description), check=check)


def load_video_encoder(
    path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    window_size: int | tuple[int, int] | None = None,
    frames: int | None = None,
    window_frames: int | None = None,
    drop_path: float | None = None,
) -> VideoSwinV2:
    """Build the encoder that the directory ``path`` holds, on the CPU, in evaluation mode.

    Sizes that are given take the place of the saved ones, in time as in space: position offsets
    stay relative to the windows that were trained with; see `load_encoder`.

    Args:
        path: what `save_video_encoder` wrote.
        image_size: nominal (height, width) of frames in pixels.
        window_size: window (height, width) in tokens.
        frames: nominal length of a clip.
        window_frames: window along time in tokens.
        drop_path: greatest rate of stochastic depth.

    Raises:
        ValueError: ``path`` is no directory of a video encoder, does not hold every tensor of it,
            or a size cannot work.
    """
    sizes: dict[str, Any] = {
        "image_size": image_size,
        "window_size": window_size,
        "frames": frames,
        "window_frames": window_frames,
        "drop_path": drop_path,
    }
    config = replace(
        read_video_config(path).config,
        **{name: size for name, size in sizes.items() if size is not None},
    )
    return filled(lambda: VideoSwinV2(config), Path(path) / WEIGHTS_FILE)


def read_video_config(path: str | os.PathLike[str]) -> VideoEncoderFile:
    """Return what the ``config.json`` of a video encoder's directory says.

    Raises:
        ValueError: there is none, or it is not one that this version can read.
    """
    text, file = config_text(path)
    values = read_description(text, file, VideoConfig, "inflated_from", format_name=VIDEO_FORMAT)
    return VideoEncoderFile(**values)


def holds_video_encoder(path: str | os.PathLike[str]) -> bool:
    """Tell whether ``path`` is the directory of a video encoder, and no other."""
    folder = Path(path)
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == VIDEO_FORMAT


def _readme(description: VideoEncoderFile) -> str:
    """Return the text of ``README.md``: the lines that load the directory, and what it holds."""
    config = description.config
    height, width = config.image_size
    return f"""# Swin Transformer V2 encoder of clips

In this folder, with `swinv2` installed:

```python
from swinv2 import load_video_encoder, read_video_config

encoder = load_video_encoder(".")
description = read_video_config(".")
```

Clips are (batch, frames, {config.in_channels}, height, width). `encoder.features(clips)` gives
{len(config.depths)} maps, at strides {", ".join(map(str, config.strides))}; `encoder(clips)` the \
last, as
(batch, frames, rows, columns, {config.num_features}). From values in [0, 1] subtract
`description.mean`, {list(description.mean)}, then divide by
`description.std`, {list(description.std)}.

It is of {config.variant or "own"} sizes and made for {config.frames} frames of {width}x{height} \
pixels; `load_video_encoder(".", image_size=...,
window_size=..., frames=...)` takes it to others.
"""
