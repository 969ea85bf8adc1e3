"""`config.json` of an encoder directory: written, read and checked field by field, without torch.

Next to the weights it records every size of the encoder, the windows it was pretrained with, the
normalisation of its images and its provenance. Encoders of images and of clips have a format each.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from swinv2.config import SwinV2Config, VideoConfig
from swinv2.json_file import load_json, shortened

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
README_FILE = "README.md"
METHOD_FILE = "simmim.safetensors"
"""Mask token and decoder of the pretraining, if they are known; see `swinv2.method_file`."""

MOST_PROBLEMS = 20
"""Wrong fields or tensors that an error message lists."""
FORMAT = "swinv2-encoder"
VIDEO_FORMAT = "swinv2-video-encoder"
FORMAT_VERSION = 1
IMPLIED_CHANNELS: Mapping[int, tuple[str, ...]] = {1: ("gray",), 3: ("red", "green", "blue")}
"""Names of the channels, by their number, of a file of earlier versions, which has none."""
LOADERS: Mapping[str, str] = {FORMAT: "load_encoder", VIDEO_FORMAT: "load_video_encoder"}
"""The function that loads a directory of each format."""


class WeightsError(ValueError):
    """Weights, or a file that describes them, that cannot be used as they are."""


def installed_versions() -> dict[str, str]:
    """Return the versions of torch and, if it is installed, of simmim."""
    import torch  # noqa: PLC0415 - not needed to read a file

    versions = {"torch": str(torch.__version__)}
    with suppress(PackageNotFoundError):  # swinv2 also works without the pipeline around it
        versions["simmim"] = version("simmim")
    return versions


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Origin of the weights of an encoder; None for unknown fields."""

    step: int | None = None
    """Optimiser steps taken."""
    samples_seen: int | None = None
    """Images the training has consumed, over all epochs."""
    recipe_hash: str | None = None
    """Fingerprint of the resolved recipe."""
    versions: Mapping[str, str] = field(default_factory=installed_versions)
    """Versions of the packages that wrote the file, by name."""


@dataclass(frozen=True, kw_only=True)
class EncoderDescription:
    """Contents of the `config.json` of an image encoder."""

    config: SwinV2Config
    """Every size of the encoder, with the windows it was pretrained with."""
    mean: tuple[float, ...]
    """Subtracted from each channel of an image in [0, 1]."""
    std: tuple[float, ...]
    """Each channel is divided by it after that."""
    provenance: Provenance
    channels: tuple[str, ...] | None = None
    """Names of the channels in the order of the images, such as red, green, blue; None if they are
    not known."""

    def __post_init__(self) -> None:
        provenance: object = self.provenance
        if not isinstance(provenance, Provenance):
            kind = type(provenance).__name__
            raise TypeError(f"provenance is a {kind}; give a swinv2.Provenance.")
        check_normalisation(self.mean, self.std, self.config.in_channels)
        check_channels(self.channels, self.config.in_channels)


@dataclass(frozen=True, kw_only=True)
class VideoEncoderDescription(EncoderDescription):
    """Contents of the `config.json` of a video encoder."""

    config: VideoConfig
    """Every size of the encoder, with the windows it was trained with."""
    inflated_from: Provenance | None
    """Provenance of the image encoder that it was inflated from; None if it was not."""


