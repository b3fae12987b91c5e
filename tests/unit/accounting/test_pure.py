import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_flash_attention.accounting import (
    basic_composition,
    discrete_laplace_epsilon,
    discrete_laplace_scale,
    split_budget,
)
from dp_flash_attention.core.errors import InvalidInputError


@given(epsilon=st.floats(1e-6, 100.0), fraction=st.floats(1e-4, 0.9))
def test_the_parts_of_a_budget_never_exceed_it(epsilon, fraction):
    split = split_budget(epsilon=epsilon, delta=1e-6, count_fraction=fraction)
    assert split.epsilon_count + split.training.epsilon <= epsilon
    assert split.total.epsilon == pytest.approx(epsilon, rel=1e-12)
    assert split.training.delta == split.total.delta == 1e-6


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 0.1)), min_size=1, max_size=20))
def test_basic_composition_is_an_upper_bound_of_the_exact_sum(parts):
    eps, delta = basic_composition(parts)
    exact = sum(Fraction(e) for e, _ in parts)
    assert Fraction(eps) >= exact
    assert Fraction(delta) >= sum(Fraction(d) for _, d in parts)
    assert eps <= math.nextafter(math.nextafter(float(exact), math.inf), math.inf)


@given(epsilon=st.floats(1e-6, 50.0), sensitivity=st.integers(1, 100))
def test_the_scale_gives_at_most_the_epsilon_asked_for(epsilon, sensitivity):
    scale = discrete_laplace_scale(epsilon=epsilon, l1_sensitivity=sensitivity)
    back = discrete_laplace_epsilon(scale=scale, l1_sensitivity=sensitivity)
    assert back <= epsilon
    assert back == pytest.approx(epsilon, rel=1e-12)


@pytest.mark.parametrize("scale", [0.7, 3.0])
def test_the_epsilon_is_the_largest_log_ratio_of_the_two_distributions(scale):
    support = range(-200, 201)
    ratios = [abs(abs(k) - abs(k - 1)) / scale for k in support]
    assert max(ratios) == pytest.approx(discrete_laplace_epsilon(scale=scale))


@pytest.mark.parametrize("bad", [(-1.0, 0.0), (math.inf, 0.0), (1.0, 1.0), (1.0, -0.1), (math.nan, 0.0)])
def test_pairs_outside_their_range_are_refused(bad):
    with pytest.raises(InvalidInputError, match="parts"):
        basic_composition([(1.0, 0.0), bad])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: split_budget(epsilon=0.0, delta=1e-6), "epsilon"),
        (lambda: split_budget(epsilon=1.0, delta=1.0), "delta"),
        (lambda: split_budget(epsilon=1.0, delta=1e-6, count_fraction=1.0), "count_fraction"),
        (lambda: discrete_laplace_scale(epsilon=-1.0), "epsilon"),
        (lambda: discrete_laplace_epsilon(scale=0.0), "scale"),
        (lambda: discrete_laplace_epsilon(scale=1.0, l1_sensitivity=0), "l1_sensitivity"),
    ],
)
def test_values_outside_their_range_are_named(call, name):
    with pytest.raises(InvalidInputError, match=name):
        call()
