"""The SimMIM pretraining pipeline on a Swin Transformer V2 encoder."""

from simmim.method.masking import random_mask
from simmim.method.model import SimMIM

__all__ = ["SimMIM", "random_mask"]
