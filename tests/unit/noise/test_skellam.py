"""The table against independent arithmetic, and the numbers drawn from it. Fixed keys; false-alarm rate 1e-4."""

import math
from collections import Counter
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from scipy import stats

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.noise.skellam import skellam, skellam_table

ALARM = 1e-4


@pytest.mark.parametrize("variance", [Fraction(1, 3), Fraction(7, 2), Fraction(100), Fraction(2500)])
def test_the_masses_are_those_of_bessels_functions(variance):
    table = skellam_table(variance)
    assert sum(table.masses) == 2**128
    assert table.masses == table.masses[::-1]
    with mpmath.workdps(60):
        mu = mpmath.mpf(variance.numerator) / variance.denominator
        places = range(table.largest + 1) if table.largest < 120 else range(0, table.largest + 1, 37)
        ideal = {k: mpmath.exp(-mu) * mpmath.besseli(k, mu) for k in places}
        errors = [
            abs(ideal[k] - mpmath.mpf(table.masses[table.largest + k]) / mpmath.mpf(2) ** 128) for k in places
        ]
        assert all(error <= 0.51 * mpmath.mpf(2) ** -128 for error in errors[1:])
        if table.largest < 120:  # every mass was looked at: the distance itself
            beyond = sum(mpmath.exp(-mu) * mpmath.besseli(table.largest + j, mu) for j in range(1, 40))
            distance = (errors[0] + 2 * sum(errors[1:]) + 2 * beyond) / 2
            assert distance <= table.total_variation <= 1.001 * distance + mpmath.mpf("1e-54")
    assert table.total_variation < 2.0**-110


@pytest.mark.parametrize("variance", [Fraction(7, 2), Fraction(100)])
def test_the_law_of_what_is_drawn_and_its_neighbours_are_rejected(variance):
    num = 100_000
    counts = Counter(skellam(num, variance=variance, key=TestKey("law"), step=3).tolist())

    def p_value(mu):
        reach = np.arange(-60, 61)
        expected = num * stats.skellam.pmf(reach, mu / 2, mu / 2)
        common = expected >= 5
        seen = np.array([counts[int(k)] for k in reach[common]], dtype=float)
        return stats.chisquare(
            np.append(seen, num - seen.sum()), np.append(expected[common], num - expected[common].sum())
        ).pvalue

    assert p_value(float(variance)) > ALARM
    assert p_value(1.05 * float(variance)) < ALARM


def test_sums_have_the_summed_variance_and_half_of_it_is_rejected():
    num, parties = 50_000, 5
    total = sum(skellam(num, variance=Fraction(8), key=TestKey(f"party {i}"), step=0) for i in range(parties))
    score = (np.mean(total.astype(float) ** 2) / 40.0 - 1.0) / math.sqrt((2 + 1 / 40) / num)
    bound = stats.norm.isf(ALARM / 2)
    assert abs(score) < bound
    assert abs(np.mean(total.astype(float) ** 2) / 20.0 - 1.0) / math.sqrt(2 / num) > bound


def test_words_that_tie_with_a_threshold_are_decided_by_their_lower_half(monkeypatch):
    table = skellam_table(Fraction(2))
    first = table.masses[0]
    below, at = first - 1, first  # the last word of the first entry, and the first of the next
    words = np.array([below >> 64, below & (2**64 - 1), at >> 64, at & (2**64 - 1)], dtype=np.uint64)
    monkeypatch.setattr("dp_flash_attention.noise.bits.SecureBits.uint64", lambda self, n, **_: words[:n])
    drawn = skellam(2, variance=Fraction(2), key=TestKey("tie"), step=0)
    assert drawn.tolist() == [-table.largest, -table.largest + 1]


def test_positions_and_variances_are_independent_and_repeatable():
    def draw(variance=Fraction(100), step=0, stream=0):
        return skellam(50, variance=variance, key=TestKey("p"), step=step, stream=stream).tolist()

    assert draw() == draw()
    assert (
        len({tuple(draw()), tuple(draw(step=1)), tuple(draw(stream=1)), tuple(draw(variance=Fraction(101)))})
        == 4
    )


@pytest.mark.parametrize("variance", [Fraction(1, 100), Fraction(2**33), 4, 4.0, Fraction(-1)])
def test_what_is_no_variance_is_refused(variance):
    with pytest.raises(InvalidInputError, match="variance"):
        skellam_table(variance)
