import pickle

import numpy as np
import torch

from simmim.data.order.randomness import (
    numpy_stream,
    sample_bits,
    shuffled,
    stream_seed,
)
from simmim.data.transforms.image_transforms import torch_stream


def test_streams_are_the_same_in_every_release():
    """Written down once: another order would send resumed runs through other data."""
    assert stream_seed("epoch", 1, 2) == 0x476ACA28AD8F22E59FAC6F42C8108F99
    assert shuffled(8, "epoch", 1, 2).tolist() == [0, 4, 5, 1, 3, 6, 2, 7]
    assert numpy_stream("crop", 1, 2).bit_generator.random_raw(2).tolist() == [
        10488200484571559941,
        6296255618579580745,
    ]


def test_parts_of_a_key_are_kept_apart():
    keys = [("a", 1, 2), ("a", 12), ("a", 2, 1), ("b", 1, 2), ("a", "1", 2), ("a1", 2), ("a", 1)]
    assert len({stream_seed(*key) for key in keys}) == len(keys)


def test_a_shuffle_is_a_permutation():
    assert np.array_equal(np.sort(shuffled(1000, "epoch", 3)), np.arange(1000))
    assert shuffled(0, "epoch", 3).size == 0


def test_shuffles_are_fair():
    """Each number stands in each place equally often, within five standard deviations."""
    count, draws = 6, 6000
    places = np.zeros((count, count))
    for draw in range(draws):
        places[np.arange(count), shuffled(count, "fair", draw)] += 1
    deviation = (draws * (1 / count) * (1 - 1 / count)) ** 0.5
    assert np.abs(places - draws / count).max() < 5 * deviation


def test_streams_start_afresh_each_time():
    assert numpy_stream("crop", 1).random() == numpy_stream("crop", 1).random()
    first, second = torch_stream("mask", 1), torch_stream("mask", 1)
    assert torch.equal(torch.rand(4, generator=first), torch.rand(4, generator=second))
    assert numpy_stream("crop", 1).random() != numpy_stream("crop", 2).random()


def test_numbers_of_neighbouring_streams_are_even_and_independent():
    """First numbers of 20,000 streams: each tenth as often, pairs uncorrelated, within 5 sigma."""
    drawn = np.array([numpy_stream("crop", 1, number).random(2) for number in range(20_000)])
    counts = np.histogram(drawn[:, 0], bins=10, range=(0, 1))[0]
    assert np.abs(counts - 2000).max() < 5 * (2000 * 0.9) ** 0.5
    centred = drawn - 0.5
    for first, second in (
        (centred[:, 0], centred[:, 1]),
        (centred[1:, 0], centred[:-1, 0]),
    ):
        assert abs((first * second).mean()) < 5 / 12 / len(first) ** 0.5


def test_a_stream_survives_pickling():
    stream = numpy_stream("crop", 1)
    stream.random(3)
    assert pickle.loads(pickle.dumps(stream)).random() == stream.random()


def test_sample_bits_depend_on_the_key_and_look_random() -> None:
    keys = np.array([[epoch, 0, sample] for epoch in range(4) for sample in range(2000)])
    bits = sample_bits(3, "drop path", keys, 8)
    assert bits.shape == (8000, 8)
    assert len(np.unique(bits)) == bits.size
    assert np.array_equal(sample_bits(3, "drop path", keys[1234:1236], 8), bits[1234:1236])
    assert not np.array_equal(sample_bits(4, "drop path", keys, 8), bits)
    shares = (bits >> np.uint64(33)) / 2**31
    assert abs(shares.mean() - 0.5) < 0.01
    for column in range(1, 8):
        assert abs(np.corrcoef(shares[:, 0], shares[:, column])[0, 1]) < 0.05
    assert abs(np.corrcoef(shares[:-1, 0], shares[1:, 0])[0, 1]) < 0.05
    assert sample_bits(0, "drop path", np.zeros((0, 3), np.int64), 8).shape == (0, 8)
