"""Formats of encoders on disk."""

from typing import Literal, TypeAlias

Format: TypeAlias = Literal["native", "transformers", "reference", "timm", "onnx", "torch-export"]
"""native: an encoder directory; onnx and torch-export: graphs that run without this code; others:
as these libraries and the published code (reference) save theirs."""
GRAPHS: tuple[Format, ...] = ("onnx", "torch-export")
"""Formats that allow a dynamic image size."""
ImportFormat: TypeAlias = Literal["reference", "timm", "transformers", "torchvision", "mmpretrain"]
WeightsChoice: TypeAlias = Literal["averaged", "raw"]
