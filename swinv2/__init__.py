"""Swin Transformer V2: the encoder, its weights and its bridges to other libraries."""

from swinv2.config import VARIANTS, Execution, SwinV2Config, record_windows, variant_config
from swinv2.encoder import SwinV2, build_encoder
from swinv2.video import VideoConfig, VideoSwinV2, inflate
from swinv2.video_weights import load_video_encoder, read_video_config, save_video_encoder
from swinv2.weights import Provenance, load_encoder, read_encoder_config, save_encoder

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
