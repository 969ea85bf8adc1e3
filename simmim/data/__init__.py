"""Data: the order of samples, reading them from shards or folders, and batches of them."""

from simmim.data.datasets.folder import ImageFolder, open_folder
from simmim.data.datasets.mixture import MixedOrder, MixedShards
from simmim.data.datasets.remote import RemoteReading
from simmim.data.datasets.shards import RawSample, ShardSet
from simmim.data.loader.bad_samples import BadSample, BadSamples
from simmim.data.loader.batches import Batch, BatchStream, TrainingBatches, evaluation_batches
from simmim.data.order.errors import BadSampleError, DataError
from simmim.data.order.order import Address, SampleOrder, slots_for
from simmim.data.transforms.cropping import center_crop_resize, random_resized_crop
from simmim.data.transforms.decoding import Decoded, decode_pixels
from simmim.data.transforms.image_transforms import (
    EvalTransform,
    MaskDraw,
    Sample,
    TrainTransform,
    Transform,
)
from simmim.data.transforms.pillow_decoding import decode

__all__ = [
    "Address",
    "BadSample",
    "BadSampleError",
    "BadSamples",
    "Batch",
    "BatchStream",
    "DataError",
    "Decoded",
    "EvalTransform",
    "ImageFolder",
    "MaskDraw",
    "MixedOrder",
    "MixedShards",
    "RawSample",
    "RemoteReading",
    "Sample",
    "SampleOrder",
    "ShardSet",
    "TrainTransform",
    "TrainingBatches",
    "Transform",
    "center_crop_resize",
    "decode",
    "decode_pixels",
    "evaluation_batches",
    "open_folder",
    "random_resized_crop",
    "slots_for",
]
