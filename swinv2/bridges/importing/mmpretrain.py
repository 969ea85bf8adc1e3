"""mmpretrain's `SwinTransformerV2`: read under the names of the published code.

It merges patches at the start of a stage, from neighbours in another order, and names the extra
norms of large models after their blocks.
"""

import os
import re
from dataclasses import replace
from functools import partial
from typing import Any

from einops import rearrange
from torch import Tensor

from swinv2.bridges.checkpoints import BridgeError, ImportedEncoder
from swinv2.bridges.conversion import ParsedCheckpoint, assemble
from swinv2.bridges.importing.options import NO_OPTIONS, ImportOptions
from swinv2.bridges.importing.reading import list_names
from swinv2.bridges.importing.torchvision import check_windows
from swinv2.bridges.layer_names import rename_tensor
from swinv2.bridges.reference import parse_published
from swinv2.bridges.sizes import smallest_image, variant_of

MARK = ".attn.w_msa."
"""Part of its names that no other library has."""
_FEED_FORWARD = {"ffn.layers.0.0": "mlp.fc1", "ffn.layers.1": "mlp.fc2"}
_NORM = re.compile(r"norm(\d+)\.(weight|bias)")
_EXTRA_NORM = re.compile(r"layers\.\d+\.blocks\.(\d+)\.norm3\.weight")


def import_mmpretrain(
    path: str | os.PathLike[str],
    options: ImportOptions = NO_OPTIONS,
) -> ImportedEncoder:
    """Read the weights of a `SwinTransformerV2` of mmpretrain, with or without a classifier.

    Windows come from the position buffers in the file, or must be given. The image size is in no
    file: by default it is the smallest that the windows fit.

    Args:
        path: a file (.pth or .safetensors).
        options: sizes that the file lacks, and which of several models is read.

    Raises:
        BridgeError: as for `import_reference`; tensors are named as in the published code.
    """
    checkpoint = options.read(path)
    if not any(MARK in name for name in checkpoint.tensors):
        raise BridgeError(
            f"{checkpoint.source} is not a SwinTransformerV2 of mmpretrain (it has no w_msa): "
            "leave out --format."
        )
    last = max(int(name.split(".")[1]) for name in checkpoint.tensors if MARK in name)
    renamed = {_published(name, last): one for name, one in checkpoint.tensors.items()}
    other_norms = [name for name in renamed if _NORM.fullmatch(name)]
    heads = {f"head.fc.{leaf}" for leaf in ("weight", "bias")}
    classifier = {name: one for name, one in checkpoint.beside.items() if name in heads}
    tensors = {
        name: _reordered(tensor) if name.endswith("downsample.reduction.weight") else tensor
        for name, tensor in renamed.items()
        if name not in other_norms
    } | {name.replace("head.fc.", "head."): one for name, one in classifier.items()}
    beside = {name: one for name, one in checkpoint.beside.items() if name not in classifier}
    contents = replace(checkpoint, tensors=tensors, beside=beside)
    found = _with_extra_norms(parse_published(contents, library="mmpretrain"))
    notes = found.notes
    if other_norms:
        notes += (f"not imported: norms of other stages' outputs ({list_names(other_norms)})",)
    found = replace(found, usual=smallest_image(found.sizes, found.architecture), notes=notes)
    imported = assemble(found, options)
    check_windows(imported.encoder.config, found, "mmpretrain")
    return imported


def _published(name: str, last: int) -> str:
    """Return the published name of a tensor; `last` is the number of the last stage."""
    name = name.replace(MARK, ".attn.")
    match name.split("."):
        case ["patch_embed", "projection", leaf]:
            return f"patch_embed.proj.{leaf}"
        case ["stages", stage, "downsample", *rest]:
            return f"layers.{int(stage) - 1}.downsample.{'.'.join(rest)}"
        case ["stages", stage, "blocks", block, *rest]:
            module = ".".join(rest[:-1])
            return f"layers.{stage}.blocks.{block}.{_FEED_FORWARD.get(module, module)}.{rest[-1]}"
        case [norm, leaf] if norm == f"norm{last}":
            return f"norm.{leaf}"
    return name.replace("head.fc.", "head.")


def _reordered(weight: Tensor) -> Tensor:
    """Return the weight of a merging for neighbours that follow each other column by column."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return weight  # refused by its shape
    return rearrange(
        weight, "out (channel row column) -> out (column row channel)", row=2, column=2
    )


def _with_extra_norms(found: ParsedCheckpoint) -> ParsedCheckpoint:
    """Return the checkpoint with the norm after every few blocks that large models have."""
    followed = [int(match[1]) + 1 for name in found.tensors if (match := _EXTRA_NORM.match(name))]
    if not followed:
        return found
    architecture: dict[str, Any] = {**found.architecture, "extra_norm_every": min(followed)}
    names = ("embed_dim", "depths", "num_heads", "extra_norm_every")
    architecture["variant"] = variant_of({name: architecture[name] for name in names})
    rename = partial(_rename_with_norms, every=min(followed))
    return replace(found, architecture=architecture, layout=replace(found.layout, rename=rename))


def _rename_with_norms(name: str, tensor: Tensor, *, every: int) -> dict[str, Tensor]:
    match name.split("."):
        case ["stages", stage, "extra_norms", index, leaf]:
            block = every * (int(index) + 1) - 1
            return {f"layers.{stage}.blocks.{block}.norm3.{leaf}": tensor}
    return rename_tensor(name, tensor, merge_shift=0)
