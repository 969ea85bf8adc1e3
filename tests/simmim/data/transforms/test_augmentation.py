"""RandAugment, colour jitter and random erasing of one image."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from simmim.data.datasets.shards import ShardSet
from simmim.data.order.order import Address
from simmim.data.order.randomness import numpy_stream
from simmim.data.transforms.augmentation import (
    ERASED_AREA,
    OPERATIONS,
    Augment,
    Operation,
    apply_operation,
    erase,
)
from simmim.data.transforms.image_transforms import TrainTransform
from simmim.data.transforms.settings import AugmentationSettings
from tests.simmim.data.conftest import crop

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
FILL = (102, 128, 153)
DIRECTED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
PAPER = AugmentationSettings(rand_magnitude=9, color_jitter=0.4, erasing=0.25)
TIMM = {
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}


def picture(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A smooth picture with some noise: neither all grey nor without edges."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[1], : size[0]]
    waves = [np.sin(rows / (3 + channel)) + np.cos(columns / (4 - channel)) for channel in range(3)]
    pixels = 110 + 45 * np.stack(waves, axis=-1) + random.normal(0, 8, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_each_operation_changes_the_picture_and_keeps_its_size(
    operation: Operation, sign: float
) -> None:
    image = picture()
    changed = apply_operation(image, operation, 9.0, sign, FILL)
    assert (changed.size, changed.mode) == (image.size, "RGB")
    assert np.abs(np.array(changed).astype(int) - np.array(image)).mean() > 0.3


@pytest.mark.parametrize("operation", DIRECTED)
def test_geometry_at_level_0_is_the_identity_and_fills_with_the_mean(operation: Operation) -> None:
    image = picture()
    assert np.array_equal(apply_operation(image, operation, 0.0, 1.0, FILL), image)
    corners = [
        np.array(apply_operation(image, operation, 10.0, sign, FILL))[row, column].tolist()
        for sign in (1.0, -1.0)
        for row in (0, -1)
        for column in (0, -1)
    ]
    assert list(FILL) in corners


@pytest.mark.parametrize("name", ["translate_x", "translate_y"])
def test_directions_are_opposite(name: Operation) -> None:
    image = Image.new("RGB", (40, 40), (10, 20, 30))
    image.putpixel((20, 20), (250, 250, 250))
    places = [
        np.unravel_index(
            np.array(apply_operation(image, name, 5.0, sign, (0, 0, 0)))[..., 0].argmax(), (40, 40)
        )
        for sign in (1.0, -1.0)
    ]
    assert abs(int(places[0][name == "translate_x"]) - int(places[1][name == "translate_x"])) == 18


@pytest.mark.peer
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm (and torchvision)")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_are_those_of_timm(operation: Operation) -> None:
    auto_augment = pytest.importorskip("timm.data.auto_augment", exc_type=ImportError)
    name, image = TIMM[operation], picture()
    for level in (0.0, 3.3, 9.0, 9.7, 10.0):
        convert = auto_augment.LEVEL_TO_ARG[name]
        ours = {
            np.array(apply_operation(image, operation, level, sign, FILL)).tobytes()
            for sign in (1.0, -1.0)
        }
        for _ in range(8):
            arguments = () if convert is None else convert(level, {"translate_pct": 0.45})
            theirs = auto_augment.NAME_TO_OP[name](
                image, *arguments, fillcolor=FILL, resample=Image.Resampling.BICUBIC
            )
            assert np.array(theirs).tobytes() in ours


def test_augmentation_is_a_function_of_the_stream() -> None:
    augment = Augment(settings=PAPER, mean=MEAN, std=STD)
    pixels = tensor(picture())
    before = pixels.clone()
    drawn = [augment(pixels, numpy_stream("test", number)) for number in range(40)]
    again = [augment(pixels, numpy_stream("test", number)) for number in range(40)]
    assert all(torch.equal(one, other) for one, other in zip(drawn, again, strict=True))
    assert torch.equal(pixels, before)
    assert len({one.numpy().tobytes() for one in drawn}) > 25
    assert {(one.dtype, tuple(one.shape)) for one in drawn} == {(torch.uint8, (3, 20, 24))}


def test_augmentation_is_off_by_default() -> None:
    augment = Augment(settings=AugmentationSettings(), mean=MEAN, std=STD)
    pixels = tensor(picture())
    assert torch.equal(augment(pixels, numpy_stream("test")), pixels)
    assert not AugmentationSettings().changes_images
    assert not AugmentationSettings().mixes


def test_color_jitter_stays_within_its_factors() -> None:
    augment = Augment(settings=AugmentationSettings(color_jitter=0.4), mean=MEAN, std=STD)
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)  # whose contrast and saturation are fixed
    means = [
        float(augment(grey, numpy_stream("test", number)).float().mean()) for number in range(200)
    ]
    assert 58 <= min(means) < 66
    assert 134 < max(means) <= 142


def test_erased_rectangles_are_noise_of_the_right_size() -> None:
    pixels = torch.zeros(3, 64, 64, dtype=torch.uint8)
    shares, values = [], []
    for number in range(300):
        erased = erase(pixels, (0.5,) * 3, (0.1,) * 3, numpy_stream("erase", number)) > 0
        rows, columns = erased.any(dim=(0, 2)), erased.any(dim=(0, 1))
        assert erased.any(dim=0).sum() == rows.sum() * columns.sum()  # one rectangle
        shares.append(float(erased.any(dim=0).float().mean()))
        noise = erase(pixels, (0.5,) * 3, (0.1,) * 3, numpy_stream("erase", number))
        values.append(noise[:, rows][:, :, columns].float().flatten())
    low, high = ERASED_AREA
    assert low * 0.9 < min(shares)
    assert max(shares) < high * 1.05
    assert np.mean(shares) == pytest.approx((low + high) / 2, abs=0.02)
    drawn = torch.cat(values) / 255
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(drawn.std()) == pytest.approx(0.1, abs=0.01)


def test_erasing_has_its_probability() -> None:
    augment = Augment(settings=AugmentationSettings(erasing=0.25), mean=MEAN, std=STD)
    pixels = torch.zeros(3, 16, 16, dtype=torch.uint8)
    changed = [bool(augment(pixels, numpy_stream("p", number)).any()) for number in range(800)]
    assert np.mean(changed) == pytest.approx(0.25, abs=0.05)


def test_a_sample_looks_different_in_each_epoch_and_always_the_same(shards: object) -> None:
    found = ShardSet(str(shards))
    augment = Augment(settings=PAPER, mean=MEAN, std=STD)
    transform = TrainTransform(data=crop(16), seed=3, augment=augment)
    raw = found.read(0, 0)
    looks = [transform(raw, Address(epoch, 0, 0)).image for epoch in (0, 1, 2, 0)]
    assert torch.equal(looks[0], looks[3])
    assert not torch.equal(looks[0], looks[1])
    plain = TrainTransform(data=crop(16), seed=3)
    same = [plain(raw, Address(epoch, 0, 0)) for epoch in range(3)]
    flips = [transform(raw, Address(epoch, 0, 0)).flip for epoch in range(3)]
    assert [sample.flip for sample in same] == flips  # augmentation has a stream of its own


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rand_magnitude": 11}, "rand_magnitude is 11"),
        ({"erasing": 1.5}, "erasing is 1.5"),
        ({"mixup": -1.0}, "mixup is -1.0"),
        ({"mix_switch": 2.0}, "mix_switch is 2.0"),
        ({"color_jitter": 1.5}, "from 0 to 1"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentationSettings(**values)  # type: ignore[arg-type]
