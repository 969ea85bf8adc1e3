"""What ``config.json`` of an encoder directory says, and how it is written and checked."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from swinv2.config import SwinV2Config

FORMAT = "swinv2-encoder"
VIDEO_FORMAT = "swinv2-video-encoder"
FORMAT_VERSION = 1


class WeightsError(ValueError):
    """Weights, or the file that describes them, that cannot be used as they are."""


def present_versions() -> dict[str, str]:
    """Return the versions of torch and, where it is installed, of simmim."""
    versions = {"torch": str(torch.__version__)}
    with suppress(PackageNotFoundError):  # swinv2 also lives without the pipeline around it
        versions["simmim"] = version("simmim")
    return versions


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the weights of an encoder come from; ``None`` says that it is not known."""

    step: int | None = None
    """Optimiser steps taken."""
    samples_seen: int | None = None
    """Images the training has consumed, over all epochs."""
    recipe_hash: str | None = None
    """Fingerprint of the resolved recipe."""
    versions: Mapping[str, str] = field(default_factory=present_versions)
    """Versions of the packages that wrote the file, by name."""


@dataclass(frozen=True, kw_only=True)
class EncoderFile:
    """What ``config.json`` of an encoder directory says."""

    config: SwinV2Config
    """Every size of the encoder, with the windows it was pretrained with."""
    mean: tuple[float, ...]
    """Subtracted from each channel of an image in [0, 1]."""
    std: tuple[float, ...]
    """Each channel is divided by it after that."""
    provenance: Provenance

    def __post_init__(self) -> None:
        check_normalisation(self.mean, self.std, self.config.in_channels)


