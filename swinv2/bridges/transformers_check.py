"""Exports in the hands of transformers: each class has its tensors, and computes what we compute.

transformers must be installed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from swinv2.bridges.contents import BridgeError, Classifier, MaskedImageHead
from swinv2.bridges.transformers_layout import FOLDERS, WEIGHTS_FILE, ModelClass
from swinv2.bridges.verification import Report, compare, plain_copy, zone_plate
from swinv2.encoder import SwinV2


def check_transformers_export(path: Path | str) -> None:
    """Hold every folder of an export to the model transformers builds from its ``config.json``.

    No weights are read, so this is cheap for the largest variants.

    Raises:
        BridgeError: a folder lacks a tensor, has one too many or one of another shape.
    """
    import transformers  # noqa: PLC0415 - an optional part

    for name, place in FOLDERS.items():
        folder = Path(path) / place
        if not folder.is_dir():
            continue
        with torch.device("meta"):
            config = transformers.Swinv2Config.from_pretrained(folder)
            expected = _model_class(name)(config).state_dict()
        expected_shapes = {key: list(tensor.shape) for key, tensor in expected.items()}
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        different = sorted(
            key
            for key in shapes.keys() | expected_shapes.keys()
            if shapes.get(key) != expected_shapes.get(key)
        )
        if different:
            raise BridgeError(
                f"{name} of the installed transformers has other tensors than those "
                f"written for it ({', '.join(different)}): install transformers 5."
            )


def compare_transformers(
    path: Path,
    encoder: SwinV2,
    *,
    head: MaskedImageHead | None,
    classifier: Classifier | None,
    images: Tensor | None,
    report: Report,
) -> None:
    """Load each folder of an export, compute on an image and report how far it is apart.

    Raises:
        BridgeError: further than rounding in float32 explains.
    """
    images = zone_plate(encoder.config) if images is None else images
    plain = plain_copy(encoder)
    with torch.no_grad():
        maps = plain.features(images)
        tokens = maps[-1].permute(0, 2, 3, 1)
        theirs = _load("Swinv2Model", path)(images).last_hidden_state
        report(compare("Swinv2Model's features to ours", tokens.flatten(1, 2), theirs))
        *before, last = _load("Swinv2Backbone", path)(images).feature_maps
        # Theirs ends before the final norm.
        normalised = plain.norm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        ours = torch.cat([one.flatten(1) for one in maps], dim=1)
        theirs = torch.cat([one.flatten(1) for one in (*before, normalised)], dim=1)
        report(compare("Swinv2Backbone's maps to ours", ours, theirs))
        if head is not None:
            hidden = _checkered(plain, images)
            ours = _reconstruct(plain, head, images, hidden)
            peer = _load("Swinv2ForMaskedImageModeling", path)
            theirs = peer(images, bool_masked_pos=hidden.flatten(1)).reconstruction
            report(compare("Swinv2ForMaskedImageModeling's reconstruction to ours", ours, theirs))
        if classifier is not None:
            ours = classifier.logits(tokens)
            theirs = _load("Swinv2ForImageClassification", path)(images).logits
            report(compare("Swinv2ForImageClassification's logits to ours", ours, theirs))


def _load(name: ModelClass, path: Path) -> Any:
    """Load one class of an export in float32; every tensor has to have its place."""
    with _no_progress_bars():
        model, loading = _model_class(name).from_pretrained(
            path / FOLDERS[name], dtype=torch.float32, output_loading_info=True
        )
    wrong = {kind: sorted(map(str, names)) for kind, names in loading.items() if names}
    if wrong:
        raise BridgeError(f"not exported: {name} of transformers loads it with {wrong}.")
    return model.eval()


def _model_class(name: ModelClass) -> Any:
    import transformers  # noqa: PLC0415 - an optional part

    match name:
        case "Swinv2Model":
            return transformers.Swinv2Model
        case "Swinv2Backbone":
            return transformers.Swinv2Backbone
        case "Swinv2ForMaskedImageModeling":
            return transformers.Swinv2ForMaskedImageModeling
        case "Swinv2ForImageClassification":
            return transformers.Swinv2ForImageClassification


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging  # noqa: PLC0415 - an optional part

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _checkered(encoder: SwinV2, images: Tensor) -> Tensor:
    """Return a mask of tokens (batch, rows, columns) that hides every second one."""
    rows, columns = encoder.config.stage_resolutions[0]
    places = torch.arange(rows)[:, None] + torch.arange(columns)[None, :]
    return (places % 2 == 0).expand(len(images), -1, -1)


def _reconstruct(encoder: SwinV2, head: MaskedImageHead, images: Tensor, hidden: Tensor) -> Tensor:
    """Predict all pixels of images (batch, channels, height, width) with some tokens hidden."""
    tokens = encoder.embed(images)
    token = head.mask_token.detach().to(tokens).reshape(-1)
    features = encoder.encode(torch.where(hidden[..., None], token, tokens))
    pixels = F.conv2d(
        features.permute(0, 3, 1, 2),
        head.weight.detach().to(tokens),
        head.bias.detach().to(tokens),
    )
    return F.pixel_shuffle(pixels, encoder.strides[-1])
