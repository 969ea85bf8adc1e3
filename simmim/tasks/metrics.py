"""Accuracy and loss of a classifier as sums, and rows gathered from all ranks."""

from dataclasses import dataclass

import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AccuracySums:
    """Sums over classified images; the sums of parts add up."""

    top1: float = 0.0
    """Images whose true class has the highest score."""
    top5: float = 0.0
    """Images whose true class is among the five highest scores: all, of up to five classes."""
    loss: float = 0.0
    """Sum of the cross entropy."""
    samples: int = 0

    def __add__(self, other: "AccuracySums") -> "AccuracySums":
        return AccuracySums(
            top1=self.top1 + other.top1,
            top5=self.top5 + other.top5,
            loss=self.loss + other.loss,
            samples=self.samples + other.samples,
        )


def tells_top5(classes: int) -> bool:
    """Return whether top-5 accuracy says anything: there are more classes than five."""
    return classes > 5


def accuracy_sums(logits: Tensor, labels: Tensor) -> AccuracySums:
    """Compare (samples, classes) logits with int64 (samples,) labels."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    return AccuracySums(
        top1=float(hits[:, 0].sum()),
        top5=float(hits.sum()),
        loss=float(F.cross_entropy(logits.float(), labels, reduction="sum")),
        samples=len(labels),
    )


def gather_rows(part: Tensor, accelerator: Accelerator) -> Tensor:
    """Gather the rows of all ranks; ranks with fewer are padded with rows of -1."""
    even = accelerator.pad_across_processes(part, dim=0, pad_index=-1)
    rows: Tensor = accelerator.gather(even)
    return rows
