import math

import numpy as np
import pytest
from scipy.special import ive

from dp_flash_attention.accounting import skellam_epsilon, skellam_rdp, skellam_variance
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget


def divergence(order, variance, shift):
    """Rényi divergence of a shifted Skellam by direct summation; its law is e^−μ·I_|k|(μ)."""
    reach = math.ceil(20 * math.sqrt(variance)) + 40
    k = np.arange(-reach, reach + 1)
    first, second = (np.log(np.maximum(ive(np.abs(k - s), variance), 1e-290)) for s in (0, shift))
    return float(np.logaddexp.reduce(order * first + (1 - order) * second) / (order - 1))


@pytest.mark.parametrize(("variance", "shift"), [(4.0, 1), (25.0, 1), (25.0, 4), (100.0, 10), (400.0, 3)])
@pytest.mark.parametrize("order", [2, 3, 8])
def test_the_bound_holds_and_half_the_variance_breaks_it(variance, shift, order):
    true = divergence(order, variance, shift)
    assert true <= skellam_rdp(order, variance=variance, l2_sensitivity=shift, dimension=1)
    if variance >= 25:  # below, the theorem's correction is larger than a halved variance
        assert divergence(order, variance / 2, shift) > skellam_rdp(
            order, variance=variance, l2_sensitivity=shift, dimension=1
        )


def test_several_coordinates_add_up():
    variance, shift = 30.0, (1, 2, 2)
    true = sum(divergence(4, variance, s) for s in shift)
    assert true <= skellam_rdp(4, variance=variance, l2_sensitivity=3.0, dimension=3)


def test_wide_skellam_noise_costs_what_gaussian_noise_costs():
    # μ = 1e8: the correction term vanishes, ρ = Δ²/2μ.
    found = skellam_rdp(10, variance=1e8, l2_sensitivity=100.0, dimension=1)
    assert found == pytest.approx(10 * 100.0**2 / 2e8, rel=1e-4)


def test_the_published_formula_at_one_point():
    # Agarwal, Kairouz & Liu 2021, Corollary 4.1: α = 2, Δ₂ = 2, d = 9, μ = 10, Δ₁ = min(6, 4) = 4.
    expected = 2 * 4 / 20 + min((3 * 4 + 24) / 400, 12 / 20)
    assert skellam_rdp(2, variance=10.0, l2_sensitivity=2.0, dimension=9) == pytest.approx(expected)


@pytest.mark.parametrize("dimension", [1, 1000])
def test_the_calibrated_variance_meets_the_budget_and_is_not_wasteful(dimension):
    budget = PrivacyBudget(epsilon=1.0, delta=1e-6)
    variance = skellam_variance(budget=budget, l2_sensitivity=50.0, dimension=dimension)
    settings = {"delta": 1e-6, "l2_sensitivity": 50.0, "dimension": dimension}
    assert skellam_epsilon(variance=variance, **settings) <= 1.0
    assert skellam_epsilon(variance=0.99 * variance, **settings) > 1.0
    assert 4.2 < math.sqrt(variance) / 50.0 < 4.7


def test_two_releases_cost_more_than_one_and_less_than_twice_as_much():
    settings = {"delta": 1e-6, "variance": 1e4, "l2_sensitivity": 10.0, "dimension": 5}
    one = skellam_epsilon(**settings)
    assert one < skellam_epsilon(releases=2, **settings) < 2 * one


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"order": 1}, "order"),
        ({"variance": 0.0}, "variance"),
        ({"l2_sensitivity": math.inf}, "l2_sensitivity"),
    ],
)
def test_values_outside_their_range_are_named(change, name):
    good = {"order": 2, "variance": 1.0, "l2_sensitivity": 1.0, "dimension": 1}
    arguments = {**good, **change}
    with pytest.raises(InvalidInputError, match=name):
        skellam_rdp(arguments.pop("order"), **arguments)
