"""Swin Transformer V2: the encoder, its weights and its bridges to other libraries."""

from typing import TYPE_CHECKING, Any

from swinv2.config import (
    VARIANTS,
    Execution,
    SwinV2Config,
    VideoConfig,
    record_windows,
    variant_config,
)
from swinv2.config_file import Provenance, read_encoder_config, read_video_config

if TYPE_CHECKING:
    from swinv2.encoder import SwinV2, build_encoder
    from swinv2.video import VideoSwinV2, inflate
    from swinv2.weights import (
        load_encoder,
        load_video_encoder,
        save_encoder,
        save_video_encoder,
    )

__all__ = [
    "VARIANTS",
    "Execution",
    "Provenance",
    "SwinV2",
    "SwinV2Config",
    "VideoConfig",
    "VideoSwinV2",
    "build_encoder",
    "inflate",
    "load_encoder",
    "load_video_encoder",
    "read_encoder_config",
    "read_video_config",
    "record_windows",
    "save_encoder",
    "save_video_encoder",
    "variant_config",
]


def __getattr__(name: str) -> Any:
    """Import names that need torch on first access (PEP 562)."""
    if name in __all__:
        from swinv2 import encoder, video, weights  # noqa: PLC0415

        for module in (encoder, video, weights):
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
