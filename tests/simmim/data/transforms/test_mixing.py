"""Mixup and CutMix of neighbours, independent of how the batch is divided."""

import numpy as np
import pytest
import torch

from simmim.data.transforms.mixing import Mixes, draw_mixes, mix, partners
from simmim.data.transforms.settings import AugmentationSettings

SIZE = (12, 10)
PAPER = AugmentationSettings(mixup=0.8, cutmix=1.0)


def addresses(count: int, epoch: int = 0) -> torch.Tensor:
    return torch.tensor([[epoch, number // 7, number % 7] for number in range(count)])


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def test_parts_of_a_batch_are_mixed_as_the_whole() -> None:
    whole, batch = draw_mixes(PAPER, 5, addresses(16), SIZE), images(16)
    together = mix(batch, whole)
    for part in (2, 4, 8):
        pieces = [
            mix(batch[at : at + part], draw_mixes(PAPER, 5, addresses(16)[at : at + part], SIZE))
            for at in range(0, 16, part)
        ]
        assert torch.equal(torch.cat(pieces), together)


def test_seed_and_epoch_decide() -> None:
    drawn = draw_mixes(PAPER, 5, addresses(16), SIZE)
    assert torch.equal(draw_mixes(PAPER, 5, addresses(16), SIZE).shares, drawn.shares)
    assert not torch.equal(draw_mixes(PAPER, 6, addresses(16), SIZE).shares, drawn.shares)
    assert not torch.equal(draw_mixes(PAPER, 5, addresses(16, 1), SIZE).shares, drawn.shares)


def test_shares_are_those_of_the_pixels() -> None:
    batch = torch.zeros(400, 1, *SIZE)
    batch[::2] = 1.0  # so that a mixed image's mean is the share of the first of its pair
    for settings in (PAPER, AugmentationSettings(mixup=0.8), AugmentationSettings(cutmix=1.0)):
        mixes = draw_mixes(settings, 5, addresses(400), SIZE)
        means = mix(batch, mixes).mean(dim=(1, 2, 3))
        own = torch.where(torch.arange(400) % 2 == 0, means, 1 - means)
        torch.testing.assert_close(own, mixes.shares, rtol=0, atol=1e-6)
        assert torch.equal(mixes.shares[::2], mixes.shares[1::2])
        assert 0.4 < float(mixes.shares.mean()) < 0.75  # boxes lose what lies outside


def test_cutmix_pastes_and_mixup_blends() -> None:
    batch = images(64)
    cut = mix(batch, draw_mixes(AugmentationSettings(cutmix=1.0), 5, addresses(64), SIZE))
    either = (cut == batch) | (cut == partners(batch))
    assert bool(either.all())
    mixes = draw_mixes(AugmentationSettings(mixup=0.8), 5, addresses(64), SIZE)
    shares = mixes.shares.view(-1, 1, 1, 1)
    expected = shares * batch + (1 - shares) * partners(batch)
    torch.testing.assert_close(mix(batch, mixes), expected)
    assert not mixes.boxes.any()


def test_probability_and_switch() -> None:
    half = AugmentationSettings(mixup=0.8, cutmix=1.0, mix_probability=0.5, mix_switch=0.25)
    mixes = draw_mixes(half, 5, addresses(4000), SIZE)
    untouched = float((mixes.shares == 1).float().mean())
    cut = float(mixes.boxes.any(dim=1).float().mean())
    assert untouched == pytest.approx(0.5, abs=0.05)
    assert cut == pytest.approx(0.5 * 0.25, abs=0.03)


def test_mixups_shares_are_of_the_beta_distribution() -> None:
    mixes = draw_mixes(AugmentationSettings(mixup=0.8), 5, addresses(4000), SIZE)
    shares = mixes.shares[::2].double()
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(shares.var()) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)


def test_the_last_image_of_an_odd_batch_is_unchanged() -> None:
    batch = images(5)
    mixes = draw_mixes(PAPER, 5, addresses(5), SIZE)
    assert torch.equal(mix(batch, mixes)[4], batch[4])
    assert float(mixes.shares[4]) == 1
    assert partners(torch.arange(5)).tolist() == [1, 0, 3, 2, 4]


def test_a_given_box_is_pasted_by_hand() -> None:
    batch = images(2)
    box = torch.tensor([[2, 5, 1, 9]] * 2)
    share = 1 - 3 * 8 / (12 * 10)
    found = mix(batch, Mixes(shares=torch.tensor([share] * 2), boxes=box)).numpy()
    expected = batch.numpy().copy()
    expected[0, :, 2:5, 1:9], expected[1, :, 2:5, 1:9] = (
        batch.numpy()[1, :, 2:5, 1:9],
        batch.numpy()[0, :, 2:5, 1:9],
    )
    assert np.array_equal(found, expected)
