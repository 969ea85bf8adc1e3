import dataclasses
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from simmim.data.datasets.shards import RawSample
from simmim.data.order.order import Address
from simmim.data.order.source import DataError
from simmim.data.transforms.image_transforms import EvalTransform, Sample, TrainTransform
from simmim.data.transforms.settings import RandomCropSettings
from tests.simmim.data.conftest import random_images


@dataclass(frozen=True)
class DrawMask:
    grid: tuple[int, int]

    def __call__(self, generator: torch.Generator) -> Tensor:
        return torch.rand(self.grid, generator=generator) < 0.6


RAW = [RawSample(str(place), image, 3, "s", "png") for place, image in enumerate(random_images(4))]


class Oblong(RandomCropSettings):
    """Crops that are not square, as encoders may have them."""

    @property
    def size(self) -> tuple[int, int]:
        return 12, 16


CROP = Oblong(image_size=12, scale=(0.67, 1.0))
TRAIN = TrainTransform(data=CROP, seed=5, mask=DrawMask((6, 8)))
EVALUATE = EvalTransform(size=(12, 16), seed=5, mask=DrawMask((6, 8)))


def same(first: Sample, second: Sample) -> tuple[bool, bool]:
    assert first.mask is not None
    assert second.mask is not None
    return torch.equal(first.image, second.image), torch.equal(first.mask, second.mask)


@pytest.mark.parametrize("transform", [TRAIN, EVALUATE])
def test_shapes(transform: TrainTransform | EvalTransform) -> None:
    sample = transform(RAW[0], Address(0, 0, 0))
    assert sample.mask is not None
    assert (sample.image.shape, sample.image.dtype) == ((3, 12, 16), torch.uint8)
    assert (sample.mask.shape, sample.mask.dtype) == ((6, 8), torch.bool)
    assert sample.label == 3
    plain = dataclasses.replace(transform, mask=None, channels=1)
    sample = plain(dataclasses.replace(RAW[0], label=None), Address(0, 0, 0))
    assert sample.image.shape == (1, 12, 16)
    assert (sample.mask, sample.label) == (None, -1)


def test_training_is_a_pure_function_of_seed_epoch_and_sample() -> None:
    first = TRAIN(RAW[0], Address(2, 0, 0))
    TRAIN(RAW[1], Address(2, 0, 1))
    torch.manual_seed(1)
    again = pickle.loads(pickle.dumps(TRAIN))
    assert same(first, again(RAW[0], Address(2, 7, 9))) == (True, True)  # wherever it lies
    others = [
        TRAIN(RAW[0], Address(3, 0, 0)),
        TRAIN(RAW[1], Address(2, 0, 0)),
        dataclasses.replace(TRAIN, seed=6)(RAW[0], Address(2, 0, 0)),
        TRAIN(dataclasses.replace(RAW[0], key="9"), Address(2, 0, 0)),
        TRAIN(dataclasses.replace(RAW[0], shard_name="t"), Address(2, 0, 0)),
    ]
    assert [same(first, other) for other in others] == [(False, False)] * 5


def test_evaluation_is_the_same_in_every_epoch() -> None:
    first = EVALUATE(RAW[0], Address(0, 0, 0))
    assert same(first, EVALUATE(RAW[0], Address(4, 1, 1))) == (True, True)
    other_seed = dataclasses.replace(EVALUATE, seed=6)
    assert same(first, other_seed(RAW[0], Address(0, 0, 0))) == (True, False)


def test_the_mask_does_not_depend_on_the_crop() -> None:
    crop = dataclasses.replace(CROP, flip=0.0, scale=(1.0, 1.0))
    plain = dataclasses.replace(TRAIN, data=crop)
    first, second = TRAIN(RAW[0], Address(0, 0, 0)), plain(RAW[0], Address(0, 0, 0))
    assert same(first, second) == (False, True)


def test_no_randomness_is_taken_from_the_process() -> None:
    before = torch.get_rng_state()
    TRAIN(RAW[0], Address(0, 0, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_limits_reach_the_decoder() -> None:
    for transform in (TRAIN, EVALUATE):
        data = dataclasses.replace(transform.data, max_pixels=10)
        limited = dataclasses.replace(transform, data=data)
        with pytest.raises(DataError, match="the 10 allowed"):
            limited(RAW[0], Address(0, 0, 0))


def test_impossible_channels_are_refused_at_the_first_image() -> None:
    for transform in (TRAIN, EVALUATE):
        with pytest.raises(DataError, match="not 2: change in_channels"):
            dataclasses.replace(transform, channels=2)(RAW[0], Address(0, 0, 0))


def test_the_device_flips_the_chosen_images() -> None:
    flips = [TRAIN(raw, Address(epoch, 0, 0)).flip for raw in RAW for epoch in range(50)]
    assert 70 < sum(flips) < 130
    plain = dataclasses.replace(TRAIN, data=dataclasses.replace(CROP, flip=0.0))
    for epoch in range(4):
        flipped, straight = TRAIN(RAW[0], Address(epoch, 0, 0)), plain(RAW[0], Address(epoch, 0, 0))
        assert torch.equal(flipped.image, straight.image)
        assert not straight.flip
