import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swinv2 import VARIANTS, SwinV2Config, record_windows, variant_config
from swinv2.config import clamp_window, replace_config, video_config

SIZES = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}


def test_sizes_are_stored_for_each_axis() -> None:
    config = SwinV2Config(**SIZES, image_size=64, window_size=[4, 8])
    assert config.image_size == (64, 64)
    assert config.window_size == (4, 8)


def test_a_config_is_built_from_lists() -> None:
    config = variant_config("tiny", pretrained_window_sizes=(12, 12, 12, 6))
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
    assert SwinV2Config(**fields) == config


def test_derived_sizes_round_up() -> None:
    config = SwinV2Config(**SIZES, image_size=(30, 41), patch_size=4)
    assert config.strides == (4, 8)
    assert config.stage_dims == (16, 32)
    assert config.num_features == 32
    assert config.stage_resolutions == ((8, 11), (4, 6))
    assert config.stage_windows == ((8, 8), (4, 6))


@pytest.mark.parametrize(
    ("image_size", "window_size", "recorded"),
    [
        (192, 12, (12, 12, 12, 6)),
        (192, 6, (6, 6, 6, 6)),
        (256, 8, (8, 8, 8, 8)),
        (256, 16, (16, 16, 16, 8)),
        (224, 14, (14, 14, 14, 7)),
    ],
)
def test_recorded_windows(image_size: int, window_size: int, recorded: tuple[int, ...]) -> None:
    config = variant_config("base", image_size=image_size, window_size=window_size)
    assert record_windows(config) == tuple((side, side) for side in recorded)


def test_recorded_windows_are_kept() -> None:
    config = variant_config("base", image_size=192, window_size=12)
    config = replace_config(config, pretrained_window_sizes=record_windows(config))
    larger = replace_config(config, image_size=256, window_size=16)
    assert record_windows(larger) == ((12, 12), (12, 12), (12, 12), (6, 6))


@settings(deadline=None)
@given(resolution=st.integers(1, 500), window=st.integers(1, 100))
def test_a_window_is_clamped_to_its_axis(resolution: int, window: int) -> None:
    fitted, shift_allowed = clamp_window(resolution, window)
    assert 1 <= fitted <= min(resolution, window)
    assert shift_allowed == (resolution > window) == (fitted < resolution)


def test_variants_have_heads_of_32_channels() -> None:
    for name in VARIANTS:
        config = variant_config(name)
        assert config.variant == name
        for dim, heads in zip(config.stage_dims, config.num_heads, strict=True):
            assert dim == 32 * heads


def test_a_changed_architecture_loses_the_name_of_the_variant() -> None:
    assert variant_config("base", image_size=192, patch_size=2, drop_path=0.1).variant == "base"
    assert variant_config("base", depths=(2, 2, 6, 2)).variant is None
    with pytest.raises(ValueError, match="'base' has 128; pass variant=None"):
        replace_config(variant_config("base"), embed_dim=64)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_size", 0, "image_size is 0; it must be an integer of at least 1"),
        ("image_size", (64, 64, 3), "it must be a number or \\(height, width\\)"),
        ("image_size", 2, "less than one patch of 4 pixels"),
        ("window_size", (8, -1), "window_size is -1"),
        ("window_size", 7.5, "it must be a number or"),
        ("window_size", True, "window_size is True"),
        ("patch_size", 0, "patch_size is 0"),
        ("in_channels", "3", "in_channels is '3'"),
        ("depths", (), "depths is \\(\\); it must list one number for each stage"),
        ("depths", (2, 0), "depths\\[1\\] is 0"),
        ("num_heads", (2,), "num_heads.*depths"),
        ("num_heads", (2, 5), "num_heads\\[1\\] is 5; it must divide the 32 channels of stage 1"),
        ("mlp_ratio", 0.0, "mlp_ratio is 0.0; it must leave at least one"),
        ("mlp_ratio", "4", "mlp_ratio is '4'; it must be a number"),
        ("drop_path", 1.0, "at least 0 and below 1"),
        ("extra_norm_every", -6, "extra_norm_every is -6"),
        ("pretrained_window_sizes", (12, 12, 6), "one window for each of the 2 stages"),
        ("pretrained_window_sizes", (12, 0), "pretrained_window_sizes\\[1\\] is 0"),
        ("variant", "enormous", "no variant 'enormous'; choose one of tiny, small"),
        ("variant", "base", "embed_dim is 16, but the variant 'base' has 128"),
    ],
)
def test_impossible_sizes_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SwinV2Config(**{**SIZES, field: value})


def test_numbers_of_numpy_are_stored_as_plain_ones() -> None:
    plain = SwinV2Config(**SIZES, image_size=64, window_size=(4, 8), mlp_ratio=2.5, in_channels=5)
    whole = {"image_size": np.int64(64), "in_channels": np.uint8(5), "embed_dim": np.int32(16)}
    listed = {"window_size": [np.int64(4), np.int64(8)], "depths": list(np.array([2, 2]))}
    config = SwinV2Config(**{**SIZES, **whole, **listed, "mlp_ratio": np.float64(2.5)})
    assert config == plain
    assert json.dumps(dataclasses.asdict(config)) == json.dumps(dataclasses.asdict(plain))
    video = video_config(config, frames=np.int64(8), pretrained_window_frames=np.int64(4))
    assert type(video.frames) is type(video.pretrained_window_frames) is int
    for value in (np.bool_(True), np.array([4, 4]), np.float64(4.0)):
        with pytest.raises(ValueError, match=r"patch_size is .*; it must be an integer"):
            SwinV2Config(**SIZES, patch_size=value)


def test_unknown_overrides_suggest_the_closest_field() -> None:
    with pytest.raises(ValueError, match=r"no field 'windows_size'; did you mean .*window_size"):
        variant_config("tiny", windows_size=8)
    with pytest.raises(ValueError, match="no variant 'tinny'"):
        variant_config("tinny")


def test_configs_load_no_torch_and_the_rest_is_imported_on_demand() -> None:
    code = (
        "import sys, swinv2\n"
        "from swinv2.config import variant_config\n"
        "variant_config('tiny')\n"
        "assert 'torch' not in sys.modules\n"
        "assert dir(swinv2) == sorted(swinv2.__all__)\n"
        "for name in swinv2.__all__: getattr(swinv2, name)\n"
        "assert 'torch' in sys.modules and not hasattr(swinv2, 'SwinV3')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
