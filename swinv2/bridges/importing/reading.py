"""A checkpoint file of another library: the one model in it that is taken, without its wrappings.

Training scripts store a model below an entry (`model`, `state_dict`, `teacher`), often next to an
averaged copy, and wrap its names: `module.` of data parallelism, `_orig_mod.` of torch.compile,
`backbone.` of a larger model. Which of several is taken follows one rule for every format.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from swinv2.bridges.checkpoints import BridgeError, describe_missing
from swinv2.bridges.importing.pickles import read_pickle
from swinv2.weights import read_tensors

WeightsChoice = Literal["averaged", "raw"]
"""Weights of a file that has both: their running average, or the weights themselves."""

WRAPPERS = frozenset(("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"))
"""Components of names that data parallelism, torch.compile, checkpointing and FSDP add."""
AVERAGED = frozenset(
    (
        *("state_dict_ema", "model_ema", "ema_model", "ema_state_dict", "ema", "averaged_model"),
        *("model_averaged", "swa_model", "teacher", "teacher_model", "target_encoder"),
    )
)
"""Names of averaged weights in a file."""
NUM_AVERAGED = "n_averaged"
"""Tensor that `torch.optim.swa_utils.AveragedModel` adds: how many weights were averaged."""
SIMMIM_ENCODER = "encoder."
"""Prefix of the encoder's names in the published SimMIM, whose other tensors stand beside it."""

_STAGE = re.compile(r"(?:layers|stages|features)[._]\d+\.")
_MOST_NAMES = 4


@dataclass(frozen=True, kw_only=True)
class CheckpointContents:
    """The model of a checkpoint file that is taken."""

    source: str
    """The file, for messages."""
    tensors: dict[str, Tensor]
    """Its tensors by name, without wrappings and common prefix."""
    extras: dict[str, Any]
    """Other entries of the file by name; empty for a file of tensors only."""
    beside: dict[str, Tensor]
    """Tensors outside the common prefix of the encoder's, by their names without wrappings."""
    notes: tuple[str, ...]
    """Which weights were imported and which were not, one line per item."""


@dataclass(frozen=True, kw_only=True)
class _Model:
    """A model in a file."""

    label: str
    """Its entry in the file and the prefix of its names; empty for all of the file."""
    entry: tuple[str, ...]
    root: str
    """Prefix of the names of its encoder, without wrappings."""
    tensors: dict[str, Tensor]
    """All tensors of its entry, by their names without wrappings."""
    averaged: bool

    def answers_to(self, key: str) -> bool:
        """Return whether a person means this model by `--key`."""
        return key == self.label or f".{key}." in f".{self.label}."


def read_checkpoint(
    path: str | os.PathLike[str], *, weights: WeightsChoice | None = None, key: str | None = None
) -> CheckpointContents:
    """Read a safetensors file or a pickle of tensors and plain values on to the CPU.

    Args:
        path: path of the file; safetensors files have the suffix .safetensors.
        weights: averaged or raw weights; None takes averaged ones if there are any.
        key: entry of the file, or prefix of names, where several models are in it.

    Raises:
        BridgeError: the file is missing or damaged, holds no tensors, several models of which none
            is chosen, or needs code to be read.
    """
    file = Path(path)
    if not file.is_file():
        raise BridgeError(f"{file} {describe_missing(file)}: give a checkpoint file.")
    safe = file.suffix == ".safetensors"
    content: Any = read_tensors(file, remedy="copy it again") if safe else read_pickle(file)
    if not isinstance(content, Mapping):
        raise BridgeError(
            f"{file} holds a {type(content).__name__}, not tensors by name: give a checkpoint of a "
            "model."
        )
    models = [model for entry in _entries(content) for model in _models(content, entry, file)]
    if not models:
        raise BridgeError(
            f"{file} holds no tensors by name, at its top or in an entry; it has "
            f"{', '.join(map(str, list(content)[:5])) or 'nothing'}: give a checkpoint of a model."
        )
    chosen = _choose(models, weights, key, file)
    if not safe:
        _check_expanded(file, chosen.tensors)
    return _contents(chosen, models, content, file)


def _entries(content: Mapping[Any, Any]) -> list[tuple[str, ...]]:
    """Return where models are in a file: paths of entries, or the empty path for all of it."""
    found = list(_mappings(content, ()))
    with_scale = [path for path in found if any(_is_scale(name) for name in _at(content, path))]
    return with_scale or found or ([()] if _has_tensors(content) else [])


