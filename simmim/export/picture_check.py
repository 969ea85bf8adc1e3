"""Pictures through the processor of an export: from files to the same answers as in validation."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data_prep.channels import are_pictures
from simmim.data.datasets.opening import open_set
from simmim.data.datasets.procedural import render
from simmim.data.datasets.remote import RemoteReading
from simmim.data.transforms.cropping import center_crop_resize
from simmim.data.transforms.decoding import (
    ARRAY_EXTENSION,
    NamedImage,
    choice_for,
    decode_pixels,
)
from simmim.data.transforms.settings import DecodeSettings
from simmim.tasks.features import Normalise, pool
from simmim.tasks.trained import TrainedModel
from swinv2 import SwinV2
from swinv2.bridges.checkpoints import BridgeError
from swinv2.bridges.preprocessing import least_side
from swinv2.bridges.transformers_layout import FOLDERS
from swinv2.bridges.verification import plain_copy, quiet_transformers

OF_DATA = 3
"""Pictures of the training data that are compared."""
SHAPES = ((3.1, 1.7), (1.3, 2.6), (0.6, 0.9), (1.0, 1.0))
"""Height and width of drawn pictures, by the input's side: portrait, landscape, small, square."""
LARGEST_MEAN = 0.5
"""Mean difference of the pixels of a picture, of 255, that rounding explains."""


def compare_pictures(found: TrainedModel, folder: Path) -> str:
    """Return a line that compares pictures prepared by an export's processor with validation's.

    Args:
        found: the exported model.
        folder: the export for transformers, which has to be installed.

    Raises:
        BridgeError: the processor prepares a picture differently, or the answers differ.
    """
    encoder, preparation = found.encoder, found.preparation
    assert isinstance(encoder, SwinV2)
    assert preparation is not None
    config = encoder.config
    height, width = config.image_size
    is_picture = found.channels is None or are_pictures(found.channels)
    square = height == width and config.in_channels in (1, 3)
    if not is_picture or not square or preparation.largest != 255:
        return (
            "not compared from picture files: processors of transformers crop and resize square "
            "pictures of 8 bits, grey or RGB; README.md says how to prepare others"
        )
    from transformers import AutoImageProcessor  # noqa: PLC0415 - an optional part

    with quiet_transformers():
        processor = AutoImageProcessor.from_pretrained(folder)
    scale = torch.tensor(found.std).view(-1, 1, 1) * 255
    normalise = Normalise(found.mean, found.std)
    ours, theirs = [], []
    largest = mean = 0.0
    for name, extension, data in pictures(found):
        decoded = decode_pixels(data, extension, channels=config.in_channels).pixels
        if min(decoded.shape[:2]) < least_side(preparation):
            continue  # README.md says that it is left out
        crop = center_crop_resize(decoded, (height, width), crop_pct=preparation.crop_pct)
        ours.append(normalise(crop[None]))
        theirs.append(_processed(processor, data, config.in_channels))
        if theirs[-1].shape != ours[-1].shape:
            raise BridgeError(
                f"not exported: the processor of transformers prepares {name} differently: as "
                f"{tuple(theirs[-1].shape)}, not {tuple(ours[-1].shape)}. Use another version of "
                "that library or another format."
            )
        apart = ((ours[-1] - theirs[-1]) * scale).abs()
        largest, mean = max(largest, float(apart.max())), max(mean, float(apart.mean()))
        if float(apart.mean()) > LARGEST_MEAN:
            raise BridgeError(
                f"not exported: the processor of transformers prepares {name} differently: pixels "
                f"differ by {float(apart.mean()):.2f} of 255 on average. Use another version of "
                "that library or another format."
            )
    with quiet_transformers():
        what, same, apart_most = _answers(found, folder, torch.cat(ours), torch.cat(theirs))
    return (
        f"compared from {len(ours)} picture files through its processor: pixels differ by at most "
        f"{largest:.0f} of 255 (mean {mean:.3f}), {what} by {apart_most:.1e}"
        + ("" if same is None else f"; the same class for {same} of {len(ours)}")
    )


def _processed(processor: Any, data: bytes, channels: int) -> Tensor:
    """Return the input that a processor makes of a picture file, opened as its README says."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    if picture.mode.startswith("I;16"):
        picture = picture.point(lambda value: value / 257 + 0.5).convert("L")
    picture = picture.convert("L") if channels == 1 else picture
    prepared: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"]
    return prepared.float()


@torch.no_grad()
def _answers(
    found: TrainedModel, folder: Path, ours: Tensor, theirs: Tensor
) -> tuple[str, int | None, float]:
    """Return the compared values' name, how many classes are the same, and the difference."""
    from transformers import (  # noqa: PLC0415 - an optional part
        Swinv2ForImageClassification,
        Swinv2Model,
    )

    assert isinstance(found.encoder, SwinV2)
    tokens = plain_copy(found.encoder)(ours)
    if found.classifier is None:
        peer = Swinv2Model.from_pretrained(folder, dtype=torch.float32).eval()
        features = peer(theirs).last_hidden_state.mean(1)
        return "pooled features", None, float((pool(tokens) - features).abs().max())
    place = folder / FOLDERS["Swinv2ForImageClassification"]
    peer = Swinv2ForImageClassification.from_pretrained(place, dtype=torch.float32).eval()
    logits, answers = found.classifier.logits(tokens), peer(theirs).logits
    same = int((logits.argmax(1) == answers.argmax(1)).sum())
    return "logits", same, float((logits - answers).abs().max())


def _opens(image: NamedImage, found: TrainedModel) -> bool:
    """Return whether Pillow opens a file, with no more channels than the encoder takes."""
    settings = DecodeSettings(channels=found.channels, image_channels=found.image_channels)
    return image.extension != ARRAY_EXTENSION and choice_for(image, image.image, settings) is None


def pictures(found: TrainedModel) -> Iterator[tuple[str, str, bytes]]:
    """Yield name, extension and bytes of picture files: of the data, and drawn ones."""
    if found.shards is not None:
        try:
            shards = open_set(found.shards, RemoteReading(mode="ranges", attempts=2))
            count = min(OF_DATA, shards.sizes[0])
            samples = [shards.read(0, number) for number in range(count)]
            yield from (
                (one.name, one.extension, one.image) for one in samples if _opens(one, found)
            )
        except ValueError:  # the data are gone or damaged: drawn pictures are left
            pass
    side = found.encoder.config.image_size[0]
    for number, (height, width) in enumerate(SHAPES):
        drawn = Image.fromarray(render("star", [number], max(side, 64), seed=0)[0])
        size = (max(1, round(width * side)), max(1, round(height * side)))
        picture = drawn.resize(size, Image.Resampling.BICUBIC)
        grey = picture.convert("L")
        deep = Image.fromarray(np.asarray(grey, dtype=np.uint16) * 257)
        for one in (picture, grey, deep):
            file = io.BytesIO()
            one.save(file, "PNG")
            yield f"a drawn picture of {size[0]}x{size[1]} ({one.mode})", "png", file.getvalue()
