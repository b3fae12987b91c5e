"""Rounding and Klein's sampler. Fixed keys; each statistical test's false-alarm rate is 1e-4 over keys."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.quantum.lattice import lattice_from_rows
from dp_flash_attention.quantum.rational_sampler import RationalCoins

ALARM = 1e-4
BASES = [[[1]], [[2, 0], [1, 2]], [[3, 1, 0], [1, 4, 1], [0, 1, 5]], [[0.5, 0.25], [0, 2.0]]]


@pytest.mark.parametrize("rows", BASES, ids=str)
def test_gram_schmidt_agrees_with_a_factorisation(rows):
    lattice = lattice_from_rows(rows)
    diagonal = np.abs(np.diag(np.linalg.qr(np.array(rows, dtype=float).T)[1]))
    assert lattice.gram_schmidt_norms == pytest.approx(tuple(diagonal))
    assert lattice.rounding_bound == pytest.approx(math.sqrt(np.sum(diagonal**2)))


@pytest.mark.parametrize("rows", BASES, ids=str)
def test_the_nearest_plane_is_within_half_the_bound_and_lattice_points_stay(rows, rng):
    lattice = lattice_from_rows(rows)
    for _ in range(50):
        target = tuple(Fraction(x) for x in rng.normal(0, 20, lattice.dimension))
        found = lattice.point(lattice.nearest_plane(target))
        away = math.sqrt(sum(float(a - b) ** 2 for a, b in zip(found, target, strict=True)))
        assert away <= lattice.rounding_bound / 2
        assert lattice.nearest_plane(found) == lattice.nearest_plane(target)


def test_kleins_law_in_every_cell_and_the_wrong_scale_is_rejected():
    rows = [[2, 0], [1, 2]]
    lattice, variance, num = lattice_from_rows(rows), Fraction(16), 4000
    centre = (Fraction(1, 3), Fraction(-2, 5))
    coins = RationalCoins(TestKey("klein cells"))
    drawn = [lattice.klein(centre, variance, coins) for _ in range(num)]
    cells = list(itertools.product(range(-9, 10), repeat=2))

    def p_value(scale):
        points = np.array([[float(x) for x in lattice.point(z)] for z in cells])
        law = np.exp(
            -np.sum((points - [float(c) for c in centre]) ** 2, axis=1) / (2 * scale * float(variance))
        )
        expected = num * law / law.sum()
        seen = np.array([drawn.count(z) for z in cells], dtype=float)
        common = expected >= 5
        return stats.chisquare(
            np.append(seen[common], num - seen[common].sum()),
            np.append(expected[common], num - expected[common].sum()),
        ).pvalue

    assert p_value(1.0) > ALARM
    assert p_value(0.8) < ALARM
    assert p_value(1.25) < ALARM


def test_kleins_covariance_is_round_although_the_basis_is_skewed():
    lattice = lattice_from_rows([[3, 1, 0], [1, 4, 1], [0, 1, 5]])
    variance, num = Fraction(400), 2500
    coins = RationalCoins(TestKey("klein covariance"))
    zero = (Fraction(0),) * 3
    points = np.array(
        [[float(x) for x in lattice.point(lattice.klein(zero, variance, coins))] for _ in range(num)]
    )
    second = points.T @ points / num / float(variance)
    bound = stats.norm.isf(ALARM / 12)  # six entries, two sides
    deviation = np.where(np.eye(3, dtype=bool), math.sqrt(2 / num), math.sqrt(1 / num))
    assert np.all(np.abs(second - np.eye(3)) < bound * deviation)
    # Coefficients drawn with one σ for all, not σ/‖b̃_i‖, would be seen.
    skewed = points @ np.array([[1.0, 0.2, 0], [0, 1, 0], [0, 0, 1]])
    assert not np.all(np.abs(skewed.T @ skewed / num / float(variance) - np.eye(3)) < bound * deviation)


@pytest.mark.parametrize(
    "rows",
    [[], [[1, 2]], [[1, 2], [2, 4]], [[0]], [[1, math.nan], [0, 1]], [["a"]], [[True]], "ab", 3, [[1], [2]]],
    ids=str,
)
def test_what_is_no_basis_is_refused(rows):
    with pytest.raises(InvalidInputError, match="basis"):
        lattice_from_rows(rows)
