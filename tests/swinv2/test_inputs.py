"""What people hand to an encoder gives a result or an error that says what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from swinv2 import (
    Execution,
    SwinV2,
    SwinV2Config,
    VideoSwinV2,
    inflate,
    save_encoder,
    save_video_encoder,
)
from swinv2.config import video_config

CONFIG = SwinV2Config(image_size=32, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
CLIPS = torch.linspace(-1, 1, 4 * 3 * 32 * 32).reshape(1, 4, 3, 32, 32)


@pytest.fixture(params=["images", "clips"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if request.param == "images":
        return SwinV2(CONFIG), IMAGES
    return VideoSwinV2(video_config(CONFIG, frames=4, window_frames=2)), CLIPS


def calls(encoder: Any) -> list[Callable[[Any], Any]]:
    return [encoder, encoder.features, encoder.embed]


@pytest.mark.parametrize("path", ["auto", "explicit", "sdpa", "sequential"])
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_gives_empty_maps(
    case: tuple[Any, Tensor], path: str, training: bool
) -> None:
    encoder, pixels = case
    encoder.train(training).set_execution(attention=path)
    full, empty = encoder.features(pixels), encoder.features(pixels[:0])
    assert [one.shape for one in empty] == [(0, *one.shape[1:]) for one in full]
    found = encoder(pixels[:0])
    assert found.shape == (0, *encoder(pixels).shape[1:])
    found.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_are_those_of_the_weights(
    case: tuple[Any, Tensor], dtype: torch.dtype
) -> None:
    encoder, pixels = case
    encoder.eval()
    expected = encoder(pixels.to(dtype).float())
    found = encoder(pixels.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert encoder.double()(pixels).dtype == torch.float64


def test_float64_images_under_autocast(case: tuple[Any, Tensor]) -> None:
    encoder, pixels = case
    encoder.eval()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(encoder(pixels.double()), encoder(pixels))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda pixels: pixels.numpy(), "from_numpy"),
        (lambda pixels: pixels.double().numpy(), "from_numpy"),
        (list, "torch.stack"),
        (lambda _: None, "NoneType"),
        (lambda pixels: pixels.byte(), "floating point"),
        (lambda pixels: pixels.long(), "floating point"),
        (lambda pixels: pixels > 0, "floating point"),
        (lambda pixels: pixels.to(torch.complex64), "floating point"),
        (lambda pixels: pixels[0], "shape"),
        (lambda pixels: pixels[None], "shape"),
        (lambda pixels: pixels.movedim(-3, -1), "shape"),
        (lambda pixels: pixels.narrow(-3, 0, 1), "shape"),
        (lambda pixels: pixels.narrow(-3, 0, 0), "shape"),
        (lambda pixels: pixels[..., :0], "shape"),
        (lambda pixels: pixels[..., :0, :], "shape"),
    ],
)
def test_other_inputs_are_named(
    case: tuple[Any, Tensor], change: Callable[[Any], Any], word: str
) -> None:
    encoder, pixels = case
    wrong = change(np.array(pixels) if word == "numpy" else pixels)
    for call in calls(encoder):
        with pytest.raises(ValueError, match=word):
            call(wrong)


def test_a_clip_without_frames_is_named() -> None:
    encoder = VideoSwinV2(video_config(CONFIG, frames=4, window_frames=2))
    with pytest.raises(ValueError, match="shape"):
        encoder(CLIPS[:, :0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_tokens_of_other_precisions_are_those_of_the_weights(
    case: tuple[Any, Tensor], dtype: torch.dtype
) -> None:
    encoder, pixels = case
    tokens = encoder.eval().embed(pixels).to(dtype)
    torch.testing.assert_close(encoder.encode(tokens), encoder.encode(tokens.float()))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda tokens: tokens.detach().numpy(), "from_numpy"),
        (lambda _: None, "NoneType"),
        (lambda tokens: tokens.int(), "floating point first"),
        (lambda tokens: tokens[:, :0], "shape"),
    ],
)
def test_other_tokens_are_named(
    case: tuple[Any, Tensor], change: Callable[[Any], Any], word: str
) -> None:
    encoder, pixels = case
    with pytest.raises(ValueError, match=word):
        encoder.encode(change(encoder.embed(pixels)))


VIDEO_CONFIG = video_config(CONFIG, frames=4, window_frames=2)
HALVES = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda path: SwinV2(VIDEO_CONFIG), "SwinV2Config"),
        (lambda path: VideoSwinV2(CONFIG), "VideoConfig"),  # type: ignore[arg-type]
        (lambda path: save_encoder(VideoSwinV2(VIDEO_CONFIG), path, **HALVES), "save_video_enc"),  # type: ignore[arg-type]
        (lambda path: save_video_encoder(SwinV2(CONFIG), path, **HALVES), "by save_encoder"),  # type: ignore[arg-type]
        (lambda path: save_encoder(SwinV2(CONFIG).state_dict(), path, **HALVES), "give a SwinV2"),  # type: ignore[arg-type]
        (lambda path: save_encoder(SwinV2(CONFIG), path, **HALVES, provenance={"step": 1}), "prov"),  # type: ignore[arg-type]
        (lambda path: inflate(VideoSwinV2(VIDEO_CONFIG)), "image encoder"),  # type: ignore[arg-type]
        (lambda path: inflate(None), "image encoder"),  # type: ignore[arg-type]
    ],
)
def test_encoders_of_other_types_are_named(
    tmp_path: Path, call: Callable[[Path], object], word: str
) -> None:
    with pytest.raises(TypeError, match=word):
        call(tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


@pytest.mark.parametrize("mean", [0.5, None, "abc", ["0.5"] * 3, [None] * 3, [0.5] * 2])
def test_means_that_are_no_numbers_are_named(tmp_path: Path, mean: Any) -> None:
    with pytest.raises(ValueError, match=r"^mean is .*: give"):
        save_encoder(SwinV2(CONFIG), tmp_path / "encoder", mean=mean, std=(0.5,) * 3)


def test_arrays_and_tensors_are_means(tmp_path: Path) -> None:
    for values in (np.full(3, 0.5, np.float32), torch.full((3,), 0.5)):
        path = save_encoder(SwinV2(CONFIG), tmp_path / "encoder", mean=values, std=values)  # type: ignore[arg-type]
        assert (path / "config.json").is_file()


@pytest.mark.parametrize("choice", [None, 3, ["auto", None]])
def test_execution_of_other_types_is_named(choice: Any) -> None:
    with pytest.raises(ValueError, match="choose auto"):
        Execution(attention=choice)
