import math
from fractions import Fraction

import pytest
from dp_accounting.pld.privacy_loss_mechanism import DiscreteGaussianPrivacyLoss

from dp_flash_attention.accounting import discrete_gaussian_delta
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget
from dp_flash_attention.quantum.gaussian_plan import plan_gaussian

BUDGET = PrivacyBudget(epsilon=1.0, delta=1e-6)
ADVANTAGE = 2.0**-120


def plan(**changes):
    arguments = {
        "dimension": 1,
        "whole": True,
        "l2_sensitivity": 1.0,
        "budget": BUDGET,
        "grid": None,
        "advantage": ADVANTAGE,
    }
    return plan_gaussian(**{**arguments, **changes})


@pytest.mark.parametrize(("sensitivity", "eps"), [(1.0, 1.0), (3.0, 0.5), (7.0, 2.0)])
def test_a_count_costs_what_dp_accounting_says_plus_the_stated_terms(sensitivity, eps):
    found = plan(l2_sensitivity=sensitivity, budget=PrivacyBudget(epsilon=eps, delta=1e-6))
    sigma = math.sqrt(float(found.variance))
    theirs = DiscreteGaussianPrivacyLoss(sigma, sensitivity=int(sensitivity)).get_delta_for_epsilon(eps)
    assert found.delta.ideal == pytest.approx(theirs, rel=1e-6)
    factor = 1 + math.exp(eps)
    assert found.delta.generator == pytest.approx(factor * ADVANTAGE)
    assert 0 < found.delta.sampler < factor * 2.0**-100
    parts = found.delta.ideal + found.delta.sampler + found.delta.generator
    assert parts <= found.delta.total <= 1e-6


@pytest.mark.parametrize("dimension", [1, 1000, 10_000_000])
def test_the_whole_delta_keeps_to_the_budget_and_rounding_is_paid_for(dimension):
    found = plan(dimension=dimension, whole=False)
    assert found.delta.total <= 1e-6
    moved = 1.0 / found.grid + math.sqrt(dimension)
    assert found.grid_sensitivity == pytest.approx(moved, rel=1e-4)
    # Without the √d of rounding, δ at the planned noise would be smaller than what is charged.
    careless = discrete_gaussian_delta(
        epsilon=1.0,
        sigma=math.sqrt(float(found.variance)),
        l2_sensitivity=1.0 / found.grid,
        dimension=dimension,
    )
    assert careless < 0.95 * found.delta.ideal
    assert found.rho == pytest.approx(moved**2 / (2 * float(found.variance)), rel=2e-4)


def test_a_coarse_grid_costs_noise_and_too_coarse_a_one_is_refused():
    fine, coarse = (
        plan(dimension=64, whole=False, grid=2.0**-10),
        plan(dimension=64, whole=False, grid=2.0**-4),
    )
    assert coarse.noise_stddev > 1.4 * fine.noise_stddev
    with pytest.raises(InvalidInputError, match="grid"):
        plan(dimension=64, whole=False, grid=2.0**-2)


def test_a_grid_too_fine_for_exact_floats_is_refused():
    with pytest.raises(InvalidInputError, match="wide"):
        plan(whole=False, grid=2.0**-52)


def test_a_delta_below_what_finite_precision_costs_is_refused():
    with pytest.raises(InvalidInputError, match="finite precision"):
        plan(budget=PrivacyBudget(epsilon=1.0, delta=1e-29), advantage=1e-29)
    with pytest.raises(InvalidInputError, match="delta"):
        plan(budget=PrivacyBudget(epsilon=100.0, delta=1e-6), dimension=10**6, whole=False)


def test_the_variance_is_a_short_fraction_that_is_never_too_small():
    found = plan(l2_sensitivity=3.0)
    assert isinstance(found.variance, Fraction)
    assert found.variance.denominator <= 2**17
    assert (
        discrete_gaussian_delta(
            epsilon=1.0, sigma=math.sqrt(float(found.variance)) * 0.999, l2_sensitivity=3.0
        )
        > found.delta.ideal
    )
