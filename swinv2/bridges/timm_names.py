"""What names and arguments of timm's swinv2 models tell of sizes."""

import re
from collections.abc import Mapping
from typing import Any

from swinv2.bridges.contents import BridgeError
from swinv2.bridges.sizes import Sizes, as_pair, as_windows
from swinv2.config import SwinV2Config

_NAME = re.compile(r"swinv2_(\w+?)_window(\d+)(?:to(\d+))?_(\d+)(?:to(\d+))?(?=\.|$)")


def model_name(config: SwinV2Config, arguments: Mapping[str, Any]) -> str:
    """Return timm's name for these sizes, or for a model of the variant at other sizes."""
    sizes = (arguments["img_size"], arguments["window_size"])
    windows = config.pretrained_window_sizes or config.stage_windows
    if config.variant in ("tiny", "small") or config.variant is None:
        size = "window16_256" if sizes == (256, 16) else "window8_256"
        return f"swinv2_{config.variant or 'tiny'}_{size}"
    transferred = windows == ((12, 12), (12, 12), (12, 12), (6, 6))
    if transferred and sizes == (256, 16):
        size = "window12to16_192to256"
    elif transferred and sizes == (384, 24):
        size = "window12to24_192to384"
    elif config.variant == "base" and sizes in ((256, 8), (256, 16)):
        size = f"window{sizes[1]}_256"
    else:
        size = "window12_192"
    return f"swinv2_{config.variant}_{size}"


def named_sizes(origin: str, name: object, num_stages: int) -> Sizes:
    """Return what a name such as swinv2_base_window12to16_192to256 says."""
    if not isinstance(name, str):
        return Sizes(origin=origin)
    parts = _NAME.match(name)
    if parts is None:
        raise BridgeError(
            f"{name!r} is no swinv2 model of timm: they have names such as "
            "swinv2_tiny_window8_256 or swinv2_base_window12to16_192to256."
        )
    _, window, to_window, size, to_size = parts.groups()
    windows: Any = "same"
    if to_window is not None:
        tokens = [int(size) // (4 * 2**stage) for stage in range(num_stages)]
        windows = tuple(as_pair(min(int(window), side)) for side in tokens)
    return Sizes(
        origin=origin,
        image_size=as_pair(int(to_size or size)),
        window_size=as_pair(int(to_window or window)),
        pretrained_window_sizes=windows,
    )


def only_missing(told: Sizes, other: Sizes) -> Sizes:
    """Return what `other` says about what `told` leaves open."""
    return Sizes(
        origin=other.origin,
        image_size=None if told.image_size is not None else other.image_size,
        window_size=None if told.window_size is not None else other.window_size,
        pretrained_window_sizes=None
        if told.pretrained_window_sizes is not None
        else other.pretrained_window_sizes,
    )


def read_arguments(content: Mapping[str, Any]) -> tuple[Sizes, float]:
    """Return the sizes and the stochastic depth that a ``config.json`` tells."""
    origin = "its config.json"
    arguments = content.get("model_args") or {}
    image, window = arguments.get("img_size"), arguments.get("window_size")
    windows = arguments.get("pretrained_window_sizes")
    if isinstance(window, list | tuple) and window and isinstance(window[0], list | tuple):
        window = max(window, key=max)
    return Sizes(
        origin=origin,
        image_size=None if image is None else as_pair(image),
        window_size=None if window is None else as_pair(window),
        pretrained_window_sizes=as_windows(windows),
    ), float(arguments.get("drop_path_rate", 0.0))
