"""Verification of an export before it is kept: its outputs equal the encoder's."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from swinv2.bridges.checkpoints import BridgeError, ClassifierHead, MaskedImageHead, read_json
from swinv2.bridges.transformers_layout import FOLDERS, ModelClass
from swinv2.config import SwinV2Config
from swinv2.config_file import CONFIG_FILE, WEIGHTS_FILE
from swinv2.encoder import HierarchicalEncoder, SwinV2

Encoder = TypeVar("Encoder", bound=HierarchicalEncoder)

TOLERANCE = 1e-4
"""Largest difference that float32 rounding explains, relative to the largest value."""

Report = Callable[[str], None]
"""Called with one line per comparison: the compared values, and the largest difference."""


def ignore(line: str) -> None:
    """Discard a line of a report."""


def compare(what: str, ours: Tensor, theirs: Tensor, *, tolerance: float = TOLERANCE) -> str:
    """Return a line with the largest difference between two tensors.

    Args:
        what: name of the compared values, for the message.
        ours: computed by the encoder.
        theirs: computed by the export.
        tolerance: largest difference allowed, relative to the largest value of `ours`.

    Raises:
        BridgeError: the difference is larger, the shapes differ, or a value is not finite.
    """
    if ours.shape != theirs.shape:
        raise BridgeError(
            f"not exported: {what}: the export gives shape {tuple(theirs.shape)}, the "
            f"encoder {tuple(ours.shape)}. Use another version of that library or another format."
        )
    largest = float(ours.abs().max())
    difference = float((ours - theirs).abs().max())
    if not math.isfinite(largest):
        raise BridgeError(
            f"not exported: {what}: values of the encoder are not finite, so its weights are "
            "damaged: export an earlier checkpoint."
        )
    if not difference <= tolerance * largest:  # true for NaN, too
        raise BridgeError(
            f"not exported: the largest difference of {what} is {difference:.1e}, more than "
            f"{tolerance * largest:.1e} for values up to {largest:.1e}: use another version of "
            "that library or another format."
        )
    return f"largest difference of {what}: {difference:.1e}"


def compare_read_back(encoder: SwinV2, back: SwinV2, images: Tensor | None) -> str:
    """Return a line that says that features are equal after reading an export back.

    Raises:
        BridgeError: they differ.
    """
    images = zone_plate(encoder.config) if images is None else images
    with torch.no_grad():
        ours, theirs = plain_copy(encoder)(images), back(images)
    return compare("its features after reading it back", ours, theirs, tolerance=0)


def check_read_back(encoder: SwinV2, back: SwinV2) -> None:
    """Check that an encoder was read back as it was written, bit for bit.

    Args:
        encoder: the exported encoder, in any dtype, on any device.
        back: the encoder read back, in float32, on the CPU.

    Raises:
        BridgeError: tensors or sizes differ; the first ones are named.
    """
    first, second = encoder.state_dict(), back.state_dict()
    different = [
        name
        for name in first | second
        if name not in first
        or name not in second
        or not torch.equal(first[name].detach().cpu().float(), second[name].cpu())
    ]
    before, after = asdict(encoder.config), asdict(back.config)
    different += [f"config.{name}" for name in before if before[name] != after[name]]
    if different:
        raise BridgeError(
            f"not exported: {', '.join(different[:5])} differed when read back: check the disk "
            "and try again."
        )


def plain_copy(encoder: Encoder) -> Encoder:
    """Return an encoder that shares the weights: float32, CPU, evaluation, default execution."""
    with torch.device("meta"):
        plain = type(encoder)(encoder.config)
    tensors = {
        name: tensor.detach().to("cpu", torch.float32)
        for name, tensor in encoder.state_dict().items()
    }
    plain.load_state_dict(tensors, assign=True)
    return plain.eval()


def zone_plate(config: SwinV2Config) -> Tensor:
    """Return an image of rings that get finer towards the border, with a phase per channel.

    Returns:
        (1, channels, height, width) at the encoder's image size, values in [-1.5, 1.5].
    """
    height, width = config.image_size
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    squares = rows[:, None].square() + columns[None, :].square()
    phases = torch.arange(config.in_channels) * 2.0
    return 1.5 * torch.cos(squares * (height + width) / 4 + phases[:, None, None])[None]


def find_timm() -> tuple[ModuleType | None, str]:
    """Return timm, or None and the reason why it cannot be imported."""
    if find_spec("timm") is None:
        return None, "timm is not installed (pip install timm)"
    try:
        import timm  # noqa: PLC0415 - an optional part
    except (
        ImportError,
        RuntimeError,
        OSError,
    ) as error:  # for example a torchvision for another torch
        return None, f"timm cannot be imported ({error})"
    return timm, ""


def load_in_timm(timm: ModuleType, path: str | os.PathLike[str]) -> torch.nn.Module:
    """Load an export with timm, strictly."""
    folder = Path(path)
    content = read_json(folder / CONFIG_FILE, "export it again")
    model: torch.nn.Module = timm.create_model(
        content["architecture"],
        num_classes=content["num_classes"],
        checkpoint_path=str(folder / WEIGHTS_FILE),
        **content["model_args"],
    )
    return model.eval()


def check_timm_shapes(
    timm: ModuleType,
    name: str,
    arguments: Mapping[str, Any],
    classes: int,
    tensors: Mapping[str, Tensor],
) -> None:
    """Check names and shapes against the model of the installed timm, built without weights.

    Raises:
        BridgeError: they differ.
    """
    with torch.device("meta"):
        expected = timm.create_model(name, num_classes=classes, **arguments).state_dict()
    different = sorted(
        key
        for key in expected.keys() | tensors.keys()
        if key not in expected or key not in tensors or expected[key].shape != tensors[key].shape
    )
    if different:
        raise BridgeError(
            f"not exported: {name} of the installed timm expects other tensors "
            f"({', '.join(different)}): install timm 1.0.20 or newer."
        )


def compare_timm(
    timm: ModuleType,
    folder: Path,
    encoder: SwinV2,
    *,
    classifier: ClassifierHead | None,
    images: Tensor | None,
    report: Report,
) -> None:
    """Compare the outputs of an export loaded in timm with the encoder's.

    Raises:
        BridgeError: they differ by more than float32 rounding explains.
    """
    images = zone_plate(encoder.config) if images is None else images
    peer: Any = load_in_timm(timm, folder)
    with torch.no_grad():
        features = plain_copy(encoder)(images)
        theirs = peer.forward_features(images)
        report(compare("timm's features from ours", features, theirs))
        if classifier is not None:
            logits = classifier.logits(features)
            report(compare("timm's logits from ours", logits, peer.forward_head(theirs)))


def check_transformers_export(path: Path | str) -> None:
    """Check names and shapes of every folder of an export against the model of transformers.

    No weights are read, so this is cheap even for the largest variants.

    Raises:
        BridgeError: a tensor is missing, unexpected or of another shape.
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
                f"not exported: {name} of the installed transformers expects other tensors "
                f"({', '.join(different)}): install transformers 5."
            )


