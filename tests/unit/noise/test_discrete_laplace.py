"""The exact sampler: its law, its determinism, its refusals."""

import math
from collections import Counter
from fractions import Fraction

import pytest
from scipy import stats

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import TestKey, discrete_laplace

KEY = TestKey("laplace")


def law(x, scale):
    """P(x) ∝ exp(-|x| / scale)."""
    ratio = math.exp(-1 / scale)
    return (1 - ratio) / (1 + ratio) * ratio ** abs(x)


def chi_square(counts, scale, total, reach):
    observed = [counts[x] for x in range(-reach, reach + 1)]
    expected = [total * law(x, scale) for x in range(-reach, reach + 1)]
    observed.append(total - sum(observed))
    expected.append(total - sum(expected))
    return stats.chisquare(observed, expected).pvalue


@pytest.mark.parametrize("scale", [Fraction(1, 2), Fraction(5, 3), 4])
def test_the_law_is_exact_and_a_neighbouring_one_is_rejected(scale):
    total, reach = 6000, 3
    counts = Counter(discrete_laplace(scale, key=KEY, step=step) for step in range(total))
    assert chi_square(counts, float(scale), total, reach) > 1e-4  # the false-alarm rate; the key is fixed
    assert chi_square(counts, float(scale) * 1.15, total, reach) < 1e-4


def test_the_same_position_gives_the_same_number():
    draws = [discrete_laplace(100.0, key=KEY, step=1, stream=s) for s in range(20)]
    assert draws == [discrete_laplace(100.0, key=KEY, step=1, stream=s) for s in range(20)]
    assert len(set(draws)) > 10


def test_a_float_is_the_number_it_is():
    assert discrete_laplace(0.1, key=KEY) == discrete_laplace(Fraction(0.1), key=KEY)


@pytest.mark.parametrize("scale", [0, -1, 0.0, math.inf, math.nan, True, "1", None, 1j])
def test_what_is_no_scale_is_refused(scale):
    with pytest.raises(InvalidInputError, match="scale"):
        discrete_laplace(scale, key=KEY)
