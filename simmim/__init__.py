"""The SimMIM pretraining pipeline on a Swin Transformer V2 encoder."""

from simmim.masking import random_mask
from simmim.model import SimMIM

__all__ = ["SimMIM", "random_mask"]
