"""Gaussian DP in closed form against high precision and against the certified accountant."""

import math

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_flash_attention.accounting import (
    GaussianRelease,
    compose_gdp,
    epsilon,
    gdp_delta,
    gdp_epsilon,
    gdp_mu,
)
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget


def precise_delta(mu, eps):
    with mpmath.workdps(60):
        mu, eps = mpmath.mpf(mu), mpmath.mpf(eps)
        return mpmath.ncdf(mu / 2 - eps / mu) - mpmath.exp(eps) * mpmath.ncdf(-mu / 2 - eps / mu)


@given(mu=st.floats(1e-3, 50.0), eps=st.floats(0.0, 800.0))
def test_delta_is_an_upper_bound_and_a_tight_one(mu, eps):
    exact = precise_delta(mu, eps)
    found = gdp_delta(mu=mu, epsilon=eps)
    above = mpmath.ncdf(mpmath.mpf(mu) / 2 - mpmath.mpf(eps) / mpmath.mpf(mu))
    assert found >= exact
    assert found <= exact + above * mpmath.mpf(10) ** -6 + mpmath.mpf(10) ** -300


@given(eps=st.floats(1e-3, 100.0), delta=st.floats(1e-12, 0.1))
def test_both_ways_agree_and_never_exceed_the_budget(eps, delta):
    mu = gdp_mu(PrivacyBudget(epsilon=eps, delta=delta))
    assert eps * (1 - 1e-6) < gdp_epsilon(mu=mu, delta=delta) <= eps
    assert gdp_delta(mu=mu, epsilon=eps) <= delta
    assert gdp_delta(mu=mu * 1.001, epsilon=eps) > delta


@pytest.mark.parametrize(("mu", "delta"), [(0.2, 1e-6), (1.0, 1e-5), (5.0, 1e-9)])
def test_the_certified_accountant_finds_no_less_and_hardly_more(mu, delta):
    exact = gdp_epsilon(mu=mu, delta=delta)
    assert exact <= epsilon(GaussianRelease(noise_multiplier=1.0 / mu), delta=delta) <= exact * 1.001


def test_published_values():
    # Dong, Roth & Su 2022: 1-GDP is (1, 0.127)-DP; ε = 0 gives the total variation distance.
    assert gdp_delta(mu=1.0, epsilon=1.0) == pytest.approx(0.1269, abs=1e-4)
    assert gdp_delta(mu=1.0, epsilon=0.0) == pytest.approx(math.erf(0.5 / math.sqrt(2.0)))
    assert gdp_epsilon(mu=1e-9, delta=0.5) == 0.0


def test_composition_rounds_up():
    assert compose_gdp([3.0, 4.0]) == 5.0
    assert compose_gdp([0.1] * 100) >= 1.0
    assert compose_gdp([0.1] * 100) == pytest.approx(1.0, rel=1e-12)


def test_values_out_of_range():
    for bad in ({"mu": 0.0, "epsilon": 1.0}, {"mu": 1.0, "epsilon": -1.0}, {"mu": 1.0, "epsilon": math.nan}):
        with pytest.raises(InvalidInputError):
            gdp_delta(**bad)
    with pytest.raises(InvalidInputError):
        gdp_epsilon(mu=1.0, delta=0.0)
