"""Swin Transformer V2: the encoder, its weights and its bridges to other libraries."""

from swinv2.config import VARIANTS, SwinV2Config, record_windows, variant_config
from swinv2.encoder import SwinV2, build_encoder

__all__ = [
    "VARIANTS",
    "SwinV2",
    "SwinV2Config",
    "build_encoder",
    "record_windows",
    "variant_config",
]
