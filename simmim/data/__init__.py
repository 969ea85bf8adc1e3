"""Data: the order of samples, reading them from shards or folders, and batches of them."""

from simmim.data.bad_samples import BadSample, BadSamples
from simmim.data.batches import Batch, BatchStream, TrainingBatches, evaluation_batches
from simmim.data.cropping import center_crop_resize, random_resized_crop
from simmim.data.decoding import Decoded, decode_pixels
from simmim.data.errors import BadSampleError, DataError
from simmim.data.image_folder import ImageFolder, open_folder
from simmim.data.images import decode
from simmim.data.mixture import MixedOrder, MixedShards
from simmim.data.order import Address, SampleOrder, slots_for
from simmim.data.reading import RawSample, ShardSet
from simmim.data.remote import RemoteReading
from simmim.data.transforms import EvalTransform, MaskDraw, Sample, TrainTransform, Transform

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
