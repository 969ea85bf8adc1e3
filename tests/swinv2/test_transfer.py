"""Window transfer: only the first windows and the present sizes matter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swinv2 import (
    SwinV2,
    SwinV2Config,
    build_encoder,
    load_encoder,
    read_encoder_config,
    save_encoder,
)

Pair = tuple[int, int]
Step = tuple[int | Pair, int | Pair]

NORMALISATION = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
STEPS: list[Step] = [(224, 14), (384, 24), (1536, 48)]
OBLONG_STEPS: list[Step] = [(256, 16), ((128, 224), (8, 14)), ((160, 96), (20, 10))]
FIRST_WINDOWS = ((12, 12), (12, 12), (12, 12), (6, 6))
BARE: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (2, 1),
    "num_heads": (1, 2),
}


@pytest.fixture
def encoder(randomise: Callable[[nn.Module], None]) -> SwinV2:
    """An encoder as it was trained at 192 pixels with window 12."""
    encoder = SwinV2(
        SwinV2Config(
            embed_dim=8,
            depths=(2, 1, 1, 2),
            num_heads=(1, 2, 2, 4),
            image_size=192,
            window_size=12,
        )
    )
    randomise(encoder)
    return encoder.eval()


def features_with_gradients(encoder: SwinV2) -> list[Tensor]:
    """Features at the nominal size."""
    generator = torch.Generator().manual_seed(0)
    return encoder.features(torch.randn(1, 3, *encoder.config.image_size, generator=generator))


@torch.no_grad()
def features(encoder: SwinV2) -> list[Tensor]:
    return features_with_gradients(encoder)


def assert_equal(found: SwinV2, expected: SwinV2) -> None:
    assert found.config == expected.config
    for one, other in zip(features(found), features(expected), strict=True):
        assert torch.equal(one, other)


def in_place(encoder: SwinV2, step: Step, folder: Path) -> SwinV2:
    encoder.set_input(*step)
    return encoder


def through_a_file(encoder: SwinV2, step: Step, folder: Path) -> SwinV2:
    path = save_encoder(encoder, folder / "encoder", **NORMALISATION)
    return load_encoder(path, image_size=step[0], window_size=step[1])


def changed_then_saved(encoder: SwinV2, step: Step, folder: Path) -> SwinV2:
    encoder.set_input(*step)
    return load_encoder(save_encoder(encoder, folder / "encoder", **NORMALISATION))


def one_size_each(encoder: SwinV2, step: Step, folder: Path) -> SwinV2:
    encoder.set_input(window_size=step[1])
    path = save_encoder(encoder, folder / "encoder", **NORMALISATION)
    return load_encoder(path, image_size=step[0])


WAYS = [in_place, through_a_file, changed_then_saved, one_size_each]


@pytest.mark.parametrize("steps", [STEPS[:2], OBLONG_STEPS], ids=["square", "oblong"])
@pytest.mark.parametrize(
    "ways",
    [*([way] * 3 for way in WAYS), [in_place, through_a_file, in_place], WAYS[::-1]],
    ids=lambda ways: ", ".join(way.__name__ for way in ways),
)
def test_a_transfer_in_steps_equals_a_direct_one(
    ways: list[Callable[[SwinV2, Step, Path], SwinV2]],
    steps: list[Step],
    encoder: SwinV2,
    tmp_path: Path,
) -> None:
    path = save_encoder(encoder, tmp_path / "first", **NORMALISATION)
    for way, step in zip(ways, steps, strict=False):
        encoder = way(encoder, step, tmp_path)
        direct = load_encoder(path, image_size=step[0], window_size=step[1])
        assert encoder.config == direct.config
        assert encoder.config.pretrained_window_sizes == FIRST_WINDOWS
    assert_equal(encoder, direct)


def test_a_direct_transfer_equals_the_encoder_by_hand(
    encoder: SwinV2,
    tmp_path: Path,
    encode_by_hand: Callable[..., tuple[list[Tensor], Tensor]],
) -> None:
    path = save_encoder(encoder, tmp_path / "encoder", **NORMALISATION)
    larger = load_encoder(path, image_size=(96, 160), window_size=(10, 20)).double()
    images = torch.randn(1, 3, 96, 160, dtype=torch.float64)
    with torch.no_grad():
        found = larger(images)[0]
        _, expected = encode_by_hand(larger, images[0], FIRST_WINDOWS)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_transfer_in_steps_to_the_largest_images_equals_a_direct_one(
    encoder: SwinV2, tmp_path: Path
) -> None:
    path = save_encoder(encoder, tmp_path / "first", **NORMALISATION)
    for step, way in zip(STEPS, (through_a_file, in_place, changed_then_saved), strict=True):
        encoder = way(encoder, step, tmp_path)
    direct = load_encoder(path, image_size=1536, window_size=48)
    assert encoder.config == direct.config
    # A strip of such an image has windows of every size in full.
    strip = torch.randn(1, 3, 192, 1536)
    with torch.no_grad():
        assert torch.equal(encoder(strip), direct(strip))


@pytest.mark.parametrize("step", [(224, 14), ((128, 224), (8, 14)), (64, 3)], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_transferring_back_restores_the_features(
    way: Callable[[SwinV2, Step, Path], SwinV2], step: Step, encoder: SwinV2, tmp_path: Path
) -> None:
    before = features(encoder)
    there = way(encoder, step, tmp_path)
    features(there)
    back = way(there, (192, 12), tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(features(back), before, strict=True))


def test_a_window_larger_than_a_stage_spans_it(encoder: SwinV2, tmp_path: Path) -> None:
    path = save_encoder(encoder, tmp_path / "encoder", **NORMALISATION)
    vast = load_encoder(path, image_size=(96, 64), window_size=100)
    fitting = load_encoder(path, image_size=(96, 64), window_size=(24, 16))
    assert vast.config.stage_windows == ((24, 16), (12, 8), (6, 4), (3, 2))
    assert vast.config.pretrained_window_sizes == FIRST_WINDOWS
    for one, other in zip(features(vast), features(fitting), strict=True):
        assert torch.equal(one, other)
    # What is recorded is what a stage had, not what was asked for.
    untrained = SwinV2(SwinV2Config(**BARE, window_size=100))
    untrained.set_input(window_size=4)
    assert untrained.config.pretrained_window_sizes == ((16, 16), (8, 8))


def test_an_impossible_size_does_not_change_the_encoder(encoder: SwinV2, tmp_path: Path) -> None:
    path = save_encoder(encoder, tmp_path / "encoder", **NORMALISATION)
    before, config = features(encoder), encoder.config
    for sizes, message in (
        ({"image_size": 384, "window_size": 0}, "window_size is 0"),
        ({"image_size": 3, "window_size": 24}, "less than one patch"),
        ({"image_size": (384, 384, 3)}, r"image_size is \(384, 384, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.set_input(**sizes)
        with pytest.raises(ValueError, match=message):
            load_encoder(path, **sizes)
    assert encoder.config is config
    assert all(
        torch.equal(one, other) for one, other in zip(features(encoder), before, strict=True)
    )


def test_training_continues_at_another_size_with_the_first_coordinates(
    encoder: SwinV2, tmp_path: Path
) -> None:
    path = save_encoder(encoder, tmp_path / "encoder", **NORMALISATION)
    trained = {}
    for name, larger in (("loaded", load_encoder(path)), ("in place", encoder)):
        larger.set_input(image_size=96, window_size=20)
        optimizer = torch.optim.SGD(larger.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            sum(one.square().mean() for one in features_with_gradients(larger)).backward()
            optimizer.step()
        trained[name] = save_encoder(larger, tmp_path / name, **NORMALISATION)
        assert read_encoder_config(trained[name]).config.pretrained_window_sizes == FIRST_WINDOWS
        assert_equal(load_encoder(trained[name]), larger)
    assert_equal(load_encoder(trained["loaded"]), load_encoder(trained["in place"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
def test_compiled_blocks_follow_a_change_of_size(
    randomise: Callable[[nn.Module], None],
) -> None:
    torch._dynamo.reset()
    plain = build_encoder(SwinV2Config(**BARE, window_size=4))
    randomise(plain)
    compiled = build_encoder(plain.config)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_blocks(backend="eager")
    first = features(compiled)
    for step in ((64, 8), ((48, 80), (6, 10)), (32, 4)):
        for encoder in (plain, compiled):
            encoder.set_input(*step)
        for one, other in zip(features(compiled), features(plain), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert all(
        torch.equal(one, other) for one, other in zip(features(compiled), first, strict=True)
    )
