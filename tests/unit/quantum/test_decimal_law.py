"""The second opinion on tables against mpmath, and that it shares nothing with the first."""

import ast
from fractions import Fraction
from pathlib import Path

import mpmath
import pytest

from dp_flash_attention.noise import build_table
from dp_flash_attention.quantum import decimal_law
from dp_flash_attention.quantum.decimal_law import (
    convolution_total_variation,
    largest_relative_error,
    log2,
    magnitude_law,
    total_variation,
)


def test_it_imports_nothing_of_the_library():
    tree = ast.parse(Path(decimal_law.__file__).read_text(encoding="utf-8"))
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(name.startswith("dp_flash_attention") for name in imported)


@pytest.mark.parametrize("variance", [Fraction(1, 64), Fraction(7, 3), Fraction(576)])
def test_the_law_is_mpmaths(variance):
    with mpmath.workprec(500):
        x = mpmath.mpf(variance.denominator) / (2 * variance.numerator)
        total = mpmath.jtheta(3, 0, mpmath.exp(-x))
        for m, found in enumerate(magnitude_law(variance)):
            true = (1 if m == 0 else 2) * mpmath.exp(-x * m * m) / total
            assert abs(mpmath.mpf(str(found)) / true - 1) < mpmath.mpf(10) ** -78


@pytest.mark.parametrize(("k", "published"), [(8, -16), (4, -61), (2, -206)])
def test_convolution_has_the_published_distances(k, published):
    """DESIGN 1.4: careless convolution at σ₀ = 6."""
    assert round(log2(convolution_total_variation(Fraction(36), k, Fraction(36)))) == published


def test_a_cut_tail_and_a_moved_mass_are_seen():
    table = build_table(16)
    good = largest_relative_error(Fraction(16), table.masses, 128, first=24, last=36)
    assert log2(good) < -60
    assert largest_relative_error(Fraction(16), table.masses[:30], 128, first=24, last=36) == 1
    moved = (table.masses[0] - 2**100, table.masses[1] + 2**100, *table.masses[2:])
    assert log2(total_variation(Fraction(16), moved, 128)) == pytest.approx(-28, abs=1e-3)
    assert log2(total_variation(Fraction(16), moved, 128) * 0) == float("-inf")
