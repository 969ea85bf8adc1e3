"""torchvision's `swin_v2_*` models: read under the names of the published code.

`features` lists everything in a row: patch embedding, blocks of a stage, merging, blocks, ... The
biases of query, key and value are one tensor, of which the model ignores the key's.
"""

import os
from dataclasses import replace

from torch import Tensor

from swinv2.bridges.checkpoints import BridgeError, ImportedEncoder
from swinv2.bridges.conversion import ParsedCheckpoint, assemble
from swinv2.bridges.importing.options import NO_OPTIONS, ImportOptions
from swinv2.bridges.reference import parse_published
from swinv2.bridges.sizes import smallest_image
from swinv2.config import SwinV2Config

_BLOCK_NAMES = {"mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}


def import_torchvision(
    path: str | os.PathLike[str],
    options: ImportOptions = NO_OPTIONS,
) -> ImportedEncoder:
    """Read the weights of a `swin_v2_t`, `_s` or `_b` of torchvision.

    Windows come from the position buffers in the file, or must be given. The image size is in no
    file: by default it is the smallest that the windows fit, 256 for those of torchvision.

    Args:
        path: a file (.pth or .safetensors).
        options: sizes that the file lacks, and which of several models is read.

    Raises:
        BridgeError: as for `import_reference`; tensors are named as in the published code.
    """
    checkpoint = options.read(path)
    source = checkpoint.source
    if not any(name.startswith("features.") for name in checkpoint.tensors):
        raise BridgeError(
            f"{source} is not a swin_v2 of torchvision (it has no features.*): leave out --format."
        )
    tensors = {
        theirs: part
        for name, tensor in checkpoint.tensors.items()
        for theirs, part in _published(name, tensor).items()
    }
    found = parse_published(replace(checkpoint, tensors=tensors), library="torchvision")
    found = replace(found, usual=smallest_image(found.sizes, found.architecture))
    imported = assemble(found, options)
    check_windows(imported.encoder.config, found, "torchvision")
    return imported


def _published(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return a tensor, or its parts, under the names of the published code."""
    match name.split("."):
        case ["features", "0", "0", leaf]:
            return {f"patch_embed.proj.{leaf}": tensor}
        case ["features", "0", "2", leaf]:
            return {f"patch_embed.norm.{leaf}": tensor}
        case ["features", place, *rest] if place.isdigit() and int(place) % 2 == 0:
            return {f"layers.{int(place) // 2 - 1}.downsample.{'.'.join(rest)}": tensor}
        case ["features", place, block, *rest] if place.isdigit():
            prefix = f"layers.{int(place) // 2}.blocks.{block}"
            if rest == ["attn", "qkv", "bias"]:
                query, _, value = tensor.chunk(3)
                return {f"{prefix}.attn.q_bias": query, f"{prefix}.attn.v_bias": value}
            module = ".".join(rest[:-1])
            return {f"{prefix}.{_BLOCK_NAMES.get(module, module)}.{rest[-1]}": tensor}
    return {name: tensor}


def check_windows(config: SwinV2Config, found: ParsedCheckpoint, library: str) -> None:
    """Check that the windows of each stage are those of the library, and fill the stage.

    Raises:
        BridgeError: the library pads such a stage and attends to the padding; ours does not.
    """
    known = (one.stage_windows for one in found.sizes if one.stage_windows is not None)
    windows = next(known, (config.window_size,) * len(config.depths))
    for stage, (resolution, window) in enumerate(
        zip(config.stage_resolutions, windows, strict=True), start=1
    ):
        if any(side % wide for side, wide in zip(resolution, window, strict=True)):
            raise BridgeError(
                f"{found.source}: its windows of {window[0]}x{window[1]} do not divide stage "
                f"{stage} of {resolution[0]}x{resolution[1]} tokens, and {library} attends to the "
                "padding that fills them: give the image size that it was trained at."
            )
