"""Exact coins and the centred discrete Gaussian. Fixed keys; each test's false-alarm rate is 1e-4 over keys."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.quantum.rational_sampler import RationalCoins, centred_discrete_gaussian

ALARM = 1e-4


def p_value(draws, sigma, centre):
    reach = np.arange(math.floor(centre - 12 * sigma), math.ceil(centre + 12 * sigma) + 1)
    law = np.exp(-0.5 * ((reach - centre) / sigma) ** 2)
    expected = len(draws) * law / law.sum()
    counts = Counter(draws)
    common = expected >= 5
    seen = np.array([counts[int(x)] for x in reach[common]], dtype=float)
    rest = expected[~common].sum()
    if rest > 1e-3:
        return stats.chisquare(
            np.append(seen, len(draws) - seen.sum()), np.append(expected[common], rest)
        ).pvalue
    return stats.chisquare(seen, expected[common] * seen.sum() / expected[common].sum()).pvalue


@pytest.mark.parametrize(
    ("variance", "centre"),
    [(Fraction(9), Fraction(0)), (Fraction(25, 4), Fraction(7, 20)), (Fraction(1, 3), Fraction(-5, 2))],
)
def test_the_law_is_right_and_its_neighbours_are_rejected(variance, centre):
    coins = RationalCoins(TestKey(f"{variance} {centre}"))
    draws = [centred_discrete_gaussian(coins, variance=variance, centre=centre) for _ in range(5000)]
    sigma, middle = math.sqrt(variance), float(centre)
    assert p_value(draws, sigma, middle) > ALARM
    assert p_value(draws, 1.2 * sigma, middle) < ALARM
    assert p_value(draws, sigma, middle + 0.3 * max(1.0, sigma / 2)) < ALARM


@pytest.mark.parametrize("gamma", [Fraction(0), Fraction(1, 3), Fraction(1), Fraction(13, 5)])
def test_a_coin_shows_heads_as_often_as_it_should(gamma):
    coins, num = RationalCoins(TestKey(str(gamma))), 4000
    heads = sum(coins.exp_minus(gamma) for _ in range(num))
    assert stats.binomtest(heads, num, math.exp(-gamma)).pvalue > ALARM
    if gamma:
        assert stats.binomtest(heads, num, math.exp(-1.3 * float(gamma))).pvalue < ALARM


def test_whole_numbers_below_a_bound_are_uniform_also_above_one_word():
    coins, bound = RationalCoins(TestKey("below")), 3 * 2**70
    thirds = Counter(coins.below(bound) // 2**70 for _ in range(3000))
    assert set(thirds) == {0, 1, 2}
    assert stats.chisquare(list(thirds.values())).pvalue > ALARM
    assert coins.below(1) == 0


def test_steps_are_independent_and_repeatable():
    def draws(step):
        coins = RationalCoins(TestKey("steps"), step=step)
        return [centred_discrete_gaussian(coins, variance=Fraction(100)) for _ in range(30)]

    assert draws(0) == draws(0) != draws(1)


def test_a_variance_of_nothing_is_refused():
    with pytest.raises(InvalidInputError, match="variance"):
        centred_discrete_gaussian(RationalCoins(TestKey("x")), variance=Fraction(0))
