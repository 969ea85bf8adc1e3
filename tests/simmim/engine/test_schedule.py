import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmim.engine.schedule import learning_rate
from simmim.engine.settings import ScheduleSettings

IMAGENET = 1_281_167


def rate(schedule: ScheduleSettings, step: int, **changed: Any) -> float:
    sizes: dict[str, Any] = {"peak": 1e-3, "total_steps": 1000, "steps_per_epoch": 10.0}
    return learning_rate(schedule, step, **(sizes | changed))


def build(kind: Any, **values: Any) -> ScheduleSettings:
    if kind == "multistep":
        values["milestones"] = (60.0, 90.0)
    return ScheduleSettings(kind=kind, **values)


KINDS = pytest.mark.parametrize("kind", ["cosine", "linear", "multistep"])


@KINDS
@pytest.mark.parametrize("warmup", [{"warmup_steps": 200}, {"warmup_epochs": 20.0}])
def test_warm_up_is_linear_from_warmup_lr_to_the_peak(kind: Any, warmup: dict[str, Any]) -> None:
    schedule = build(kind, warmup_lr=1e-5, **warmup)
    rates = [rate(schedule, step) for step in range(200)]
    assert rates[0] == 1e-5
    for step, value in enumerate(rates):
        assert value == pytest.approx(1e-5 + (1e-3 - 1e-5) * step / 200, rel=1e-12)


@KINDS
def test_decay_counts_from_step_0_not_from_the_end_of_warm_up(kind: Any) -> None:
    warm, cold = build(kind, warmup_steps=200), build(kind)
    assert [rate(warm, step) for step in range(200, 1000)] == [
        rate(cold, step) for step in range(200, 1000)
    ]


@KINDS
def test_training_without_warm_up_starts_at_the_peak(kind: Any) -> None:
    assert rate(build(kind), 0) == pytest.approx(1e-3)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@given(warmup=st.integers(0, 500), floor=st.floats(0, 1e-3))
def test_cosine_and_linear_decay_to_min_lr(kind: Any, warmup: int, floor: float) -> None:
    schedule = ScheduleSettings(kind=kind, warmup_steps=warmup, min_lr=floor)
    rates = [rate(schedule, step) for step in range(warmup, 1001)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
    assert rates[-1] == pytest.approx(floor, abs=1e-15)
    assert rate(schedule, 5000) == pytest.approx(floor, abs=1e-15)


def test_cosine_is_half_way_in_the_middle() -> None:
    schedule = ScheduleSettings(min_lr=2e-4)
    assert rate(schedule, 500) == pytest.approx((1e-3 + 2e-4) / 2)
    assert rate(schedule, 250) == pytest.approx(2e-4 + 8e-4 * (1 + math.sqrt(0.5)) / 2)


def test_multistep_multiplies_at_each_milestone() -> None:
    schedule = build("multistep", gamma=0.5)
    assert {rate(schedule, step) for step in range(600)} == {1e-3}
    assert {rate(schedule, step) for step in range(600, 900)} == {5e-4}
    assert {rate(schedule, step) for step in range(900, 1000)} == {2.5e-4}


@given(
    step=st.integers(0, 2000), warmup=st.integers(0, 1500), kind=st.sampled_from(["c", "l", "m"])
)
def test_every_rate_is_between_the_extremes(step: int, warmup: int, kind: str) -> None:
    names = {"c": "cosine", "l": "linear", "m": "multistep"}
    schedule = build(names[kind], warmup_steps=warmup, warmup_lr=1e-6, min_lr=1e-6)
    assert 1e-6 * (1 - 1e-9) <= rate(schedule, step) <= 1e-3


# The recipes of FACTS, section 2: at batch 2048 warm-up starts at 5e-7 x 4.
BASE_100 = ScheduleSettings(warmup_epochs=10, warmup_lr=2e-6, min_lr=4e-5)
BASE_800 = ScheduleSettings(
    kind="multistep", milestones=(700.0,), gamma=0.1, warmup_epochs=10, warmup_lr=2e-6
)


@pytest.mark.parametrize(
    ("schedule", "peak", "epochs", "epoch", "expected"),
    [
        (BASE_100, 8e-4, 100, 0, 2e-6),
        (BASE_100, 8e-4, 100, 5, (2e-6 + 8e-4) / 2),
        (BASE_100, 8e-4, 100, 10, 4e-5 + 7.6e-4 * (1 + math.cos(math.pi / 10)) / 2),
        (BASE_100, 8e-4, 100, 50, 4.2e-4),
        (BASE_100, 8e-4, 100, 100, 4e-5),
        (BASE_800, 4e-4, 800, 0, 2e-6),
        (BASE_800, 4e-4, 800, 10, 4e-4),
        (BASE_800, 4e-4, 800, 699, 4e-4),
        (BASE_800, 4e-4, 800, 701, 4e-5),
        (BASE_800, 4e-4, 800, 799, 4e-5),
    ],
)
def test_published_recipes(
    schedule: ScheduleSettings, peak: float, epochs: int, epoch: int, expected: float
) -> None:
    steps_per_epoch = IMAGENET / 2048
    value = learning_rate(
        schedule,
        round(epoch * steps_per_epoch),
        peak=peak,
        total_steps=round(epochs * steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
    )
    assert value == pytest.approx(expected, rel=2e-3)
