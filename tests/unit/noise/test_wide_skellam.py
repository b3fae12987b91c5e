"""Wide Skellam noise: its law by two other ways, its coin, its margin. Fixed keys; false-alarm rates are 1e-4 over keys."""

import math
from decimal import Context, Decimal, localcontext
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from scipy import stats

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import TestKey, wide_skellam
from dp_flash_attention.noise import wide_sampler as module
from dp_flash_attention.noise.skellam import skellam_table
from dp_flash_attention.noise.wide_sampler import WideSampler
from dp_flash_attention.noise.wide_skellam import SkellamLaw, WideSkellam

ALARM = 1e-4
KEY = TestKey("wide skellam")
NARROWEST = Fraction(2**28)
VARIANCES = [NARROWEST, Fraction(2**38) + Fraction(1, 3), Fraction(2**80)]


def test_pi():
    with mpmath.workdps(150):
        assert mpmath.almosteq(mpmath.mpf(str(wide_skellam._pi())), mpmath.pi, rel_eps=mpmath.mpf(10) ** -148)


def test_the_law_is_that_of_the_recurrence():
    """The narrow table runs the recurrence of Bessel functions: no cosine, no sum over angles."""
    variance = Fraction(10**5)
    law, table = SkellamLaw(variance), skellam_table(variance)
    for y in (1, 2, 316, 1000, 3162):  # what rounding left over is in the mass of 0
        with localcontext(Context(prec=60)):
            assert abs(law.probability(y) * 2**128 - table.masses[table.largest + y]) < 2


def test_the_law_is_that_of_mpmath_s_bessel_functions():
    law = SkellamLaw(NARROWEST)
    with mpmath.workdps(60):
        mu = mpmath.mpf(2**28)
        for y in (0, 1000, 5 * 2**14):
            true = mpmath.besseli(y, mu) * mpmath.exp(-mu)
            assert mpmath.almosteq(mpmath.mpf(str(law.probability(y))), true, rel_eps=mpmath.mpf(10) ** -50)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_coin_is_inside_the_slack_of_the_gaussian_one_where_it_is_widest(variance):
    noise = WideSkellam(variance)
    law, k = noise._sampler._law, noise.multiplier
    gaps = []
    for a in (0, 1, 10, len(noise.table.masses) - 1):
        for u in (1, k // 2, k - 1):
            gamma = Fraction(u * (u + 2 * k * a)) / (2 * variance)
            with localcontext(Context(prec=60)):
                ideal = (-Decimal(gamma.numerator) / Decimal(gamma.denominator)).exp()
                gaps.append(abs(law.acceptance(k * a, u) - ideal))
    assert 0 < max(gaps) <= Decimal(law.slack)
    assert law.slack <= 2.0**-21


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_table_and_the_coin_make_the_law(variance):
    """Whatever the cell and the place in it: mass times coin over mass of zero is P(y)/P(0), to 80 bits."""
    noise = WideSkellam(variance)
    law, k = noise._law, noise.multiplier
    base = Fraction(noise.table.masses[0])
    for a, u in ((1, 0), (3, 5), (7, k - 1), (20, k // 3)):
        drawn = Fraction(noise.table.masses[a]) * Fraction(noise.acceptance(k * a, u)) / base
        true = Fraction(law.probability(k * a + u)) / Fraction(law.probability(0))
        assert abs(drawn / true - 1) < Fraction(1, 2**80)
    assert 0 < noise.total_variation < 2.0**-118


@pytest.mark.parametrize("variance", VARIANCES)
def test_what_is_drawn_has_the_law_and_its_neighbours_are_rejected(variance):
    num = 300_000
    values = WideSkellam(variance).draw(KEY, num, step=1) / math.sqrt(variance)
    # The kurtosis is 1/μ above the normal's, which no sample of this size shows.
    assert stats.kstest(values, "norm").pvalue > ALARM
    assert stats.kstest(1.02 * values, "norm").pvalue < ALARM
    score = (np.mean(values**2) - 1) / math.sqrt(2 / num)
    assert abs(score) < stats.norm.isf(ALARM / 2)


def test_sums_have_the_summed_variance():
    num, noise = 200_000, WideSkellam(NARROWEST)
    total = sum(noise.draw(KEY, num, step=step) for step in (2, 3, 4))
    assert abs(np.mean(total.astype(float) ** 2) / 3 / 2**28 - 1) / math.sqrt(2 / num) < 4


def test_the_exact_coin_decides_as_the_fast_one_and_is_reached(monkeypatch):
    noise = WideSkellam(Fraction(2**50))
    fast = noise.draw(KEY, 20_000, step=4)
    calls = {"_close_coin": 0, "_exact_coin": 0}
    for name in calls:
        coin = getattr(WideSampler, name)

        def counted(*arguments, name=name, coin=coin):
            calls[name] += 1
            return coin(*arguments)

        monkeypatch.setattr(WideSampler, name, counted)
    monkeypatch.setattr(module, "_CLOSE_FLOAT32", 0.002)
    monkeypatch.setattr(module, "_CLOSE", 0.001)
    assert np.array_equal(noise.draw(KEY, 20_000, step=4), fast)
    assert calls["_exact_coin"] > 30


def test_a_coin_of_the_gaussian_would_be_noticed_where_it_matters():
    """The two laws differ by about 1/μ: the exact coin tells them apart, and no sample could."""
    noise = WideSkellam(NARROWEST)
    k = noise.multiplier
    gamma = Fraction((k - 1) * (k - 1 + 2 * k * 5)) / (2 * NARROWEST)
    with localcontext(Context(prec=60)):
        gaussian = (-Decimal(gamma.numerator) / Decimal(gamma.denominator)).exp()
        assert abs(noise.acceptance(5 * k, k - 1) / gaussian - 1) > Decimal(2) ** -40


@pytest.mark.parametrize("variance", [Fraction(2**28) - 1, Fraction(2**91), 2**30, 1e10])
def test_a_variance_out_of_range_is_refused(variance):
    with pytest.raises(InvalidInputError, match="variance"):
        WideSkellam(variance)
