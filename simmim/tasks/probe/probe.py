"""Evaluation of frozen features with k-nearest neighbours and a linear classifier."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data_prep.channels import describe as describe_names
from data_prep.format.text import count_noun
from simmim.data.channels import check_channels
from simmim.data.datasets.mixture import Shards
from simmim.data.datasets.opening import open_sets
from simmim.data.loader.batches import evaluation_batches
from simmim.data.order.randomness import shuffled
from simmim.data.transforms.image_transforms import EvalTransform
from simmim.engine.generators import seeded
from simmim.tasks.features import Normalise, pooled_features
from simmim.tasks.input_check import EncoderInput, check_input
from simmim.tasks.loading import open_labelled
from simmim.tasks.metrics import accuracy_sums, tells_top5
from simmim.tasks.pretrained import find_weights
from simmim.tasks.probe.recipe import ProbeData, ProbeRecipe, ProbeSettings
from swinv2 import SwinV2, build_encoder, load_encoder
from swinv2.config_file import EncoderDescription, read_encoder_config

Start = Literal["pretrained", "scratch"]

L2_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
"""L2 penalties that the linear classifier chooses from."""

BLOCK_SIMILARITIES = 2**26
"""Similarities in memory at a time in the neighbour search: 256 MB."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Accuracy on the validation images, in percent."""

    knn_top1: float
    linear_top1: float
    linear_top5: float | None
    """None of five classes or fewer."""
    train_samples: int
    validation_samples: int


@dataclass(frozen=True, kw_only=True)
class LabelledFeatures:
    """Frozen features of a set of images."""

    values: Tensor
    """float32 (samples, num_features)."""
    labels: Tensor
    """int64 (samples,)."""


def compare(recipe: ProbeRecipe, device: torch.device | str = "cpu") -> dict[Start, ProbeResult]:
    """Evaluate the weights that `recipe.init` names on the same images.

    Raises:
        ValueError: the encoder directory or the shards cannot be used.
    """
    directory = find_weights(recipe.encoder).encoder
    description = read_encoder_config(directory)
    pretrained = load_encoder(
        directory, image_size=recipe.data.image_size, window_size=recipe.data.window_size
    )
    sys.stderr.write(f"{describe(directory, description, pretrained)}\n")
    training, validation = open_probe_shards(recipe.data)
    recipe = replace(recipe, data=_with_channels(recipe, description, training, validation))
    wanted = EncoderInput(
        channels=description.config.in_channels,
        mean=description.mean,
        std=description.std,
        trained=recipe.encoder,
    )
    for text in check_input(training, wanted, recipe.data):
        sys.stderr.write(f"WARNING: {text}\n")
    starts: tuple[Start, ...] = ("pretrained", "scratch")
    results: dict[Start, ProbeResult] = {}
    for start in starts:
        if recipe.init in (start, "both"):
            results[start] = probe(
                pretrained if start == "pretrained" else scratch_like(pretrained, recipe.seed),
                training,
                validation,
                data=recipe.data,
                settings=recipe.probe,
                mean=description.mean,
                std=description.std,
                device=device,
                label=start,
            )
    return results


def _with_channels(
    recipe: ProbeRecipe, description: EncoderDescription, training: Shards, validation: Shards
) -> ProbeData:
    """Return the settings of the images with the channels of the encoder, which they must have.

    Raises:
        ValueError: they have others, or another order though none is asked for.
    """
    data, trained = recipe.data, f"the encoder of {recipe.encoder}"
    asked, wanted = data.wanted_channels, description.channels
    if asked is not None and wanted is not None and asked != wanted:
        raise ValueError(
            f"data.channels are {describe_names(asked)}, and {trained} takes "
            f"{describe_names(wanted)}: set data.channels to these, or leave it out."
        )
    data = replace(data, channels=asked or wanted)
    sources = {"data.shards": training, "validation set": validation}
    check_channels(sources, data, asked or wanted, asked=asked is not None, trained=trained)
    return data


