"""The checks themselves: their false-alarm rates, and that they notice what is near but wrong.

The mutations of the engine are in ``test_mutations.py``.
"""

from __future__ import annotations

import math

import pytest
import torch

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.training.verification import (
    Check,
    check_batch_sizes,
    check_inclusion_counts,
    check_noise_scale,
)


def test_a_check_that_measured_nothing_has_not_passed() -> None:
    assert Check(name="x", statistic=1.0, low=0.0, high=1.0).passed
    for statistic in (math.nan, math.inf, -0.1):
        assert not Check(name="x", statistic=statistic, low=0.0, high=1.0).passed


def test_the_noise_check_raises_false_alarms_as_often_as_it_says() -> None:
    alarms = sum(
        not check_noise_scale(torch.randn(50), stddev=1.0, false_alarm_rate=0.1).passed for _ in range(2000)
    )
    # 200 expected, deviation 13.4: outside of these bounds once in 10⁶.
    assert 134 < alarms < 266


def test_the_sampling_checks_raise_false_alarms_as_often_as_they_say() -> None:
    n, prob, steps = 400, 0.1, 60
    alarms = [0, 0]
    for _ in range(600):
        drawn = torch.rand(steps, n) < prob
        sizes = check_batch_sizes(
            drawn.sum(1).tolist(), num_records=n, sampling_prob=prob, false_alarm_rate=0.1
        )
        alarms[0] += not sizes.passed
        # Records here play the part of steps, with 400 · 0.1 · 0.9 = 36 of variance.
        counts = check_inclusion_counts(drawn.sum(1), num_steps=n, sampling_prob=prob, false_alarm_rate=0.1)
        alarms[1] += not counts.passed
    # 60 expected, deviation 7.3; the normal approximation may add some.
    assert all(25 < count < 100 for count in alarms)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_the_power_grows_with_the_samples(factor: float) -> None:
    assert not check_noise_scale(factor * torch.randn(10_000), stddev=1.0).passed


def test_a_rate_that_is_none_is_refused() -> None:
    for rate in (0.0, 1.0):
        with pytest.raises(InvalidInputError, match="false_alarm_rate"):
            check_noise_scale(torch.zeros(3), stddev=1.0, false_alarm_rate=rate)
