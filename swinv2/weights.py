"""The encoder directory of images or of clips: saved atomically, loaded strictly, at any size.

The folder has all that is needed to use the encoder: `model.safetensors`, `config.json` (sizes,
pretraining windows, normalisation, provenance) and `README.md` with the lines that load it. Nothing
in it can run code. Loading may change the image and window size: window transfer, section 3.3.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swinv2.atomic import atomic_folder
from swinv2.config import SwinV2Config, record_windows
from swinv2.config_file import (
    CONFIG_FILE,
    METHOD_FILE,
    README_FILE,
    WEIGHTS_FILE,
    EncoderDescription,
    Provenance,
    VideoEncoderDescription,
    WeightsError,
    is_encoder_directory,
    list_problems,
    per_channel,
    read_encoder_config,
    read_video_config,
    to_json,
)
from swinv2.encoder import SwinV2
from swinv2.method_file import MethodTensors
from swinv2.video import VideoSwinV2

Encoder = TypeVar("Encoder", bound=nn.Module)
Shape = tuple[int, ...]


def save_encoder(
    encoder: SwinV2,
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    channels: Sequence[str] | None = None,
    provenance: Provenance | None = None,
    method: MethodTensors | None = None,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Write `encoder` as the directory `path` and return it; an earlier encoder is replaced.

    The windows of the present sizes are recorded as pretraining windows unless some are recorded
    already: whatever size the encoder is loaded at, its position bias keeps its coordinates.

    Args:
        encoder: on any device; it is not changed.
        path: a new or empty folder, or an encoder directory.
        mean: one value per channel, for images in [0, 1].
        std: one positive value per channel.
        channels: names of the channels in the order of the images; None if they are not known.
        provenance: steps, samples and recipe behind the weights.
        method: mask token and decoder of the pretraining; None if they are not known.
        check: called with the written folder before it is renamed to `path`; if it raises, `path`
            stays as it was.

    Raises:
        ValueError: `mean`, `std` or `channels` does not fit, or `path` holds other files.
        TypeError: `encoder` is not an image encoder.
    """
    _check_type(encoder, SwinV2)
    config = encoder.config
    if config.pretrained_window_sizes is None:
        config = replace(config, pretrained_window_sizes=record_windows(config))
    description = EncoderDescription(
        config=config,
        mean=per_channel("mean", mean),
        std=per_channel("std", std),
        channels=None if channels is None else tuple(channels),
        provenance=provenance or Provenance(),
    )
    readme = _readme(description, has_method=method is not None)
    return _write_directory(encoder, path, description, readme, check, method=method)