def _mappings(content: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, part in content.items():
        if not isinstance(part, Mapping) or not isinstance(name, str):
            continue
        if _has_tensors(part):
            yield (*path, name)
        elif len(path) < 1:
            yield from _mappings(part, (*path, name))


def _has_tensors(part: Mapping[Any, Any]) -> bool:
    return any(isinstance(name, str) and isinstance(one, Tensor) for name, one in part.items())


def _is_scale(name: object) -> bool:
    return str(name).endswith("logit_scale")


def _at(content: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        content = content[name]
    return content


def _models(content: Mapping[Any, Any], entry: tuple[str, ...], file: Path) -> Iterator[_Model]:
    """Return the models in an entry of a file: those whose blocks have a common prefix each."""
    named = _at(content, entry)
    strange = [str(name) for name, part in named.items() if not isinstance(part, Tensor)]
    if strange:
        place = f" in {'.'.join(entry)}" if entry else ""
        raise BridgeError(
            f"{file} holds no tensors by name{place}; it has {', '.join(strange[:5])}: give a "
            "checkpoint of a model."
        )
    tensors: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for name, part in named.items():
        short = unwrapped(str(name))
        if short in tensors:
            raise BridgeError(
                f"{file} has {origins[short]} and {name}, the same name but for wrappings: save "
                "one model in a file."
            )
        tensors[short], origins[short] = part, str(name)
    averaged = tensors.pop(NUM_AVERAGED, None) is not None
    if not tensors:
        return
    roots = list(dict.fromkeys(map(_root, filter(_is_scale, tensors)))) or [""]
    for root in roots:
        label = ".".join((*entry, *root.rstrip(".").split("."))).strip(".")
        yield _Model(
            label=label,
            entry=entry,
            root=root,
            tensors=tensors,
            averaged=averaged or not AVERAGED.isdisjoint(label.split(".")),
        )


def unwrapped(name: str) -> str:
    """Return a name without the components that wrappers add, wherever they stand."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _root(name: str) -> str:
    """Return what stands before the stages in the name of a block's tensor."""
    stage = _STAGE.search(name)
    before = "" if stage is None else name[: stage.start()]
    if ".attention.self." in name:  # transformers, whose prefixes are of the class
        before = before.removesuffix("encoder.").removesuffix("swinv2.")
    return before


def _choose(
    models: Sequence[_Model], weights: WeightsChoice | None, key: str | None, file: Path
) -> _Model:
    """Return the model that is taken."""
    labels = ", ".join(model.label or "the file itself" for model in models)
    if key is not None:
        models = [model for model in models if model.answers_to(key)]
        if not models:
            raise BridgeError(f"{file} has no model {key!r}: give one of {labels} as key.")
    averaged = [model for model in models if model.averaged]
    raw = [model for model in models if not model.averaged]
    pool = {"averaged": averaged, "raw": raw, None: averaged or raw}[weights]
    if not pool:
        other = "raw" if weights == "averaged" else "averaged"
        raise BridgeError(
            f"{file} has no {weights} weights, only {other} ones ({labels}): leave out --weights "
            f"{weights}."
        )
    if len(pool) > 1:
        listed = ", ".join(model.label or "the file itself" for model in pool)
        raise BridgeError(
            f"{file} holds several models, {listed}: choose one with --key, for example --key "
            f"{pool[0].label}."
        )
    return pool[0]


def _contents(
    chosen: _Model, models: Sequence[_Model], content: Mapping[Any, Any], file: Path
) -> CheckpointContents:
    prefix = chosen.root
    outer = prefix.removesuffix(SIMMIM_ENCODER)
    if outer != prefix and _is_simmim(chosen.tensors, outer):
        prefix = outer
    inside = {
        name.removeprefix(prefix): part
        for name, part in chosen.tensors.items()
        if name.startswith(prefix)
    }
    others = [model.root for model in models if model is not chosen and model.entry == chosen.entry]
    beside = {
        name: part
        for name, part in chosen.tensors.items()
        if not name.startswith((prefix, *(root for root in others if root)))
    }
    extras = {str(name): part for name, part in content.items() if (str(name),) != chosen.entry}
    return CheckpointContents(
        source=str(file),
        tensors=inside,
        extras=extras if chosen.entry else {},
        beside=beside,
        notes=tuple(_notes(chosen, models, prefix)),
    )


def _is_simmim(tensors: Mapping[str, Tensor], outer: str) -> bool:
    """Return whether mask token or decoder of a SimMIM stand beside the encoder."""
    marks = (f"{SIMMIM_ENCODER}mask_token", "decoder.0.weight", "decoder.0.bias")
    return any(outer + mark in tensors for mark in marks)


def _notes(chosen: _Model, models: Sequence[_Model], prefix: str) -> Iterator[str]:
    kind, other = ("averaged", "raw") if chosen.averaged else ("raw", "averaged")
    where = f" ({chosen.label})" if chosen.label else ""
    rest = [model.label for model in models if model.averaged != chosen.averaged]
    if rest:
        yield f"weights: {kind}{where}; --weights {other} takes {', '.join(rest)}"
    else:
        yield f"weights: {kind}{where}; the file has no {other} ones"
    if prefix:
        yield f"names: without the prefix {prefix}"


def list_names(names: Sequence[str]) -> str:
    """Return names as a text, the first few of them."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _check_expanded(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check that no tensor repeats its elements so often that it is larger than the file."""
    length = file.stat().st_size
    for name, part in tensors.items():
        if part.layout == torch.strided and part.numel() * part.element_size() > length:
            raise BridgeError(
                f"{file} was not read: it has {length:,} bytes, and its tensor {name} repeats "
                f"its elements to the shape {tuple(part.shape)}. Save it with .contiguous()."
            )
