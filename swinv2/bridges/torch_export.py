"""The encoder as a ``.pt2`` program of torch.export, which runs without this code.

The batch is open; height and width are those of the encoder, or open too with `any_size`: then
windows, shifts, padding and masks are computed in the graph, and one pixel is enough. A program
with fixed sizes refuses others.

Measured with torch 2.13, in seconds of one CPU core, comparison included:

    tiny, 256 pixels, window 8     114 MB, 13 s     any size  114 MB, 27 s
    base, 192 pixels, window 12    353 MB, 19 s     any size  352 MB, 36 s

Loading a ``.pt2`` means trust: torch.export.load falls back to a pickle that can run code, so load
those alone that come from someone you trust. Here they are only written; what is read back is
what was written a moment before.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from swinv2.atomic import atomic_folder
from swinv2.bridges.graphs import (
    compare_maps,
    is_graph_export,
    trace,
    write_description,
    write_readme,
)
from swinv2.bridges.verification import Report, ignore, plain_copy
from swinv2.config import SwinV2Config
from swinv2.config_file import check_normalisation
from swinv2.encoder import SwinV2

PROGRAM_FILE = "model.pt2"


def export_program(
    encoder: SwinV2,
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    any_size: bool = False,
    images: Tensor | None = None,
    report: Report = ignore,
) -> Path:
    """Write ``encoder`` as ``model.pt2``, loaded and compared with PyTorch before it is kept.

    Args:
        encoder: left as it is; use `SwinV2.set_input` first to export it at another size.
        path: a new or empty folder, or an earlier export.
        mean: one value a channel, for images in [0, 1].
        std: one positive value a channel.
        any_size: leave height and width open.
        images: to compare the maps on, as the encoder takes them; a picture where there are none.
        report: is told how far the maps are apart.

    Raises:
        BridgeError: what the program gives differs from PyTorch.
        ValueError: ``mean`` or ``std`` does not fit the channels, or ``path`` is occupied.
    """
    config = encoder.config
    check_normalisation(mean, std, config.in_channels)
    with atomic_folder(path, may_replace=is_program_export) as folder:
        plain = plain_copy(encoder).requires_grad_(False)
        torch.export.save(trace(plain, any_size=any_size), folder / PROGRAM_FILE)
        program = torch.export.load(folder / PROGRAM_FILE).module()
        report(compare_maps(plain, program, images, any_size=any_size))
        write_description(folder, "torch-export", config, mean=mean, std=std, any_size=any_size)
        write_readme(folder, config, _lines(config), any_size=any_size)
    return Path(path)


def is_program_export(path: Path) -> bool:
    """Tell whether ``path`` is what `export_program` wrote, and holds nothing else."""
    return is_graph_export(path, "torch-export", {PROGRAM_FILE})


def _lines(config: SwinV2Config) -> str:
    shape = ", ".join(str(side) for side in (1, config.in_channels, *config.image_size))
    return f"""import torch

program = torch.export.load("{PROGRAM_FILE}").module()
images = torch.zeros({shape})  # yours, prepared as below
maps = program(images)"""
