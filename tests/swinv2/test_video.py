"""Video encoder: three-dimensional windows by brute force, and inflated image weights."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from swinv2 import (
    Provenance,
    SwinV2,
    VideoSwinV2,
    build_encoder,
    inflate,
    load_encoder,
    load_video_encoder,
    read_video_config,
    save_encoder,
    save_video_encoder,
)
from swinv2.attention import (
    WindowAttention,
    partition,
    reverse,
    shift_tokens,
    unshift_tokens,
    window_grid,
    window_mask,
)
from swinv2.config import VideoConfig, video_config
from swinv2.flops import forward_flops
from swinv2.position_bias import PositionBias, relative_coordinates, relative_position_index

CPU = torch.device("cpu")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
sides = st.integers(1, 6)
Axes = tuple[int, int, int]


def image_encoder(**sizes: object) -> SwinV2:
    return build_encoder(
        "tiny",
        **{
            "image_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 16,
            "depths": (2, 2, 2),
            "num_heads": (1, 2, 4),
            **sizes,
        },
    ).eval()


def stretches(position: Axes, shift: Axes, window: Axes) -> tuple[int, ...]:
    """Number the stretch along each axis that a token lies in."""
    return tuple(
        (place - moved) // side for place, moved, side in zip(position, shift, window, strict=True)
    )


@settings(deadline=None, max_examples=40)
@given(resolution=st.tuples(sides, sides, sides), window=st.tuples(sides, sides, sides))
def test_windows_of_clips_have_every_token_once_and_separate_regions(
    resolution: Axes, window: Axes
) -> None:
    grid = window_grid(resolution, window, shifted=True)
    tokens = torch.arange(1, 1 + math.prod(resolution)).view(1, *resolution, 1)
    windows = partition(shift_tokens(tokens, grid), grid)
    assert windows.shape == (1, math.prod(grid.windows), math.prod(grid.window), 1)
    assert torch.equal(unshift_tokens(reverse(windows, grid), grid), tokens)

    mask, names = window_mask(grid, CPU)[:, 0], windows[0, :, :, 0]
    padded = (names == 0)[:, None, :].expand_as(mask)
    assert mask[padded].isneginf().all()
    assert set(mask[~padded].tolist()) <= {0.0, -100.0}
    visible = {
        (int(of_window[query]), int(of_window[key]))
        for of_window, rows in zip(names, mask == 0, strict=True)
        for query, key in rows.nonzero().tolist()
        if of_window[query]
    }
    places = [tuple(place) for place in np.ndindex(*resolution)]
    fitted = [stretches(place, grid.shift, grid.window) for place in places]
    assert visible == {
        (1 + a, 1 + b)
        for a, b in itertools.product(range(len(places)), repeat=2)
        if fitted[a] == fitted[b]
    }


def attend_in_three(attention: WindowAttention, tokens: Tensor, grid: object, reference: Axes):
    """Attention of one clip (frames, rows, columns, channels), a softmax for every query."""
    heads, dim = len(attention.logit_scale), tokens.shape[-1]
    flat = tokens.reshape(-1, dim)
    query, key, value = (flat @ part.T for part in attention.qkv.weight.view(3, dim, dim))
    query, value = query + attention.query_bias, value + attention.value_bias
    scale = attention.logit_scale.clamp(max=math.log(100)).exp()
    places = [tuple(place) for place in np.ndindex(*tokens.shape[:-1])]
    fitted = [stretches(place, grid.shift, grid.window) for place in places]
    mixed = []
    for one, place in enumerate(places):
        seen = [other for other in range(len(places)) if fitted[other] == fitted[one]]
        offsets = torch.tensor([place], dtype=flat.dtype) - torch.tensor(
            [places[other] for other in seen], dtype=flat.dtype
        )
        offsets = offsets * torch.tensor([8 / max(side - 1, 1) for side in reference])
        spaced = offsets.sign() * torch.log2(offsets.abs() + 1) / 3
        bias = attention.position_bias
        logits = bias.reduce(torch.relu(bias.expand(spaced.to(flat.dtype))))
        parts = []
        for head in range(heads):
            width = slice(head * dim // heads, (head + 1) * dim // heads)
            cosine = nn.functional.cosine_similarity(query[one, width][None], key[seen][:, width])
            weight = (scale[head] * cosine + 16 * logits[:, head].sigmoid()).softmax(0)
            parts.append(weight @ value[seen][:, width])
        mixed.append(torch.cat(parts))
    return attention.projection(torch.stack(mixed)).view(tokens.shape)


@pytest.mark.parametrize(
    ("resolution", "window"),
    [
        ((4, 6, 4), (2, 3, 2)),  # the plain case
        ((3, 5, 7), (2, 4, 3)),  # padding along every axis
        ((2, 5, 6), (8, 3, 3)),  # one window over all frames, which is not shifted along time
        ((5, 4, 4), (2, 8, 8)),  # one window over each frame, shifted along time
    ],
)
@pytest.mark.parametrize("reference", [(8, 4, 4), (1, 3, 2)])
def test_attention_in_clips_equals_a_softmax_per_query(
    resolution: Axes, window: Axes, reference: Axes, randomise: Callable[[nn.Module], None]
) -> None:
    attention = WindowAttention(8, 2, reference).double()
    randomise(attention)
    grid = window_grid(resolution, window, shifted=True)
    tokens = torch.randn(2, *resolution, 8, dtype=torch.float64)
    output = attention(tokens, grid)
    for clip, found in zip(tokens, output, strict=True):
        expected = attend_in_three(attention, clip, grid, reference)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_offsets_of_clips_are_numbered_time_first() -> None:
    window = (2, 3, 2)
    index = relative_position_index(window, CPU)
    assert index.unique().tolist() == list(range(3 * 5 * 3))
    coordinates = relative_coordinates(window, window, torch.float64, CPU)
    assert coordinates.shape == (3 * 5 * 3, 3)
    places = [tuple(place) for place in np.ndindex(*window)]
    for (a, query), (b, key) in itertools.product(enumerate(places), repeat=2):
        signs = coordinates[index[a, b]].sign().tolist()
        assert signs == [float(np.sign(x - y)) for x, y in zip(query, key, strict=True)]


@pytest.mark.parametrize(
    "sizes",
    [
        {"frames": 8, "window_frames": 8},  # the paper's: one window over all frames
        {"frames": 5, "window_frames": 2},  # shifts along time, and padding
        {"frames": 6, "window_frames": 2, "frame_patch": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(32, 32), (22, 38)])
def test_a_still_clip_has_the_features_of_its_image(
    sizes: dict[str, int], size: tuple[int, int], randomise: Callable[[nn.Module], None]
) -> None:
    encoder = image_encoder()
    randomise(encoder)
    video = inflate(encoder, **sizes)
    images = torch.randn(2, 3, *size)
    clips = images[:, None].expand(-1, sizes["frames"], -1, -1, -1)
    with torch.no_grad():
        for of_image, of_clip in zip(encoder.features(images), video.features(clips), strict=True):
            assert of_clip.shape[2] == sizes["frames"] // sizes.get("frame_patch", 1)
            for frame in of_clip.unbind(2):
                torch.testing.assert_close(frame, of_image, rtol=1e-5, atol=1e-5)


def test_other_clips_have_other_features_and_time_is_learned(
    randomise: Callable[[nn.Module], None],
) -> None:
    encoder = image_encoder()
    randomise(encoder)
    video = inflate(encoder, frames=4, window_frames=4).train()
    clip = torch.randn(1, 4, 3, 32, 32)
    video(clip).square().mean().backward()
    for name, parameter in video.named_parameters():
        if name.endswith("expand.weight") and "position_bias" in name:
            assert not parameter[:, 0].any()
            assert parameter.grad is not None
            assert parameter.grad[:, 0].any()
    bias = next(module for module in video.modules() if isinstance(module, PositionBias))
    nn.init.normal_(bias.expand.weight[:, 0])
    with torch.no_grad():
        turned = video.eval()(clip.flip(1)).flip(1)
        assert (turned - video(clip)).abs().max() > 1e-3


def test_fresh_weights_start_without_time() -> None:
    video = VideoSwinV2(video_config(image_encoder().config))
    biases = [module for module in video.modules() if isinstance(module, PositionBias)]
    assert len(biases) == 6
    for bias in biases:
        assert not bias.expand.weight[:, 0].any()
        assert bias.expand.weight[:, 1:].any()


@pytest.mark.parametrize("execution", ["explicit", "sdpa", "sequential", "auto"])
def test_every_attention_path_accepts_clips(
    execution: str, randomise: Callable[[nn.Module], None]
) -> None:
    video = VideoSwinV2(video_config(image_encoder().config, frames=3, window_frames=2)).eval()
    randomise(video)
    clip = torch.randn(1, 3, 3, 24, 20)
    expected = video(clip)
    video.set_execution(attention=execution, checkpointing="full")
    torch.testing.assert_close(video(clip), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
def test_compiled_blocks_accept_clips(randomise: Callable[[nn.Module], None]) -> None:
    video = VideoSwinV2(video_config(image_encoder().config, frames=3, window_frames=2)).eval()
    randomise(video)
    clip = torch.randn(1, 3, 3, 24, 20)
    expected = video(clip)
    video.compile_blocks()
    torch.testing.assert_close(video(clip), expected, rtol=1e-4, atol=1e-4)


def test_a_saved_encoder_is_restored_with_its_windows(
    tmp_path: Path, randomise: Callable[[nn.Module], None]
) -> None:
    encoder = image_encoder()
    randomise(encoder)
    video = inflate(encoder, frames=4, window_frames=2)
    origin = Provenance(step=7, samples_seen=70, recipe_hash="abc")
    folder = save_video_encoder(
        video,
        tmp_path / "video",
        mean=MEAN,
        std=STD,
        provenance=Provenance(step=1),
        inflated_from=origin,
    )
    found = read_video_config(folder)
    assert found.inflated_from == origin
    assert found.provenance.step == 1
    assert (found.mean, found.std) == (MEAN, STD)
    assert found.config.pretrained_window_sizes == encoder.config.stage_windows
    assert found.config.pretrained_window_frames == 2
    loaded = load_video_encoder(folder)
    clip = torch.randn(1, 4, 3, 32, 32)
    assert torch.equal(loaded(clip), video(clip))

    larger = load_video_encoder(folder, image_size=48, window_size=6, frames=8, window_frames=4)
    assert larger.config.reference_windows == loaded.config.reference_windows
    again = save_video_encoder(larger, tmp_path / "larger", mean=MEAN, std=STD)
    back = load_video_encoder(again, image_size=32, window_size=4, frames=4, window_frames=2)
    assert torch.equal(back(clip), video(clip))
    assert read_video_config(again).inflated_from is None


def test_the_loader_of_the_other_kind_is_named(tmp_path: Path) -> None:
    encoder = image_encoder()
    image = save_encoder(encoder, tmp_path / "image", mean=MEAN, std=STD)
    video = save_video_encoder(inflate(encoder), tmp_path / "video", mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=r"`swinv2\.load_video_encoder`"):
        load_encoder(video)
    with pytest.raises(ValueError, match=r"`swinv2\.load_encoder`"):
        load_video_encoder(image)
    content = json.loads((video / "config.json").read_text())
    content["config"]["frames"] = 0
    (video / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json: frames is 0"):
        load_video_encoder(video)
    del content["config"]["frames"], content["inflated_from"]
    (video / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"inflated_from: missing\n.*config\.frames: missing"):
        load_video_encoder(video)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 3, 4, 32, 32), torch.float32, "frames, 3, height, width"),
        ((4, 3, 32, 32), torch.float32, "frames, 3, height, width"),
        ((1, 3, 3, 32, 32), torch.float32, "a multiple of 2 frames"),
        ((1, 4, 3, 32, 32), torch.uint8, "normalise them first"),
    ],
)
def test_clips_of_other_shapes_are_named(
    shape: tuple[int, ...], dtype: torch.dtype, message: str
) -> None:
    video = inflate(image_encoder(), frames=4, frame_patch=2)
    with pytest.raises(ValueError, match=message):
        video(torch.zeros(shape, dtype=dtype))


def test_tokens_of_other_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(batch, frames, rows, columns, 16\)"):
        inflate(image_encoder()).encode(torch.zeros(1, 16, 16, 16))


def test_impossible_sizes_are_named() -> None:
    config = image_encoder().config
    with pytest.raises(ValueError, match=r"frames is 7.* frame_patch 2"):
        video_config(config, frames=7, frame_patch=2)
    with pytest.raises(ValueError, match="window_frames is 0"):
        video_config(config, window_frames=0)


def test_flops_are_those_of_the_frames_plus_wider_windows() -> None:
    config = image_encoder().config
    image = forward_flops(config)
    assert forward_flops(video_config(config, frames=8, window_frames=1)) == 8 * image
    assert forward_flops(video_config(config, frames=8, window_frames=8)) > 8 * image


def test_the_papers_windows_work() -> None:
    """256 pixels with 16x16x8, 320 with 20x20x8, over 8 frames (appendix A5)."""
    base = VideoConfig(
        image_size=256, window_size=16, embed_dim=8, depths=(2, 2, 2, 2), num_heads=(1, 1, 1, 1)
    )
    for config in (base, replace(base, image_size=320, window_size=20)):
        side = config.window_size[0]
        grids = [window_grid(it, config.map_window, shifted=True) for it in config.stage_maps]
        assert [grid.window for grid in grids] == [(8, side, side)] * 3 + [
            (8, side // 2, side // 2)
        ]
        assert not any(any(grid.padding) for grid in grids)
        assert [grid.shift for grid in grids[:3]] == [(0, side // 2, side // 2)] * 2 + [(0, 0, 0)]
