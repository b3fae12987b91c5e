"""The mechanism on lattices. Fixed keys; the statistical test's false-alarm rate is 1e-4 over keys."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget, Sensitivity
from dp_flash_attention.noise import TestKey
from dp_flash_attention.quantum.lattice_gaussian import LatticeGaussian

BUDGET = PrivacyBudget(epsilon=1.0, delta=1e-6)
MOVED = Sensitivity(l2=50.0, neighboring_relation=NeighboringRelation.REPLACE_ONE)
BASIS = [[2.0, 0.0], [1.0, 2.0]]
NUM = 3000


def mechanism(basis=BASIS, **changes):
    return LatticeGaussian(basis, key=TestKey("lattice"), **changes)


def test_what_is_released_is_a_lattice_point_and_repeats_with_a_test_key():
    value = np.array([[3.3, 4.4], [-10.0, 0.2]])
    found = mechanism().release(value, MOVED, BUDGET)
    coefficients = found.value @ np.linalg.inv(np.array(BASIS))
    assert np.allclose(coefficients, np.rint(coefficients))
    assert np.array_equal(found.value, mechanism().release(value, MOVED, BUDGET).value)


def test_the_noise_has_the_stated_scale_and_half_or_double_would_be_noticed():
    found = mechanism().release(
        np.zeros((NUM, 2)), Sensitivity(l2=500.0, neighboring_relation=MOVED.neighboring_relation), BUDGET
    )
    scaled = found.value / found.noise_stddev
    bound = stats.norm.isf(1e-4 / 2)

    def score(values):
        return abs((np.mean(values**2) - 1) / math.sqrt(2 / values.size))

    assert score(scaled) < bound
    assert score(scaled / 2) > bound
    assert score(scaled * 2) > bound


def test_rounding_is_in_the_sensitivity():
    found = mechanism().release(np.zeros(2), MOVED, BUDGET)
    assert found.guarantee.sensitivity == f"50 in L2; {50 + math.sqrt(8):g} after rounding to the lattice"
    assert found.rho == pytest.approx(0.5 * ((50 + math.sqrt(8)) / found.noise_stddev) ** 2, rel=1e-6)
    assert found.delta.total <= BUDGET.delta


def test_scaled_integers_are_the_fast_path_of_the_same_mechanism():
    found = mechanism(None, grid=0.5).release(torch.zeros(5000), MOVED, BUDGET)
    assert found.mechanism == "LatticeGaussian"
    assert torch.equal(found.value * 2, torch.round(found.value * 2))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: mechanism().release(np.zeros(3), MOVED, BUDGET), "multiple of 2"),
        (
            lambda: mechanism([[200.0, 0.0], [0.0, 200.0]]).release(np.zeros(2), MOVED, BUDGET),
            "rounding adds",
        ),
        (lambda: mechanism(grid=1.0), "grid"),
        (
            # σ shrinks with ε until Klein's sampler would no longer be close to its law.
            lambda: mechanism([[30.0, 0.0], [0.0, 30.0]]).release(
                np.zeros(2), MOVED, PrivacyBudget(epsilon=30.0, delta=1e-2)
            ),
            "1.9 times the longest",
        ),
    ],
)
def test_what_cannot_be_released_is_refused(call, said):
    with pytest.raises(InvalidInputError, match=said):
        call()
