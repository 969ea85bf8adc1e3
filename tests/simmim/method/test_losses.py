import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from simmim.method.losses import (
    ElementwiseLoss,
    l1,
    l2,
    loss_function,
    masked_mean,
    mean_color_loss,
    smooth_l1,
)
from simmim.method.targets import (
    CACHED_VALUES,
    _window_sum,
    _window_sum_on_cpu,
    denormalise_target,
    normalise_target,
)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_losses_are_elementwise() -> None:
    prediction = torch.tensor([0.0, 0.5, 3.0])
    target = torch.tensor([0.0, 0.0, 1.0])
    assert l1(prediction, target).tolist() == [0.0, 0.5, 2.0]
    assert l2(prediction, target).tolist() == [0.0, 0.25, 4.0]
    assert smooth_l1(prediction, target).tolist() == [0.0, 0.125, 1.5]


def test_losses_are_found_by_name() -> None:
    assert [loss_function("l1"), loss_function("smooth_l1"), loss_function("l2")] == [
        l1,
        smooth_l1,
        l2,
    ]
    with pytest.raises(ValueError, match="choose l1, smooth_l1 or l2"):
        loss_function("huber")  # type: ignore[arg-type]


def test_masked_mean_counts_only_hidden_pixels() -> None:
    values = images(2, 3, 4, 5)
    hidden = torch.zeros(2, 4, 5, dtype=torch.bool)
    hidden[0, :2] = True
    expected = values[0, :, :2].sum() / (10 + 1e-5) / 3
    torch.testing.assert_close(masked_mean(values, hidden), expected)
    assert masked_mean(values, torch.zeros_like(hidden)) == 0


@pytest.mark.parametrize(("size", "window"), [((9, 13), 5), ((20, 6), 7), ((8, 8), 47)])
def test_targets_are_normalised_by_the_real_pixels_around_each(
    size: tuple[int, int], window: int
) -> None:
    image = 3 * images(2, 3, *size) + 5
    result = normalise_target(image, window)
    half = window // 2
    for row in range(size[0]):
        for column in range(size[1]):
            rows = slice(max(0, row - half), row + half + 1)
            columns = slice(max(0, column - half), column + half + 1)
            near = image[:, :, rows, columns].flatten(2)
            deviation = (near.var(dim=2, unbiased=True) + 1e-6).sqrt()
            expected = (image[:, :, row, column] - near.mean(dim=2)) / deviation
            torch.testing.assert_close(result[:, :, row, column], expected)


def reference_target(image: Tensor) -> Tensor:
    """SimMIM's own code."""
    pool = torch.nn.functional.avg_pool2d
    mean = pool(image, 47, 1, 23, count_include_pad=False)
    square = pool(image**2.0, 47, 1, 23, count_include_pad=False)
    count = pool(torch.ones_like(image), 47, 1, 23, count_include_pad=True) * 47**2
    variance = ((square - mean**2.0) * (count / (count - 1))).clamp(min=0.0)
    return (image - mean) / (variance + 1.0e-6) ** 0.5


def test_default_target_equals_the_reference_code() -> None:
    image = images(2, 3, 64, 96).float()
    expected = reference_target(image)
    torch.testing.assert_close(normalise_target(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "window"), [((9, 13), 5), ((60, 7), 47), ((1, 90), 47)])
def test_processors_and_other_devices_sum_over_the_same_windows(
    size: tuple[int, int], window: int
) -> None:
    values = images(2, 3, *size)
    torch.testing.assert_close(_window_sum_on_cpu(values, window), _window_sum(values, window))


def test_targets_of_a_processor_take_a_fraction_of_the_poolings_time() -> None:
    values = images(2, 3, 128, 128).float()

    def seconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(3):
            before = time.process_time()
            run()
            times.append(time.process_time() - before)
        return min(times)

    pooling = seconds(lambda: (_window_sum(values, 47), _window_sum(values, 47)))
    assert seconds(lambda: normalise_target(values)) < pooling / 3


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["8 bits", "a small part of 16 bits"])
def test_targets_are_precise_next_to_a_bright_pixel(scale: float) -> None:
    image = scale * images(1, 3, 64, 80) - 1.7
    image[..., 30, 40] += 10_000 * scale
    image = image.float().double()
    error = (normalise_target(image.float()) - reference_target(image)).abs()
    error[..., 7:54, 17:64] = 0  # the pixel is in these windows, and its square outweighs the rest
    assert error.max() < 2e-5


def test_neither_autocast_nor_reduced_precision_of_products_changes_targets() -> None:
    image = images(2, 3, 64, 64).float()
    expected = normalise_target(image)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(normalise_target(image), expected)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_the_target_of_an_image_does_not_depend_on_its_batch() -> None:
    batch = images(CACHED_VALUES // (3 * 64 * 64) + 2, 3, 64, 64).float()
    separate = torch.cat([normalise_target(image[None]) for image in batch])
    assert torch.equal(normalise_target(batch), separate)
    assert normalise_target(batch[:0]).shape == (0, 3, 64, 64)


def test_a_flat_image_has_a_flat_target() -> None:
    flat = torch.full((1, 3, 64, 64), 2.1179)
    assert normalise_target(flat).abs().max() < 1e-2


def test_half_precision_is_normalised_in_single() -> None:
    image = images(1, 3, 32, 32).bfloat16()
    assert normalise_target(image).dtype == torch.float32


def test_denormalising_undoes_normalising() -> None:
    image = images(2, 3, 30, 40)
    torch.testing.assert_close(denormalise_target(normalise_target(image), image), image)


@pytest.mark.parametrize("window", [0, 1, 46])
def test_invalid_windows_are_refused(window: int) -> None:
    with pytest.raises(ValueError, match="odd and at least 3"):
        normalise_target(images(1, 3, 8, 8), window)


@pytest.mark.parametrize("loss", [l1, smooth_l1, l2])
def test_mean_color_is_that_of_the_visible_pixels(loss: ElementwiseLoss) -> None:
    image = images(2, 3, 4, 4)
    hidden = torch.zeros(2, 4, 4, dtype=torch.bool)
    hidden[:, 1:3, 1:] = True
    color = torch.stack([image[0, :, ~hidden[0]].mean(dim=1), image[1, :, ~hidden[1]].mean(dim=1)])
    values = loss(color[:, :, None, None].expand_as(image), image)
    torch.testing.assert_close(mean_color_loss(image, hidden, loss), masked_mean(values, hidden))
    everywhere = torch.ones_like(hidden)
    over_all = mean_color_loss(image, hidden, loss, everywhere)
    torch.testing.assert_close(over_all, masked_mean(values, everywhere))