def compare_transformers(
    path: Path,
    encoder: SwinV2,
    *,
    head: MaskedImageHead | None,
    classifier: ClassifierHead | None,
    images: Tensor | None,
    report: Report,
) -> None:
    """Compare the outputs of each folder of an export, loaded in transformers, with the encoder's.

    Raises:
        BridgeError: they differ by more than float32 rounding explains.
    """
    images = zone_plate(encoder.config) if images is None else images
    plain = plain_copy(encoder)
    with torch.no_grad():
        maps = plain.features(images)
        tokens = maps[-1].permute(0, 2, 3, 1)
        theirs = _load_in_transformers("Swinv2Model", path)(images).last_hidden_state
        report(compare("Swinv2Model's features from ours", tokens.flatten(1, 2), theirs))
        *before, last = _load_in_transformers("Swinv2Backbone", path)(images).feature_maps
        # Swinv2Backbone has no final norm.
        normalised = plain.norm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        ours = torch.cat([one.flatten(1) for one in maps], dim=1)
        theirs = torch.cat([one.flatten(1) for one in (*before, normalised)], dim=1)
        report(compare("Swinv2Backbone's maps from ours", ours, theirs))
        if head is not None:
            hidden = _checkerboard_mask(plain, images)
            ours = _reconstruct(plain, head, images, hidden)
            peer = _load_in_transformers("Swinv2ForMaskedImageModeling", path)
            theirs = peer(images, bool_masked_pos=hidden.flatten(1)).reconstruction
            report(compare("Swinv2ForMaskedImageModeling's reconstruction from ours", ours, theirs))
        if classifier is not None:
            ours = classifier.logits(tokens)
            theirs = _load_in_transformers("Swinv2ForImageClassification", path)(images).logits
            report(compare("Swinv2ForImageClassification's logits from ours", ours, theirs))


def _load_in_transformers(name: ModelClass, path: Path) -> Any:
    """Load one class of an export in float32, without missing or unexpected tensors."""
    with quiet_transformers():
        model, loading = _model_class(name).from_pretrained(
            path / FOLDERS[name], dtype=torch.float32, output_loading_info=True
        )
    wrong = {kind: sorted(map(str, names)) for kind, names in loading.items() if names}
    if wrong:
        raise BridgeError(
            f"not exported: {name} of transformers loads it with {wrong}: install transformers 5."
        )
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
def quiet_transformers() -> Iterator[None]:
    """Keep progress bars and warnings of transformers out of our output."""
    from transformers.utils import logging  # noqa: PLC0415 - an optional part

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _checkerboard_mask(encoder: SwinV2, images: Tensor) -> Tensor:
    """Return a checkerboard mask of tokens, (batch, rows, columns), True = hidden."""
    rows, columns = encoder.config.stage_resolutions[0]
    places = torch.arange(rows)[:, None] + torch.arange(columns)[None, :]
    return (places % 2 == 0).expand(len(images), -1, -1)


def _reconstruct(encoder: SwinV2, head: MaskedImageHead, images: Tensor, hidden: Tensor) -> Tensor:
    """Reconstruct images (batch, channels, height, width) of which some tokens are hidden."""
    tokens = encoder.embed(images)
    token = head.mask_token.detach().to(tokens).reshape(-1)
    features = encoder.encode(torch.where(hidden[..., None], token, tokens))
    pixels = F.conv2d(
        features.permute(0, 3, 1, 2),
        head.weight.detach().to(tokens),
        head.bias.detach().to(tokens),
    )
    return F.pixel_shuffle(pixels, encoder.strides[-1])
