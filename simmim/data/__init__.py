"""Data: the order of samples, reading them from shards, and batches of them."""

from simmim.data.batches import Batch, BatchStream, TrainingBatches, evaluation_batches
from simmim.data.errors import DataError
from simmim.data.images import center_crop_resize, decode, random_resized_crop
from simmim.data.order import Address, SampleOrder, slots_for
from simmim.data.reading import RawSample, ShardSet
from simmim.data.remote import RemoteReading
from simmim.data.transforms import EvalTransform, MaskDraw, Sample, TrainTransform, Transform

__all__ = [
    "Address",
    "Batch",
    "BatchStream",
    "DataError",
    "EvalTransform",
    "MaskDraw",
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
    "evaluation_batches",
    "random_resized_crop",
    "slots_for",
]