def per_channel(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """Return one number per channel; raises ValueError for anything else."""
    try:
        if any(isinstance(value, str) for value in values):
            raise TypeError
        return tuple(float(value) for value in values)
    except TypeError:
        raise WeightsError(
            f"{name} is {values!r}: give a list of one number per channel."
        ) from None


def check_normalisation(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Check that there is a finite mean and a positive std for each channel.

    Raises:
        WeightsError: a number is missing, not finite, or a std is not positive.
    """
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels or not all(map(math.isfinite, values)):
            plural = "" if channels == 1 else "s"
            raise WeightsError(
                f"{name} is {list(values)}, and the images have {channels} channel{plural}: "
                f"give {channels} finite value{plural}."
            )
    if min(std) <= 0:
        raise WeightsError(f"std is {list(std)}: give values greater than 0.")


def check_channels(channels: Sequence[str] | None, count: int) -> None:
    """Check that there is one name for each channel, and no name twice.

    Raises:
        WeightsError: there is not.
    """
    if channels is None:
        return
    if len(channels) != count or len(set(channels)) < count or not all(channels):
        raise WeightsError(
            f"channels is {list(channels)}, and the images have {count} channels: give one name "
            "for each, all different."
        )


def to_json(description: EncoderDescription) -> str:
    """Return the text of `config.json`."""
    origins: dict[str, Provenance | None] = {"provenance": description.provenance}
    format_name = FORMAT
    if isinstance(description, VideoEncoderDescription):
        format_name = VIDEO_FORMAT
        origins["inflated_from"] = description.inflated_from
    content = {
        "format": format_name,
        "version": FORMAT_VERSION,
        "config": asdict(description.config),
        "mean": description.mean,
        "std": description.std,
        "channels": description.channels,
        **{name: None if of is None else dict(vars(of)) for name, of in origins.items()},
    }
    return json.dumps(content, indent=2) + "\n"


def read_encoder_config(path: str | os.PathLike[str]) -> EncoderDescription:
    """Return the contents of the `config.json` of an encoder directory.

    Raises:
        ValueError: the file is missing, or this version cannot read it; every wrong or missing
            field is listed.
    """
    return EncoderDescription(**_read(path, FORMAT, SwinV2Config))


def read_video_config(path: str | os.PathLike[str]) -> VideoEncoderDescription:
    """Return the contents of the `config.json` of a video encoder's directory.

    Raises:
        ValueError: the file is missing, or this version cannot read it; every wrong or missing
            field is listed.
    """
    return VideoEncoderDescription(**_read(path, VIDEO_FORMAT, VideoConfig, "inflated_from"))


def read_provenance(path: str | os.PathLike[str]) -> Provenance:
    """Read the provenance in an encoder directory, of images or of clips; raises as they do."""
    read = read_video_config if is_video_encoder(path) else read_encoder_config
    return read(path).provenance


def is_video_encoder(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is the directory of a video encoder."""
    return _format_of(Path(path) / CONFIG_FILE) == VIDEO_FORMAT


def is_encoder_directory(path: Path) -> bool:
    """Return whether `path` holds an encoder, what was trained with or on it, and nothing else.

    A head is a subfolder of safetensors and JSON files.
    """
    entries = {entry.name: entry for entry in path.iterdir()} if path.is_dir() else {}
    required = {CONFIG_FILE, WEIGHTS_FILE}  # early versions wrote no README
    if not required <= entries.keys():
        return False
    others = entries.keys() - required - {README_FILE, METHOD_FILE}
    if not all(_is_head_folder(entries[name]) for name in others):
        return False
    return _format_of(path / CONFIG_FILE) in LOADERS


def _is_head_folder(path: Path) -> bool:
    if not path.is_dir() or _format_of(path / CONFIG_FILE) in LOADERS:
        return False
    suffixes = {entry.suffix for entry in path.iterdir() if entry.is_file()}
    only_files = all(entry.is_file() for entry in path.iterdir())
    return only_files and ".safetensors" in suffixes and suffixes <= {".safetensors", ".json"}


def _format_of(file: Path) -> str | None:
    """Return the format that a `config.json` names, if it can be read."""
    try:
        content = load_json(file)
    except (OSError, ValueError):
        return None
    found = content.get("format") if isinstance(content, dict) else None
    return found if isinstance(found, str) else None


def _read(
    path: str | os.PathLike[str], format_name: str, config_type: type[SwinV2Config], *more: str
) -> dict[str, Any]:
    """Return the fields of a description; `more` names further sections of provenance, or null."""
    folder = Path(path)
    _check_encoder_directory(folder)
    source = folder / CONFIG_FILE
    content = _parse(source, format_name)
    problems: list[str] = []
    top_fields = {**_TOP_FIELDS, **dict.fromkeys(more, _anything)}
    top = _read_fields({"channels": ...} | content, top_fields, "", problems)
    values = _read_fields(content.get("config"), _config_fields(config_type), "config.", problems)
    origins = {
        name: _read_fields(content.get(name), _PROVENANCE_FIELDS, f"{name}.", problems)
        for name in ("provenance", *more)
        if name == "provenance" or content.get(name) is not None
    }
    if problems:
        raise WeightsError(f"{source} has wrong fields:\n  {list_problems(problems)}")
    try:
        config = config_type(**values)
        check_normalisation(top["mean"], top["std"], config.in_channels)
        channels = top["channels"]
        if channels is ...:
            channels = IMPLIED_CHANNELS.get(config.in_channels)
        check_channels(channels, config.in_channels)
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from error
    return {
        "config": config,
        "mean": top["mean"],
        "std": top["std"],
        "channels": channels,
        **dict.fromkeys(more),
        **{name: Provenance(**origin) for name, origin in origins.items()},
    }


def list_problems(problems: Sequence[str]) -> str:
    """Return problems as indented lines, the first MOST_PROBLEMS of them."""
    more = len(problems) - MOST_PROBLEMS
    shown = [*problems[:MOST_PROBLEMS], *([f"and {more:,} more"] if more > 0 else [])]
    return "\n  ".join(shown)


def _check_encoder_directory(path: Path) -> None:
    if not path.exists():
        raise WeightsError(f"{path} does not exist: give an encoder directory.")
    if not path.is_dir():
        raise WeightsError(
            f"{path} is a file: give an encoder directory, a folder with {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}. Pickled weights (.pth, .pt, .bin) can run code and are not read."
        )
    if not (path / CONFIG_FILE).is_file():
        raise WeightsError(
            f"{path} has no {CONFIG_FILE}: give an encoder directory, "
            "as written by `save_encoder` or `simmim export --format native`."
        )


def _parse(source: Path, format_name: str) -> dict[str, Any]:
    """Return the content of a file that must have this format and version."""
    try:
        content = load_json(source)
    except ValueError as error:
        raise WeightsError(f"{source} is not valid JSON ({error}): export it again.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if isinstance(found, str) and found != format_name and found in LOADERS:
        raise WeightsError(
            f'{source} has the format "{found}", not "{format_name}": load it with '
            f"`swinv2.{LOADERS[found]}`."
        )
    if not isinstance(content, dict) or found != format_name:
        raise WeightsError(
            f'{source} does not describe an encoder (no "format": "{format_name}"): '
            "give a directory written by `save_encoder` or `simmim export --format native`."
        )
    if content.get("version") != FORMAT_VERSION:
        raise WeightsError(
            f"{source} has format version {shortened(content.get('version'))}, and this version "
            f"of swinv2 reads {FORMAT_VERSION}: install the one that wrote it, or export it again."
        )
    return content


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("an integer")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a number")
    try:
        return float(value)
    except OverflowError:
        raise TypeError("a number that fits into 64 bits") from None


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a string")
    return value


def _strings_by_name(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise TypeError("an object of strings")
    return value


def _anything(value: object) -> object:
    return value


def _optional(read: Callable[[object], Any]) -> Callable[[object], Any]:
    def read_optional(value: object) -> Any:
        if value is None:
            return None
        try:
            return read(value)
        except TypeError as error:
            raise TypeError(f"{error} or null") from None

    return read_optional


def _list_of(read: Callable[[object], Any]) -> Callable[[object], Any]:
    def read_list(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise TypeError("a list")
        try:
            return tuple(read(entry) for entry in value)
        except TypeError as error:
            raise TypeError(f"a list, each entry {error}") from None

    return read_list


def _channels(value: object) -> object:
    """Read the names of the channels; `...` stands for a file without the field."""
    return ... if value is ... else _optional(_list_of(_string))(value)


_TOP_FIELDS: dict[str, Callable[[object], Any]] = {
    "format": _string,
    "version": _integer,
    "config": _anything,
    "provenance": _anything,
    "mean": _list_of(_number),
    "std": _list_of(_number),
    "channels": _channels,
}
_PROVENANCE_FIELDS: dict[str, Callable[[object], Any]] = {
    "step": _optional(_integer),
    "samples_seen": _optional(_integer),
    "recipe_hash": _optional(_string),
    "versions": _strings_by_name,
}


def _config_fields(config_type: type[SwinV2Config]) -> dict[str, Callable[[object], Any]]:
    """Return a reader for each field; the config itself checks the values of all but two."""
    return {
        **{config_field.name: _anything for config_field in fields(config_type)},
        "variant": _optional(_string),
        "pretrained_window_sizes": _list_of(_anything),
    }


def _read_fields(
    content: object,
    readers: Mapping[str, Callable[[object], Any]],
    prefix: str,
    problems: list[str],
) -> dict[str, Any]:
    """Read every field of `content`, and append defects to `problems`."""
    if not isinstance(content, dict):
        problems.append(f"{prefix.rstrip('.')}: expected fields by name")
        return {}
    problems += [f"{prefix}{name[:200]}: unknown" for name in content if name not in readers]
    values = {}
    for name, read in readers.items():
        if name not in content:
            problems.append(f"{prefix}{name}: missing")
            continue
        try:
            values[name] = read(content[name])
        except TypeError as error:
            problems.append(f"{prefix}{name}: {shortened(content[name])}, expected {error}")
    return values
