"""How pictures become the input of an encoder, in our words and in those of other libraries.

A picture is decoded upright, cropped to its centre, resized with an antialiased bicubic filter,
rounded to its stored type, scaled to [0, 1] and normalised. The crop comes before resizing, as in
transformers' PerceiverImageProcessor, whose pixels therefore equal ours to rounding.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swinv2.config import SwinV2Config
from swinv2.config_file import IMPLIED_CHANNELS

RGB = IMPLIED_CHANNELS[3]
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as processors store it
MARGIN = 1e-9
"""Relative margin by which the crop of a processor is enlarged, so that it is truncated as ours."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """The preparation of pictures besides mean and std."""

    crop_pct: float = 1.0
    """Fraction of the short side that the central crop keeps."""
    largest: float = 255.0
    """Stored value that becomes 1.0: 255 for 8 bits, 65535 for 16, 1 for floating point."""
    channels: tuple[str, ...] | None = None
    """Names of the channels in the order of the input; None if they are not known."""


WHOLE_PICTURES = Preparation()
"""8-bit pictures, of which the largest central square is kept."""


def describe(
    config: SwinV2Config, preparation: Preparation, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """Return the preparation as JSON values."""
    height, width = config.image_size
    return {
        "orientation": "upright, by Exif",
        "channels": config.in_channels,
        **({} if preparation.channels is None else {"channel_names": list(preparation.channels)}),
        "crop": {
            "kind": "centre",
            "crop_pct": preparation.crop_pct,
            "order": "before resizing",
            "side": "floor(crop_pct * short side) of a square input, in pixels of the picture",
        },
        "resize": {"height": height, "width": width, "filter": "bicubic", "antialias": True},
        "rescale_factor": 1 / preparation.largest,
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
    }


def from_description(content: Any) -> Preparation:
    """Return the preparation that `describe` wrote.

    Raises:
        ValueError: the content is of another form.
    """
    try:
        return Preparation(
            crop_pct=float(content["crop"]["crop_pct"]),
            largest=1 / float(content["rescale_factor"]),
        )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"it does not describe the preparation of pictures ({error})") from None


def channel_names(content: Any, count: int) -> tuple[str, ...] | None:
    """Return the names of the channels in what `describe` wrote; None if it has none.

    Args:
        content: the values, of any form.
        count: number of channels; other names are left out.
    """
    names = content.get("channel_names") if isinstance(content, Mapping) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names) if len(names) == len(set(names)) == count else None


def processor_config(
    config: SwinV2Config, preparation: Preparation, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """Return the `preprocessor_config.json` of transformers.

    An encoder of images that are not square has no processor that crops: pictures are squashed.
    """
    height, width = config.image_size
    rescales = preparation.largest != 1.0
    content = {
        "do_convert_rgb": config.in_channels == 3 and preparation.channels in (None, RGB),
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": BICUBIC,
        "do_rescale": rescales,
        "rescale_factor": 1 / preparation.largest,
        "do_normalize": True,
        "image_mean": [float(value) for value in mean],
        "image_std": [float(value) for value in std],
    }
    if height != width:
        return {"image_processor_type": "ViTImageProcessor", **content}
    side = height / (preparation.crop_pct * (1 + MARGIN))
    return {
        "image_processor_type": "PerceiverImageProcessor",
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        **content,
    }


def least_side(preparation: Preparation) -> int:
    """Return the pixels that a picture has on either side if a processor's crop is not empty.

    Of smaller ones validation crops one pixel, and a processor none.
    """
    return math.ceil(1 / preparation.crop_pct)


def sentences(config: SwinV2Config, preparation: Preparation) -> str:
    """Return sentences for a README on how to prepare pictures."""
    height, width = config.image_size
    values = {
        255.0: "values are divided by 255, those of 16 bits by 65535",
        65535.0: "values are divided by 65535, those of 8 bits by 255",
    }.get(preparation.largest, "values are taken as they are")
    part = f"the central {preparation.crop_pct:.4g} of the short side"
    if preparation.crop_pct == 1:
        square = height == width
        part = "the central square" if square else "the largest central part of that aspect ratio"
    names = preparation.channels
    order = "" if names is None else f" The channels are, in this order: {', '.join(names)}."
    return (
        f"Pictures are turned upright (Exif), {part} is cropped, resized to {width}x{height} "
        f"pixels (bicubic, antialiased), and {values}.{order}"
    )
