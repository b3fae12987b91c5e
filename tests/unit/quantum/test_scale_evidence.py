"""The false-alarm rate that is stated is the one that holds, and the wrong scale is rejected."""

import numpy as np
import pytest
from scipy.stats import chi2

from dp_flash_attention.quantum.scale_evidence import FALSE_ALARM, mean_square_bounds, scale_row


def _holds(mean_square, num):
    """The verdict on ``num`` values whose mean square is ``mean_square``."""
    return scale_row("planted", np.full(num, mean_square**0.5), 1.0).holds


@pytest.mark.parametrize("num", [100, 4_000, 20_000])
def test_the_stated_rate_is_the_probability_of_leaving_the_bounds(num):
    low, high = mean_square_bounds(num, FALSE_ALARM)
    assert chi2.cdf(low * num, num) + chi2.sf(high * num, num) == pytest.approx(FALSE_ALARM, rel=1e-6)


def test_the_row_uses_these_bounds_and_not_the_normal_law_s():
    """At 4,000 numbers the normal approximation, ±6.109·√(2/n), has the rate 1.3e-9 or more."""
    num = 4_000
    low, high = mean_square_bounds(num, FALSE_ALARM)
    normal = 6.109410204869 * (2.0 / num) ** 0.5
    assert chi2.cdf((1 - normal) * num, num) + chi2.sf((1 + normal) * num, num) > 1.2 * FALSE_ALARM
    assert _holds(low * 1.0001, num)
    assert _holds(high * 0.9999, num)
    assert not _holds(low * 0.9999, num)
    assert not _holds(high * 1.0001, num)
    assert low < 1 - normal * 0.9  # each side is off by itself: both are pinned
    assert high > 1 + normal * 1.01


def test_a_wrong_scale_fails():
    noise = np.random.default_rng(7).normal(size=20_000)
    assert scale_row("right", noise, 1.0).holds
    assert not scale_row("a tenth too small", noise * 0.9, 1.0).holds
