import math

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_mechanism import DiscreteGaussianPrivacyLoss
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_flash_attention.accounting import (
    GaussianRelease,
    concentrated_delta,
    discrete_gaussian_delta,
    discrete_gaussian_epsilon,
    discrete_gaussian_rho,
    discrete_gaussian_sigma,
    epsilon,
)
from dp_flash_attention.accounting.discrete_gaussian import (
    _smoothing_delta,
    gaussian_delta,
    smoothing_error,
)
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget


def law(sigma, reach):
    mass = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return mass / mass.sum()


def vector_delta(eps, sigma, shift):
    """δ of a vector by brute force: the privacy loss Σ(v_j² + 2·v_j·Y_j)/2σ² has a law that can be summed."""
    reach = math.ceil(12 * sigma)
    one = law(sigma, reach)
    grids = np.meshgrid(*[np.arange(-reach, reach + 1)] * len(shift), indexing="ij")
    mass = np.ones_like(grids[0], dtype=float)
    loss = np.zeros_like(mass)
    for grid, v in zip(grids, shift, strict=True):
        mass = mass * one[grid + reach]
        loss = loss + (v * v + 2.0 * v * grid) / (2.0 * sigma**2)
    return float(np.sum(mass * np.maximum(0.0, 1.0 - np.exp(eps - loss))))


@pytest.mark.parametrize(
    ("sigma", "shift", "eps"),
    [
        (1, 1, 1.0),
        (4, 1, 1.0),
        (4, 1, 0.1),
        (0.5, 1, 2.0),
        (30, 5, 1.0),
        (30, 7, 0.5),
        (2, 3, 5.0),
        (0.3, 2, 4.0),
    ],
)
def test_one_coordinate_equals_the_figure_of_dp_accounting(sigma, shift, eps):
    theirs = DiscreteGaussianPrivacyLoss(sigma, sensitivity=shift).get_delta_for_epsilon(eps)
    ours = discrete_gaussian_delta(epsilon=eps, sigma=sigma, l2_sensitivity=shift)
    assert theirs <= ours * (1 + 1e-12)
    assert ours == pytest.approx(theirs, rel=1e-7, abs=1e-25)


def test_the_sigma_that_dp_accounting_finds_for_one_budget():
    class Budget:
        epsilon, delta = 1.0, 1e-6

    theirs = DiscreteGaussianPrivacyLoss.from_privacy_guarantee(Budget)._sigma
    ours = discrete_gaussian_sigma(budget=PrivacyBudget(epsilon=1.0, delta=1e-6), l2_sensitivity=1.0)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours == pytest.approx(4.2308, abs=1e-3)


def test_a_published_figure_of_the_continuous_gaussian_for_wide_noise():
    # Balle & Wang 2018: σ = 4.2247 is the analytic Gaussian mechanism at ε = 1, δ = 1e-6.
    sigma = discrete_gaussian_sigma(
        budget=PrivacyBudget(epsilon=1.0, delta=1e-6), l2_sensitivity=1e5, dimension=10_000_000
    )
    assert sigma / 1e5 == pytest.approx(4.22468, abs=1e-4)


@pytest.mark.parametrize(
    ("sigma", "shift"), [(1.5, (1, 1)), (2.0, (2, 1)), (3.0, (3, 4)), (0.8, (1, 0)), (2.5, (2, 2))]
)
@pytest.mark.parametrize("eps", [0.1, 1.0, 3.0])
def test_vectors_are_never_undercharged(sigma, shift, eps):
    true = vector_delta(eps, sigma, shift)
    bound = discrete_gaussian_delta(epsilon=eps, sigma=sigma, l2_sensitivity=math.hypot(*shift), dimension=2)
    assert true <= bound
    # The wrong scale is seen: with the noise twice as wide as it is, the bound is broken.
    assert true > discrete_gaussian_delta(
        epsilon=eps, sigma=2 * sigma, l2_sensitivity=math.hypot(*shift), dimension=2
    )


@pytest.mark.parametrize(("sigma", "shift", "eps"), [(4.0, 2, 1.0), (8.0, 3, 0.3), (20.0, 9, 1.0)])
def test_smoothing_bounds_the_exact_figure_and_comes_close(sigma, shift, eps):
    exact = discrete_gaussian_delta(epsilon=eps, sigma=sigma, l2_sensitivity=shift)
    smooth = _smoothing_delta(eps, sigma, shift, 1)
    assert exact <= smooth
    wide = _smoothing_delta(eps, 50 * sigma, 50 * shift, 1)
    assert wide == pytest.approx(gaussian_delta(epsilon=eps, mu=shift / sigma), rel=1e-2)


