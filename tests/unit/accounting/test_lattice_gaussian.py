import itertools
import math

import numpy as np
import pytest

from dp_flash_attention.accounting import discrete_gaussian_delta
from dp_flash_attention.accounting.discrete_gaussian import smoothing_error
from dp_flash_attention.accounting.lattice_gaussian import (
    lattice_distance,
    lattice_gaussian_delta,
    lattice_gaussian_sigma,
)
from dp_flash_attention.core.privacy import PrivacyBudget

BASIS = np.array([[2.0, 0.0], [1.0, 2.0]])
NORMS = (2.0, 2.0)


def points(reach):
    return np.array([z @ BASIS for z in map(np.array, itertools.product(range(-reach, reach + 1), repeat=2))])


def brute_force_delta(eps, sigma, shift):
    lattice = points(40)
    mass = np.exp(-np.sum(lattice**2, axis=1) / (2 * sigma**2))
    mass /= mass.sum()
    loss = (np.sum((lattice - shift) ** 2, axis=1) - np.sum(lattice**2, axis=1)) / (2 * sigma**2)
    return float(np.sum(mass * np.maximum(0.0, 1.0 - np.exp(eps - loss))))


@pytest.mark.parametrize("coefficients", [(1, 0), (0, 1), (1, 1), (2, -1), (3, 2)])
@pytest.mark.parametrize(("sigma", "eps"), [(5.0, 0.5), (9.0, 0.3), (3.0, 2.0)])
def test_shifts_are_never_undercharged_and_half_the_noise_is_noticed(coefficients, sigma, eps):
    shift = np.array(coefficients) @ BASIS
    bound = lattice_gaussian_delta(
        epsilon=eps, sigma=sigma, l2_sensitivity=float(np.linalg.norm(shift)), gram_schmidt_norms=NORMS
    )
    assert brute_force_delta(eps, sigma, shift) <= bound
    assert brute_force_delta(eps, sigma / 2, shift) > bound


def klein_law(sigma, centre):
    """Klein's law from its definition: the normaliser of each coordinate depends on what was drawn before."""
    law = {}
    for z2 in range(-15, 16):
        # Gram-Schmidt of (2, 0), (1, 2): b̃₁ = (2, 0), b̃₂ = (0, 2).
        c2 = centre[1] / 2.0
        p2 = math.exp(-((z2 - c2) ** 2) * 4.0 / (2 * sigma**2))
        n2 = sum(math.exp(-((k - c2) ** 2) * 4.0 / (2 * sigma**2)) for k in range(-40, 41))
        c1 = (centre[0] - z2) / 2.0
        n1 = sum(math.exp(-((k - c1) ** 2) * 4.0 / (2 * sigma**2)) for k in range(-40, 41))
        for z1 in range(-25, 26):
            law[z1, z2] = p2 / n2 * math.exp(-((z1 - c1) ** 2) * 4.0 / (2 * sigma**2)) / n1
    return law


@pytest.mark.parametrize("sigma", [1.0, 1.2, 1.6])
def test_the_distance_of_kleins_law_is_bounded_and_the_bound_is_not_vacuous(sigma):
    centre = (0.3, 0.9)
    law = klein_law(sigma, centre)
    ideal = {z: math.exp(-float(np.sum((np.array(z) @ BASIS - centre) ** 2)) / (2 * sigma**2)) for z in law}
    total = sum(ideal.values())
    true = 0.5 * sum(abs(law[z] - ideal[z] / total) for z in law)
    bound = lattice_distance(sigma=sigma, gram_schmidt_norms=NORMS)
    assert true <= bound
    if bound < 1.0:
        assert true > bound / 300


def test_on_the_integers_it_is_the_bound_of_the_integers():
    for sigma, eps in ((4.0, 1.0), (30.0, 0.2)):
        here = lattice_gaussian_delta(
            epsilon=eps, sigma=sigma, l2_sensitivity=2.0, gram_schmidt_norms=(1.0,) * 5
        )
        there = discrete_gaussian_delta(epsilon=eps, sigma=sigma, l2_sensitivity=2.0, dimension=5)
        assert here == pytest.approx(there, rel=0.05)
    e = smoothing_error(1.0)
    assert lattice_distance(sigma=3.0, gram_schmidt_norms=(3.0,)) == pytest.approx(e / (1 - e), rel=1e-6)


def test_the_calibrated_noise_meets_the_budget():
    budget = PrivacyBudget(epsilon=1.0, delta=1e-6)
    sigma = lattice_gaussian_sigma(budget=budget, l2_sensitivity=40.0, gram_schmidt_norms=NORMS)
    settings = {"epsilon": 1.0, "l2_sensitivity": 40.0, "gram_schmidt_norms": NORMS}
    assert lattice_gaussian_delta(sigma=sigma, **settings) <= 1e-6
    assert lattice_gaussian_delta(sigma=0.99 * sigma, **settings) > 1e-6


def test_where_the_bound_says_nothing_it_says_one():
    assert lattice_distance(sigma=0.2, gram_schmidt_norms=(1.0,)) == 1.0
    assert lattice_distance(sigma=0.5, gram_schmidt_norms=(1.0,), copies=10**6) == 1.0
