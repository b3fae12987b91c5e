"""The distance of rounded from discrete Gaussians, against sums of both laws; what is drawn; its scale."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.noise.rounded_gaussian import RoundedGaussian, rounded_gaussian_distance

KEY = TestKey("rounded gaussian")


def summed_distance(s: float, added_variance: float = 1.0 / 12.0) -> float:
    """Total variation by summing both laws out to 12 s, in float64: good to about 1e-14."""
    reach = math.ceil(12.0 * s)
    cells = np.array([math.erfc((k - 0.5) / (s * math.sqrt(2.0))) for k in range(reach + 2)])
    upper = (cells[:-1] - cells[1:]) / 2.0  # P(round(sZ) = k) for k ≥ 0
    weights = np.exp(-(np.arange(reach + 1.0) ** 2) / (2.0 * (s * s + added_variance)))
    discrete = weights / (2.0 * weights.sum() - 1.0)
    gaps = np.abs(upper - discrete)
    return float(gaps.sum() - gaps[0] / 2.0)


@pytest.mark.parametrize("s", [2.0, 4.0, 8.0, 16.0, 32.0])
def test_the_bound_holds_and_is_not_idle(s):
    exact = summed_distance(s)
    assert exact < rounded_gaussian_distance(s) < (7.0 + 17.0 / s) * exact


def test_the_bound_is_of_fourth_order_and_falls():
    bounds = [rounded_gaussian_distance(2.0**k) for k in range(25)]
    assert all(high > 15.9 * low for high, low in itertools.pairwise(bounds))
    assert rounded_gaussian_distance(2.0**20) < 3e-27


@pytest.mark.parametrize("added", [0.0, 1.0 / 6.0])
def test_a_discrete_gaussian_of_another_variance_breaks_the_bound(added):
    # Without Sheppard's 1/12 the distance is of second order, and 1e-4 at s = 16 for 1e-7.
    assert summed_distance(16.0, added) > 500 * rounded_gaussian_distance(16.0)


def test_against_fifty_digits():
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(50):
        s = mpmath.mpf(200)
        variance = s * s + mpmath.mpf(1) / 12
        total = mpmath.sqrt(2 * mpmath.pi * variance)  # up to exp(−2π²·variance)
        distance, above = mpmath.mpf(0), mpmath.ncdf(mpmath.mpf(-1) / (2 * s))
        for k in range(2400):
            below = mpmath.ncdf(-(k + mpmath.mpf(1) / 2) / s)
            previous, above = above if k else mpmath.ncdf(mpmath.mpf(1) / (2 * s)), below
            gap = abs(previous - below - mpmath.exp(-mpmath.mpf(k * k) / (2 * variance)) / total)
            distance += gap / 2 if k == 0 else gap
        bound = rounded_gaussian_distance(200.0)
        assert distance < bound < 7.2 * distance


def test_the_variance_is_never_below_the_one_asked_for():
    for s in (64.0, 1000.3, 2.0**20 + 0.25, 1.35e7):
        noise = RoundedGaussian(s)
        assert 0 <= noise.variance - Fraction(1, 12) - Fraction(s) ** 2 < 1
        assert (
            rounded_gaussian_distance(s) <= noise.total_variation <= rounded_gaussian_distance(s) + 2.0**-100
        )


def test_what_is_drawn_depends_on_key_step_and_stream_alone():
    noise = RoundedGaussian(2.0**20)
    drawn = noise.draw(KEY, 1000, step=3, stream=1)
    assert np.array_equal(drawn, RoundedGaussian(2.0**20).draw(KEY, 2000, step=3, stream=1)[:1000])
    for other in (
        noise.draw(KEY, 1000, step=4, stream=1),
        noise.draw(KEY, 1000, step=3, stream=2),
        noise.draw(TestKey("another"), 1000, step=3, stream=1),
    ):
        assert (drawn != other).mean() > 0.99


@pytest.mark.parametrize("stddev", [0.0, -1.0, 1.0, math.nan, math.inf, 2.0**46])
def test_what_is_out_of_range_is_refused(stddev):
    with pytest.raises(InvalidInputError):
        RoundedGaussian(stddev)
