import math

import numpy as np
import pytest

from dp_flash_attention.accounting import (
    discrete_gaussian_delta,
    summed_discrete_gaussian_delta,
    summed_discrete_gaussian_rho,
    summed_discrete_gaussian_tau,
)
from dp_flash_attention.core.errors import InvalidInputError


def law(sigma, reach):
    mass = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return mass / mass.sum()


def summed_law(sigma, count, reach):
    result = law(sigma, reach)
    for _ in range(count - 1):
        result = np.convolve(result, law(sigma, reach))
    middle = len(result) // 2
    return result[middle - reach : middle + reach + 1]


@pytest.mark.parametrize(("sigma", "count"), [(0.5, 2), (0.6, 3), (0.7, 5), (0.8, 2)])
def test_tau_bounds_the_log_ratio_at_every_point(sigma, count):
    reach = 24
    ratio = np.log(summed_law(sigma, count, reach) / law(sigma * math.sqrt(count), reach))
    seen = np.abs(ratio[reach - 6 : reach + 7]).max()  # beyond, rounding of tiny numbers would dominate
    tau = summed_discrete_gaussian_tau(sigma=sigma, num_summands=count)
    assert seen <= tau
    # It is not vacuous: a slightly wider summand, whose bound is ten times smaller, would not cover this one.
    assert seen > summed_discrete_gaussian_tau(sigma=1.8 * sigma, num_summands=count)


def test_the_published_formula_at_one_point():
    tau = summed_discrete_gaussian_tau(sigma=0.75, num_summands=3)
    terms = math.exp(-2 * math.pi**2 * 0.5625 / 2) + math.exp(-2 * math.pi**2 * 0.5625 * 2 / 3)
    assert tau == pytest.approx(10 * terms)
    rho = summed_discrete_gaussian_rho(sigma=0.75, num_summands=3, l2_sensitivity=2.0, dimension=7)
    root = min(math.sqrt(4 / (3 * 0.5625) + tau * 7 / 2), 2 / (math.sqrt(3) * 0.75) + tau * math.sqrt(7))
    assert rho == pytest.approx(root**2 / 2)


@pytest.mark.parametrize(("sigma", "count", "eps"), [(0.7, 4, 1.0), (1.0, 9, 0.5), (2.0, 4, 1.0)])
def test_the_sum_is_never_undercharged(sigma, count, eps):
    reach = math.ceil(14 * sigma * math.sqrt(count))
    mass = summed_law(sigma, count, reach)
    true = float(np.maximum(0.0, mass[1:] - math.exp(eps) * mass[:-1]).sum())
    settings = {"epsilon": eps, "num_summands": count, "l2_sensitivity": 1.0, "dimension": 1}
    assert true <= summed_discrete_gaussian_delta(sigma=sigma, **settings)
    # σ/√n where σ/√h is due would be noticed.
    assert true > summed_discrete_gaussian_delta(sigma=2.0 * sigma, **settings)


def test_for_wide_noise_the_sum_costs_what_one_discrete_gaussian_costs():
    summed = summed_discrete_gaussian_delta(
        epsilon=1.0, sigma=40.0, num_summands=100, l2_sensitivity=100.0, dimension=10**6
    )
    one = discrete_gaussian_delta(epsilon=1.0, sigma=400.0, l2_sensitivity=100.0, dimension=10**6)
    assert summed == pytest.approx(one, rel=1e-9)


def test_too_little_noise_for_the_closeness_bound_is_refused():
    with pytest.raises(InvalidInputError, match="sigma"):
        summed_discrete_gaussian_tau(sigma=0.49, num_summands=3)