def describe(directory: Path, description: EncoderDescription, probed: SwinV2) -> str:
    """Return a line on the architecture and normalisation that both initialisations have."""
    config, trained = probed.config, description.config
    (height, width), (rows, columns) = config.image_size, config.window_size
    names = description.channels
    named = "" if names is None else f" {describe_names(names)}"
    line = (
        f"the encoder of {directory} ({config.variant or 'custom architecture'}, "
        f"{count_noun(config.in_channels, 'channel')}{named}, mean {list(description.mean)}, std "
        f"{list(description.std)}) at {width}x{height} pixels with windows of {columns}x{rows}"
    )
    if (config.image_size, config.window_size) == (trained.image_size, trained.window_size):
        return line
    (height, width), (rows, columns) = trained.image_size, trained.window_size
    return (
        f"{line}; data.image_size and data.window_size override its {width}x{height} pixels "
        f"with windows of {columns}x{rows}"
    )


def table(results: Mapping[Start, ProbeResult]) -> str:
    """Return the results as a table for a person, one row per initialisation."""
    has_top5 = any(found.linear_top5 is not None for found in results.values())
    lines = ["encoder      kNN top-1  linear top-1" + ("  linear top-5" if has_top5 else "")]
    for start, found in results.items():
        top5 = "" if found.linear_top5 is None else f"  {found.linear_top5:12.2f}"
        lines.append(f"{start:<11s}  {found.knn_top1:9.2f}  {found.linear_top1:12.2f}{top5}")
    lines += [
        f"percent of {found.validation_samples:,} validation images, "
        f"after {found.train_samples:,} labelled training images"
        for found in list(results.values())[:1]
    ]
    return "\n".join(lines)


def scratch_like(encoder: SwinV2, seed: int) -> SwinV2:
    """Return an encoder of the same architecture with random weights drawn with `seed`."""
    with seeded(seed):
        return build_encoder(encoder.config).eval()


def open_probe_shards(data: ProbeData) -> tuple[Shards, Shards]:
    """Open the training and validation shards.

    Raises:
        ValueError: shards cannot be read, are not labelled, or have different classes.
    """
    training, validation = open_labelled(
        open_sets(data.shards, data.remote_reading),
        validation=None
        if data.validation is None
        else open_sets(data.validation, data.remote_reading),
        validation_shards=data.validation_shards,
        fraction=data.fraction,
        seed=data.fraction_seed,
    )
    assert validation is not None
    return training, validation


def probe(
    encoder: Any,
    training: Shards,
    validation: Shards,
    *,
    data: ProbeData,
    settings: ProbeSettings,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device | str = "cpu",
    label: str = "probe",
) -> ProbeResult:
    """Classify the validation images by the frozen features of the training images.

    Args:
        encoder: an `ImageEncoder`, moved to `device`; its weights do not change.
        training: labelled shards.
        validation: shards with the same classes.
        data: settings for reading images; the folders are not used.
        settings: the classifiers.
        mean: mean per channel, from 0 to 1.
        std: standard deviation per channel, from 0 to 1.
        device: device for encoding and comparing.
        label: prefix of the progress bar.
    """
    known, asked = (
        extract_features(encoder, shards, data=data, mean=mean, std=std, device=device, label=text)
        for shards, text in ((training, f"{label}: training"), (validation, f"{label}: validation"))
    )
    known, asked = standardise(known, asked)
    if not sys.stderr.isatty():  # no bars were shown
        counts = f"{len(known.labels):,} training and {len(asked.labels):,} validation images"
        sys.stderr.write(f"{label}: encoded {counts}; fitting the classifiers\n")
    votes = knn_votes(
        known,
        asked.values,
        num_classes=len(training.classes),
        neighbours=settings.neighbours,
        temperature=settings.temperature,
    )
    logits = linear_logits(
        known, asked.values, num_classes=len(training.classes), steps=settings.linear_steps
    )
    by_votes, by_lines = accuracy_sums(votes, asked.labels), accuracy_sums(logits, asked.labels)
    return ProbeResult(
        knn_top1=100 * by_votes.top1 / by_votes.samples,
        linear_top1=100 * by_lines.top1 / by_lines.samples,
        linear_top5=(
            100 * by_lines.top5 / by_lines.samples if tells_top5(len(training.classes)) else None
        ),
        train_samples=len(known.labels),
        validation_samples=len(asked.labels),
    )


