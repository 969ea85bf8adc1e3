"""Loss and metrics of multi-label classification."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from simmim.data.loader.batch import Batch
from simmim.tasks.metrics import gather_rows


def multi_label_losses(logits: Tensor, labels: Tensor, *, smoothing: float) -> Tensor:
    """Return the binary cross-entropy of each image, averaged over classes, (batch,).

    Args:
        logits: (batch, classes).
        labels: bool (batch, classes).
        smoothing: fraction of each target that is spread evenly over all classes, as in timm.
    """
    targets = labels.float() * (1 - smoothing) + smoothing / labels.shape[1]
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(1)


def average_precisions(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the average precision of each class that occurs, float64, from 0 to 1.

    As in scikit-learn: the sum over thresholds of precision times the gain in recall, with one
    threshold for equal scores.

    Args:
        scores: (samples, classes).
        labels: bool (samples, classes).
    """
    scores, labels = scores.cpu(), labels.cpu()  # not every device has float64
    shown = torch.nonzero(labels.any(0)).flatten().tolist()
    found = [_average_precision(scores[:, place], labels[:, place]) for place in shown]
    return torch.tensor(found, dtype=torch.float64)


def _average_precision(scores: Tensor, labels: Tensor) -> float:
    order = scores.argsort(descending=True)
    ranked, hits = scores[order], labels[order].double().cumsum(0)
    last_of_equals = torch.ones_like(ranked, dtype=torch.bool)
    last_of_equals[:-1] = ranked[1:] != ranked[:-1]
    counts = torch.arange(1, len(ranked) + 1, dtype=torch.float64, device=ranked.device)
    hits, counts = hits[last_of_equals], counts[last_of_equals]
    gained = torch.diff(hits, prepend=hits.new_zeros(1))
    return float((gained * hits / counts).sum() / hits[-1])


@torch.no_grad()
def multi_label_figures(
    batches: Iterable[Batch],
    logits: Callable[[Tensor], Tensor],
    accelerator: Accelerator,
    *,
    classes: int,
) -> dict[str, float]:
    """Return mean average precision in percent, over classes that occur, and the loss.

    Args:
        batches: this rank's part.
        logits: maps stored images to (batch, classes) logits.
        accelerator: the ranks.
        classes: number of classes.
    """
    device = accelerator.device
    # A rank may have no batch.
    scores = [torch.zeros(0, classes, device=device)]
    labels = [torch.zeros(0, classes, dtype=torch.int64, device=device)]
    for batch in batches:
        assert batch.labels is not None
        with accelerator.autocast():
            scores.append(logits(batch.images.to(device)).float())
        labels.append(batch.labels.to(device, torch.int64))
    known = gather_rows(torch.cat(labels), accelerator)
    real = (known >= 0).all(1)
    of_all, known = gather_rows(torch.cat(scores), accelerator)[real], known[real] > 0
    if not len(known):
        return {}
    losses = multi_label_losses(of_all, known, smoothing=0.0)
    precisions = average_precisions(of_all, known)
    figures = {"validation_loss": float(losses.mean())}
    if len(precisions):
        figures["mean_average_precision"] = 100 * float(precisions.mean())
    return figures