def check_normalisation(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Check that there is a finite mean and a positive std for each channel.

    Raises:
        WeightsError: there is not.
    """
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels or not all(map(math.isfinite, values)):
            raise WeightsError(
                f"{name} is {list(values)} and the images have {channels} channels: "
                f"give {channels} finite values."
            )
    if min(std) <= 0:
        raise WeightsError(f"std is {list(std)}: give values greater than 0.")


def to_json(description: EncoderFile, format_name: str = FORMAT, **more: Provenance | None) -> str:
    """Return the text of ``config.json``; where other weights come from are further sections."""
    origins = {"provenance": description.provenance, **more}
    content = {
        "format": format_name,
        "version": FORMAT_VERSION,
        "config": asdict(description.config),
        "mean": description.mean,
        "std": description.std,
        **{name: None if of is None else dict(vars(of)) for name, of in origins.items()},
    }
    return json.dumps(content, indent=2) + "\n"


def to_readme(description: EncoderFile) -> str:
    """Return the text of ``README.md``: the lines that load the directory, and what it holds."""
    config = description.config
    height, width = config.image_size
    return f"""# Swin Transformer V2 encoder

In this folder, with `swinv2` installed:

```python
from swinv2 import load_encoder, read_encoder_config

encoder = load_encoder(".")
description = read_encoder_config(".")
```

`encoder.features(images)` gives {len(config.depths)} maps, at strides \
{", ".join(map(str, config.strides))}; `encoder(images)` the last as
(batch, rows, columns, {config.num_features}). Images have {config.in_channels} channels; from \
values in [0, 1] subtract `description.mean`,
{list(description.mean)}, then divide by `description.std`, {list(description.std)}.

It is of {config.variant or "own"} sizes and made for {width}x{height} pixels; \
`load_encoder(".", image_size=..., window_size=...)`
takes it to others.
"""


def from_json(text: str, source: Path) -> EncoderFile:
    """Return what the text of the ``config.json`` at ``source`` says.

    Raises:
        WeightsError: it is no JSON, of another format or version, or has wrong or missing fields;
            the message names the file and all of them.
    """
    return EncoderFile(**read_description(text, source, SwinV2Config))


FORMATS: dict[str, str] = {FORMAT: "load_encoder", VIDEO_FORMAT: "load_video_encoder"}
"""Formats of encoder directories, and what loads each."""


def read_description(
    text: str, source: Path, config_type: type[SwinV2Config], *more: str, format_name: str = FORMAT
) -> dict[str, Any]:
    """Return the values that the text of the ``config.json`` at ``source`` gives, by their names.

    Args:
        text: of the file.
        source: the file, for messages.
        config_type: what the sizes of the encoder are.
        more: sections that say where other weights come from, or are null.
        format_name: of the file.

    Raises:
        WeightsError: as for `from_json`.
    """
    content = _content(text, source, format_name)
    problems: list[str] = []
    top_fields = {**_TOP_FIELDS, **dict.fromkeys(more, _anything)}
    top = _read_fields(content, top_fields, "", problems)
    values = _read_fields(content.get("config"), _config_fields(config_type), "config.", problems)
    origins = {
        name: _read_fields(content.get(name), _PROVENANCE_FIELDS, f"{name}.", problems)
        for name in ("provenance", *more)
        if name == "provenance" or content.get(name) is not None
    }
    if problems:
        raise WeightsError(f"{source} is wrong in:\n  " + "\n  ".join(problems))
    try:
        config = config_type(**values)
        check_normalisation(top["mean"], top["std"], config.in_channels)
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from error
    return {
        "config": config,
        "mean": top["mean"],
        "std": top["std"],
        **dict.fromkeys(more),
        **{name: Provenance(**origin) for name, origin in origins.items()},
    }


def _content(text: str, source: Path, format_name: str) -> dict[str, Any]:
    """Return what the text of a file holds, of one format and this version."""
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise WeightsError(f"{source} is not valid JSON ({error}): export it again.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != format_name and found in FORMATS:
        raise WeightsError(
            f'{source} has the format "{found}", not "{format_name}": `swinv2.{FORMATS[found]}` '
            "loads it."
        )
    if not isinstance(content, dict) or found != format_name:
        raise WeightsError(
            f'{source} does not describe an encoder (no "format": "{format_name}"): '
            "give a directory that `save_encoder` or `simmim export --format native` wrote."
        )
    if content.get("version") != FORMAT_VERSION:
        raise WeightsError(
            f"{source} has format version {content.get('version')!r} and this version of swinv2 "
            f"reads {FORMAT_VERSION}: install the swinv2 that wrote it, or export it again."
        )
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("a whole number")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a number")
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a text")
    return value


def _texts_by_name(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise TypeError("texts by name")
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


_TOP_FIELDS: dict[str, Callable[[object], Any]] = {
    "format": _text,
    "version": _integer,
    "config": _anything,
    "provenance": _anything,
    "mean": _list_of(_number),
    "std": _list_of(_number),
}
_PROVENANCE_FIELDS: dict[str, Callable[[object], Any]] = {
    "step": _optional(_integer),
    "samples_seen": _optional(_integer),
    "recipe_hash": _optional(_text),
    "versions": _texts_by_name,
}


def _read_fields(
    content: object,
    readers: Mapping[str, Callable[[object], Any]],
    prefix: str,
    problems: list[str],
) -> dict[str, Any]:
    """Read every field of ``content``; what is wrong is added to ``problems``."""
    if not isinstance(content, dict):
        problems.append(f"{prefix.rstrip('.')}: expected fields by name")
        return {}
    problems += [f"{prefix}{name}: unknown" for name in content if name not in readers]
    values = {}
    for name, read in readers.items():
        if name not in content:
            problems.append(f"{prefix}{name}: missing")
            continue
        try:
            values[name] = read(content[name])
        except TypeError as error:
            problems.append(f"{prefix}{name}: {content[name]!r}, expected {error}")
    return values


def _config_fields(config_type: type[SwinV2Config]) -> dict[str, Callable[[object], Any]]:
    """Give a reader for each field: the config checks its values itself, but for these two."""
    return {
        **{config_field.name: _anything for config_field in fields(config_type)},
        "variant": _optional(_text),
        "pretrained_window_sizes": _list_of(_anything),
    }