def extract_features(
    encoder: Any,
    shards: Shards,
    *,
    data: ProbeData,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device | str,
    label: str,
) -> LabelledFeatures:
    """Return the average-pooled features of every sample of `shards`, in order."""
    transform = EvalTransform(
        size=encoder.image_size,
        crop_pct=data.crop_pct,
        channels=encoder.in_channels,
        data=data,
    )
    batches = evaluation_batches(
        shards, transform, batch_size=data.batch_size, workers=data.workers
    )
    normalise = Normalise(mean, std).to(device)
    values, labels = [], []
    bar = tqdm(total=shards.samples, desc=label, unit="image", leave=False, disable=None)
    with bar, torch.no_grad(), _frozen(encoder.to(device)):
        for batch in batches:
            assert batch.labels is not None
            values.append(pooled_features(encoder, normalise(batch.images.to(device))).float())
            labels.append(batch.labels.to(device))
            bar.update(len(batch))
    if batches.bad_samples.bad:
        tqdm.write(f"{label}: skipped {batches.bad_samples.summary()}", file=sys.stderr)
    return LabelledFeatures(values=torch.cat(values), labels=torch.cat(labels))


@contextmanager
def _frozen(encoder: nn.Module) -> Iterator[None]:
    was_training = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(was_training)


def standardise(
    known: LabelledFeatures, asked: LabelledFeatures
) -> tuple[LabelledFeatures, LabelledFeatures]:
    """Standardise both by the mean and standard deviation of the known features.

    Without it a few strong features, and what all images share, dominate every cosine similarity.
    """
    mean, std = known.values.mean(dim=0), known.values.std(dim=0, correction=0).clamp(min=1e-6)
    return (
        LabelledFeatures(values=(known.values - mean) / std, labels=known.labels),
        LabelledFeatures(values=(asked.values - mean) / std, labels=asked.labels),
    )


def knn_votes(
    known: LabelledFeatures, asked: Tensor, *, num_classes: int, neighbours: int, temperature: float
) -> Tensor:
    """Return kNN votes, weighted by exp(cosine similarity / temperature).

    Args:
        known: labelled features.
        asked: (samples, num_features).
        num_classes: number of classes.
        neighbours: number of neighbours; at most all known features.
        temperature: temperature of the votes.

    Returns:
        (samples, num_classes): each row sums to 1.
    """
    directions = F.normalize(known.values, dim=1)
    neighbours = min(neighbours, len(directions))
    votes = asked.new_zeros(len(asked), num_classes)
    rows = max(1, BLOCK_SIMILARITIES // len(directions))
    for first in range(0, len(asked), rows):
        block = F.normalize(asked[first : first + rows], dim=1)
        nearest = (block @ directions.T).topk(neighbours, dim=1)
        weights = (nearest.values / temperature).softmax(dim=1)
        votes[first : first + rows].scatter_add_(1, known.labels[nearest.indices], weights)
    return votes


def linear_logits(
    known: LabelledFeatures, asked: Tensor, *, num_classes: int, steps: int
) -> Tensor:
    """Fit a linear classifier to the known features and apply it: (samples, num_classes).

    Both should be standardised. The L2 penalty is the one of `L2_STRENGTHS` with the lowest loss on
    a fifth of the known features after fitting the rest.
    """
    values, labels = known.values, known.labels
    order = torch.from_numpy(shuffled(len(labels), "probe penalty")).to(labels.device)
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]
    losses = []
    for strength in L2_STRENGTHS if len(held) else L2_STRENGTHS[:1]:
        line = _fit_line(values[kept], labels[kept], num_classes, strength, steps)
        losses.append(accuracy_sums(line(values[held]), labels[held]).loss)
    strength = L2_STRENGTHS[losses.index(min(losses))]
    return _fit_line(values, labels, num_classes, strength, steps)(asked)


@dataclass(frozen=True)
class _Line:
    weight: Tensor
    bias: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        return F.linear(values, self.weight, self.bias)


def _fit_line(
    values: Tensor, labels: Tensor, num_classes: int, strength: float, steps: int
) -> _Line:
    """Minimise cross entropy + strength / 2 · |weight|², which is convex."""
    weight = values.new_zeros(num_classes, values.shape[1]).requires_grad_()
    bias = values.new_zeros(num_classes).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        weight.grad = bias.grad = None
        loss = F.cross_entropy(F.linear(values, weight, bias), labels)
        loss = loss + strength / 2 * weight.square().sum()
        weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
        return loss.detach()

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return _Line(weight.detach(), bias.detach())
