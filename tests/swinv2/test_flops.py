import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swinv2 import SwinV2Config, build_encoder
from swinv2.flops import forward_flops


def linear_flops(rows: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * rows[0] * rows[1] * weight[0]


OURS = {torch.ops.swinv2.linear: linear_flops}
"""If oneDNN is fast, linear layers are a custom operator, which torch cannot count."""


def counted(config: SwinV2Config) -> int:
    encoder = build_encoder(config).eval()
    encoder.set_execution(attention="explicit")
    images = torch.zeros(1, config.in_channels, *config.image_size)
    with torch.no_grad():
        encoder(images)  # position biases are computed once, and kept
        with FlopCounterMode(display=False, custom_mapping=OURS) as counter:
            encoder(images)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "sizes",
    [
        {"image_size": 64, "window_size": 4},
        {"image_size": (64, 96), "window_size": (4, 6)},
        {"image_size": 56, "window_size": 5},  # windows and merges are padded
        {"image_size": 32, "window_size": 16, "patch_size": 2, "in_channels": 5},
        {"image_size": 48, "window_size": 3, "mlp_ratio": 3.0},
    ],
)
def test_flops_equal_torchs_count(sizes: dict[str, object]) -> None:
    config = SwinV2Config(embed_dim=16, depths=(2, 1, 3), num_heads=(1, 2, 4), **sizes)
    assert forward_flops(config) == counted(config)


def test_a_published_size() -> None:
    """The SwinV2 paper, table 4: base at 256 pixels with windows of 8 tokens takes 20.3 GFLOPs."""
    config = build_on_meta("base", 256, 8)
    # It counts a multiplication and addition as one.
    assert forward_flops(config) / 2 == pytest.approx(20.3e9, rel=0.02)


def build_on_meta(variant: str, image_size: int, window_size: int) -> SwinV2Config:
    with torch.device("meta"):
        return build_encoder(variant, image_size=image_size, window_size=window_size).config
