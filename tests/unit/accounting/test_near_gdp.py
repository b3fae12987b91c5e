"""What a distance to a Gaussian mechanism costs: against two worlds that are that far from it, and at its edges."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_flash_attention.accounting import gdp_delta, gdp_epsilon, near_gdp_delta, near_gdp_epsilon
from dp_flash_attention.accounting.near_gdp import distance_delta, less_distance
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget


def worst_delta(mu, eta, epsilon):
    """δ of the worst mechanism within eta of N(0, 1) against N(mu, 1): each world moves eta of its mass the bad way.

    Of the likelier world, eta goes from where it is less than e^ε times as likely to where it is more, and back in the
    other world: with P and Q on {more, less}, δ = P(more) − e^ε·Q(more) rises by eta and by e^ε·eta.
    """
    return gdp_delta(mu=mu, epsilon=epsilon) + eta + math.exp(epsilon) * eta


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("epsilon", [0.0, 1.0, 4.0])
def test_the_bound_is_attained_and_half_of_it_would_not_do(mu, epsilon):
    eta = 1e-5
    found = near_gdp_delta(mu=mu, distance=eta, epsilon=epsilon)
    assert found >= min(1.0, worst_delta(mu, eta, epsilon))
    assert found <= worst_delta(mu, eta, epsilon) * (1 + 1e-11)
    assert near_gdp_delta(mu=mu, distance=eta / 2, epsilon=epsilon) < worst_delta(mu, eta, epsilon)


@given(mu=st.floats(0.05, 5.0), log_delta=st.floats(-9.0, -2.0), share=st.floats(1e-9, 0.1))
def test_epsilon_is_where_delta_is_reached(mu, log_delta, share):
    delta = 10.0**log_delta
    ideal = gdp_epsilon(mu=mu, delta=delta)
    # At least half of delta is left at the epsilon that half of it takes.
    distance = share * delta / (1.0 + math.exp(gdp_epsilon(mu=mu, delta=delta / 2)))
    found = near_gdp_epsilon(mu=mu, distance=distance, delta=delta)
    assert near_gdp_delta(mu=mu, distance=distance, epsilon=found) <= delta
    assert found >= ideal
    if found > 0.0:  # and hardly less would not do
        assert near_gdp_delta(mu=mu, distance=distance, epsilon=found * (1 - 1e-9)) > delta * (1 - 1e-6)


def test_no_distance_costs_nothing():
    assert distance_delta(distance=0.0, epsilon=1.0) == 0.0
    assert near_gdp_delta(mu=1.0, distance=0, epsilon=1.0) == gdp_delta(mu=1.0, epsilon=1.0)
    assert near_gdp_epsilon(mu=1.0, distance=0, delta=1e-6) == gdp_epsilon(mu=1.0, delta=1e-6)


def test_a_delta_that_finite_precision_eats_is_refused():
    with pytest.raises(InvalidInputError, match="finite precision"):
        near_gdp_epsilon(mu=1.0, distance=1e-6, delta=1e-6)
    assert near_gdp_delta(mu=1.0, distance=1e-6, epsilon=900.0) == 1.0


def test_a_budget_less_its_distance():
    budget = PrivacyBudget(epsilon=1.0, delta=1e-6)
    left = less_distance(budget, distance=1e-10, largest_share=0.01)
    assert left.epsilon == 1.0
    assert left.delta == pytest.approx(1e-6 - (1 + math.e) * 1e-10, rel=1e-12)
    with pytest.raises(InvalidInputError, match=r"delta.*finite precision"):
        less_distance(budget, distance=1e-8, largest_share=0.01)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, None, True])
def test_a_distance_that_is_none_is_refused(bad):
    with pytest.raises(InvalidInputError, match="distance"):
        near_gdp_delta(mu=1.0, distance=bad, epsilon=1.0)