@pytest.mark.parametrize("dimension", [1, 100, 10_000_000])
def test_many_coordinates_of_wide_noise_cost_what_one_gaussian_costs(dimension):
    found = discrete_gaussian_epsilon(delta=1e-6, sigma=4.0e4, l2_sensitivity=1e4, dimension=dimension)
    gauss = epsilon(GaussianRelease(noise_multiplier=4.0), delta=1e-6)
    assert found == pytest.approx(gauss, rel=1e-4)


@pytest.mark.parametrize("parameter", [0.4, 0.7, 1.0, 1.5])
def test_the_ripple_is_what_the_normaliser_does(parameter):
    x = np.arange(-60, 61)
    totals = [np.exp(-0.5 * ((x - c) / parameter) ** 2).sum() for c in np.linspace(0, 1, 201)]
    relative = np.array(totals) / (parameter * math.sqrt(2 * math.pi)) - 1.0
    assert np.abs(relative).max() <= smoothing_error(parameter) + 1e-14
    assert np.abs(relative).max() >= 0.99 * smoothing_error(parameter) - 1e-14


@given(
    sigma=st.floats(0.4, 300.0),
    shift=st.floats(1.0, 40.0),
    eps=st.floats(0.05, 4.0),
    dimension=st.sampled_from([1, 3, 1000]),
)
@settings(max_examples=60)
def test_more_noise_never_costs_more_and_a_larger_shift_never_less(sigma, shift, eps, dimension):
    def at(s, v):
        return discrete_gaussian_delta(epsilon=eps, sigma=s, l2_sensitivity=v, dimension=dimension)

    slack = 1 + 1e-8
    assert at(1.5 * sigma, shift) <= at(sigma, shift) * slack + 1e-300
    assert at(sigma, 1.5 * shift) * slack + 1e-300 >= at(sigma, shift)
    assert at(sigma, shift) <= concentrated_delta(
        epsilon=eps, rho=discrete_gaussian_rho(sigma=sigma, l2_sensitivity=shift)
    )


@given(eps=st.floats(0.05, 8.0), shift=st.floats(1.0, 1e4), dimension=st.sampled_from([1, 50, 10**6]))
@settings(max_examples=30)
def test_the_calibrated_noise_meets_the_budget(eps, shift, dimension):
    budget = PrivacyBudget(epsilon=eps, delta=1e-7)
    sigma = discrete_gaussian_sigma(budget=budget, l2_sensitivity=shift, dimension=dimension)
    found = discrete_gaussian_delta(epsilon=eps, sigma=sigma, l2_sensitivity=shift, dimension=dimension)
    assert found <= 1e-7
    assert discrete_gaussian_epsilon(
        delta=1e-7, sigma=sigma, l2_sensitivity=shift, dimension=dimension
    ) <= eps * (1 + 1e-5)


def test_neighbours_that_cannot_differ_cost_nothing():
    assert discrete_gaussian_delta(epsilon=0.1, sigma=1.0, l2_sensitivity=0.9, dimension=7) == 0.0


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": math.nan}, "sigma"),
        ({"l2_sensitivity": math.inf}, "l2_sensitivity"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"dimension": 0}, "dimension"),
    ],
)
def test_values_outside_their_range_are_named(change, name):
    good = {"epsilon": 1.0, "sigma": 4.0, "l2_sensitivity": 1.0, "dimension": 1}
    with pytest.raises(InvalidInputError, match=name):
        discrete_gaussian_delta(**{**good, **change})


def test_no_noise_has_a_clear_error_and_not_an_overflow():
    with pytest.raises(InvalidInputError, match="reachable"):
        discrete_gaussian_epsilon(delta=1e-9, sigma=1e-4, l2_sensitivity=1.0)
    found = discrete_gaussian_epsilon(delta=1e-9, sigma=0.02, l2_sensitivity=1.0)
    assert discrete_gaussian_delta(epsilon=found, sigma=0.02, l2_sensitivity=1.0) <= 1e-9