def save_video_encoder(
    encoder: VideoSwinV2,
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    channels: Sequence[str] | None = None,
    provenance: Provenance | None = None,
    inflated_from: Provenance | None = None,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Write a video encoder as the directory `path` and return it; see `save_encoder`.

    Args:
        encoder: on any device; it is not changed.
        path: a new or empty folder, or an encoder directory.
        mean: one value per channel, for frames in [0, 1].
        std: one positive value per channel.
        channels: names of the channels in the order of the images; None if they are not known.
        provenance: steps, clips and recipe behind the weights.
        inflated_from: provenance of the image encoder that it was inflated from.
        check: called with the written folder before it is renamed to `path`.

    Raises:
        ValueError: `mean`, `std` or `channels` does not fit, or `path` holds other files.
        TypeError: `encoder` is not a video encoder.
    """
    _check_type(encoder, VideoSwinV2)
    config = replace(
        encoder.config,
        pretrained_window_sizes=record_windows(encoder.config),
        pretrained_window_frames=encoder.config.recorded_frames,
    )
    description = VideoEncoderDescription(
        config=config,
        mean=per_channel("mean", mean),
        std=per_channel("std", std),
        channels=None if channels is None else tuple(channels),
        provenance=provenance or Provenance(),
        inflated_from=inflated_from,
    )
    return _write_directory(encoder, path, description, _video_readme(description), check)


SAVED_BY = {SwinV2: "save_encoder", VideoSwinV2: "save_video_encoder"}
"""The function that saves an encoder of each type."""


def _check_type(encoder: object, wanted: type[nn.Module]) -> None:
    """Raise TypeError unless an encoder is of the type that is saved."""
    if isinstance(encoder, wanted):
        return
    others = [name for kind, name in SAVED_BY.items() if isinstance(encoder, kind)]
    remedy = f"it is saved by {others[0]}" if others else f"give a {wanted.__name__}"
    if isinstance(getattr(encoder, "encoder", None), wanted):
        remedy = "give its `.encoder`"
    raise TypeError(f"encoder is a {type(encoder).__name__}; {remedy}.")


def _write_directory(
    encoder: nn.Module,
    path: str | os.PathLike[str],
    description: EncoderDescription,
    readme: str,
    check: Callable[[Path], object] | None,
    *,
    method: MethodTensors | None = None,
) -> Path:
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in encoder.state_dict().items()
    }
    with atomic_folder(path, may_replace=is_encoder_directory) as folder:
        write_tensors(folder / WEIGHTS_FILE, tensors)
        (folder / CONFIG_FILE).write_text(to_json(description), encoding="utf-8")
        (folder / README_FILE).write_text(readme, encoding="utf-8")
        if method is not None:
            method.write(folder)
        if check is not None:
            check(folder)
    return Path(path)


def load_encoder(
    path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    window_size: int | tuple[int, int] | None = None,
    drop_path: float | None = None,
) -> SwinV2:
    """Load the encoder in the directory `path`, on the CPU, in evaluation mode.

    `load_encoder("encoders/mine", image_size=384, window_size=24)` transfers an encoder to larger
    images. Windows should grow with the images: each then covers the same part of the image, in
    more tokens. No weight changes: the position bias comes from an MLP, evaluated on the offsets of
    the new window, in coordinates of the windows that `save_encoder` recorded (paper, section 3.3).
    Those stay recorded whatever is saved, loaded or set afterwards, so that a transfer in steps
    equals a direct one, and transferring back restores the features, bit for bit.

    Args:
        path: written by `save_encoder`.
        image_size: nominal (height, width) in pixels, if other than saved.
        window_size: window (height, width) in tokens, if other than saved. A stage of fewer tokens
            takes one window over all of it.
        drop_path: largest rate of stochastic depth, if other than saved.

    Raises:
        ValueError: `path` is not an encoder directory, lacks a tensor of the encoder, or a size
            cannot work.
    """
    folder = Path(path)
    sizes = {"image_size": image_size, "window_size": window_size, "drop_path": drop_path}
    config = replace(read_encoder_config(folder).config, **_given(sizes))
    return _load_into(config, lambda: SwinV2(config), folder / WEIGHTS_FILE)


def load_video_encoder(
    path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    window_size: int | tuple[int, int] | None = None,
    frames: int | None = None,
    window_frames: int | None = None,
    drop_path: float | None = None,
) -> VideoSwinV2:
    """Load the video encoder in the directory `path`, on the CPU, in evaluation mode.

    Sizes that are given replace the saved ones, in time as in space: position offsets stay relative
    to the windows of the training; see `load_encoder`.

    Args:
        path: written by `save_video_encoder`.
        image_size: nominal (height, width) of frames in pixels.
        window_size: window (height, width) in tokens.
        frames: nominal length of a clip.
        window_frames: window along time in tokens.
        drop_path: largest rate of stochastic depth.

    Raises:
        ValueError: `path` is not a video encoder's directory, lacks a tensor of the encoder, or a
            size cannot work.
    """
    sizes = {
        "image_size": image_size,
        "window_size": window_size,
        "frames": frames,
        "window_frames": window_frames,
        "drop_path": drop_path,
    }
    config = replace(read_video_config(path).config, **_given(sizes))
    return _load_into(config, lambda: VideoSwinV2(config), Path(path) / WEIGHTS_FILE)


def _given(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: size for name, size in sizes.items() if size is not None}


def _load_into(config: SwinV2Config, build: Callable[[], Encoder], file: Path) -> Encoder:
    """Build an encoder with the weights of a file, in evaluation mode."""
    # A wrong config.json may ask for any number of blocks and any amount of memory: what the header
    # of the weights says is compared before either is taken.
    shapes = read_shapes(file)
    _check_fit(build_on_meta(config, build, shapes, str(file)), shapes, str(file))
    encoder = build()
    load_strictly(encoder, read_tensors(file), str(file))
    return encoder.eval()


def build_on_meta(
    config: SwinV2Config, build: Callable[[], Encoder], shapes: Mapping[str, Shape], source: str
) -> Encoder:
    """Build an encoder without memory, if a file has tensors for its blocks.

    Args:
        config: config of the encoder.
        build: builds it.
        shapes: shape of each tensor of the file.
        source: the file, for the message.

    Raises:
        ValueError: there are fewer tensors than blocks, or no memory could hold the encoder.
    """
    blocks = sum(config.depths)
    if blocks > len(shapes):
        raise WeightsError(
            f"{source} has {len(shapes):,} tensors, and config.json describes an encoder of "
            f"{blocks:,} blocks: they are not of the same encoder. Export it again."
        )
    try:
        with torch.device("meta"):
            return build()
    except RuntimeError as error:  # more bytes than 64 bits can count
        raise WeightsError(
            f"config.json of {source} describes an encoder of {config.num_features:,} channels, "
            f"which no memory can hold ({str(error).splitlines()[0]}). Export it again."
        ) from None


def read_shapes(file: Path) -> dict[str, Shape]:
    """Return the shape of each tensor of a safetensors file, from its header alone.

    Raises:
        ValueError: the file is missing or truncated, or not a safetensors file.
    """
    remedy = "export the encoder again"
    if not file.is_file():
        raise WeightsError(f"{file} is missing: {remedy}.")
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise WeightsError(
            f"{file} is truncated or not a safetensors file ({error}): {remedy}."
        ) from error


def read_tensors(
    path: str | os.PathLike[str], *, remedy: str = "export the encoder again"
) -> dict[str, Tensor]:
    """Read a safetensors file on to the CPU.

    Args:
        path: path of the file.
        remedy: how to replace a missing or damaged file, for the message.

    Raises:
        ValueError: the file is missing, truncated, or of a format that can run code when read.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        raise WeightsError(
            f"{file} is not a .safetensors file, and formats that can run code are not read: "
            "convert it with safetensors.torch.save_file first."
        )
    if not file.is_file():
        raise WeightsError(f"{file} is missing: {remedy}.")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise WeightsError(
            f"{file} is truncated or not a safetensors file ({error}): {remedy}."
        ) from error


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous tensors as a safetensors file.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{os.fspath(path)} cannot be written ({error}).") from error


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors` into `module`, which must match them name for name and shape for shape.

    Args:
        module: every persistent tensor of it is overwritten.
        tensors: tensors by name; they are converted to the module's dtype.
        source: source of the tensors, for the message.

    Raises:
        ValueError: tensors are missing, unexpected, of another shape, or integers in place of
            floating-point numbers; all of them are listed and the module is unchanged.
    """
    _check_fit(module, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, source)
    problems = [
        f"type of {name}: {tensors[name].dtype}, expected {tensor.dtype}"
        for name, tensor in module.state_dict().items()
        if tensors[name].is_floating_point() != tensor.is_floating_point()
    ]
    if problems:
        raise WeightsError(
            f"{source} is damaged; export the encoder again:\n  {list_problems(problems)}"
        )
    module.load_state_dict(dict(tensors), strict=True)


def _check_fit(module: nn.Module, shapes: Mapping[str, Shape], source: str) -> None:
    expected = module.state_dict()
    problems = [f"missing: {name}" for name in expected if name not in shapes]
    problems += [f"unexpected: {name}" for name in shapes if name not in expected]
    problems += [
        f"shape of {name}: {shapes[name]}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in shapes and shapes[name] != tuple(tensor.shape)
    ]
    if problems:
        raise WeightsError(
            f"{source} does not fit {type(module).__name__}; use weights of the same variant and "
            f"sizes, or change the configuration to theirs:\n  {list_problems(problems)}"
        )


def _readme(description: EncoderDescription, *, has_method: bool) -> str:
    config = description.config
    height, width = config.image_size
    method = (
        f"\n`{METHOD_FILE}` has mask token and decoder of SimMIM: `swinv2.method_file.read_method`."
        if has_method
        else ""
    )
    return f"""# Swin Transformer V2 encoder

In this folder, with `swinv2` installed:

```python
from swinv2 import load_encoder, read_encoder_config

encoder = load_encoder(".")
description = read_encoder_config(".")
```

`encoder.features(images)` returns {len(config.depths)} maps, at strides \
{", ".join(map(str, config.strides))}; `encoder(images)` the last as
(batch, rows, columns, {config.num_features}). Images have {config.in_channels} \
channels{_listed(description.channels)}; from values in [0, 1] subtract `description.mean`,
{list(description.mean)}, then divide by `description.std`, {list(description.std)}.

Architecture: {config.variant or "custom"}, trained at {width}x{height} pixels. For another size: \
`load_encoder(".", image_size=..., window_size=...)`.{method}
"""


def _listed(channels: Sequence[str] | None) -> str:
    return "" if channels is None else f" ({', '.join(channels)})"


def _video_readme(description: VideoEncoderDescription) -> str:
    config = description.config
    height, width = config.image_size
    return f"""# Swin Transformer V2 encoder of clips

In this folder, with `swinv2` installed:

```python
from swinv2 import load_video_encoder, read_video_config

encoder = load_video_encoder(".")
description = read_video_config(".")
```

Clips are (batch, frames, {config.in_channels}, height, width). `encoder.features(clips)` returns
{len(config.depths)} maps, at strides {", ".join(map(str, config.strides))}; `encoder(clips)` the \
last, as
(batch, frames, rows, columns, {config.num_features}). From values in [0, 1] subtract
`description.mean`, {list(description.mean)}, then divide by
`description.std`, {list(description.std)}.

Architecture: {config.variant or "custom"}, trained on {config.frames} frames of {width}x{height} \
pixels. For another size:
`load_video_encoder(".", image_size=..., window_size=..., frames=...)`.
"""
