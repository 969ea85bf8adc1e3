"""Floating-point operations of a forward pass, counted from the sizes of an encoder."""

import math

from swinv2.attention import window_grid
from swinv2.config import SwinV2Config


def forward_flops(config: SwinV2Config) -> int:
    """Return the floating-point operations of encoding one input of the nominal size.

    These are those of the matrix products: two per term, a multiplication and an addition. With C
    channels of an image (or of all frames of a patch), patches of p² pixels, and a stage of d
    channels, n tokens, windows of w tokens, and n' tokens in all windows (n plus the padding of the
    last ones), the terms are, the second and third for every block,

        patch embedding    2 · n · C p² d
        attention          2 · n' · (3 d² + 2 w d + d²)   qkv, scores and mix, projection
        MLP                2 · n · 2 r d²                 r the MLP ratio
        merging            2 · n/4 · 4d · 2d              n rounded up to even rows and columns

    The MLP of the position bias, computed once per batch, is left out, as are norms, softmax and
    all other operations that are not matrix products.
    """
    patches = math.prod(config.stage_maps[0])
    total = patches * config.patch_channels * config.patch_size**2 * config.embed_dim
    for stage, (dim, depth) in enumerate(zip(config.stage_dims, config.depths, strict=True)):
        resolution = config.stage_maps[stage]
        grid = window_grid(resolution, config.map_window, shifted=False)
        window = math.prod(grid.window)
        padded = math.prod(grid.windows) * window
        attention = padded * (4 * dim**2 + 2 * window * dim)
        mlp = math.prod(resolution) * 2 * dim * int(config.mlp_ratio * dim)
        total += depth * (attention + mlp)
        if stage + 1 < len(config.depths):
            *frames, rows, columns = resolution
            joined = math.prod(frames) * -(-rows // 2) * -(-columns // 2)
            total += joined * 4 * dim * 2 * dim
    return 2 * total
