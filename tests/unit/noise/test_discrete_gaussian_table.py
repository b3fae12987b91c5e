"""The table's certificate against mpmath, which shares no line with it; and what must be refused."""

import math
from fractions import Fraction

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import (
    DiscreteGaussianTable,
    build_table,
    certify_table,
    hockey_stick_of_shift,
    hockey_stick_to_ideal,
)

VARIANCES = [
    Fraction(1, 64),
    Fraction(1, 3),
    Fraction(1),
    Fraction(16),
    Fraction(72),
    Fraction(10**6 + 1, 977),
]


def as_mpf(value):
    return mpmath.mpf(value.numerator) / value.denominator


def ideal(variance):
    """Probabilities of the magnitudes, far beyond every table, by mpmath's exponential and its theta function."""
    x = 1 / (2 * as_mpf(variance))
    total = mpmath.jtheta(3, 0, mpmath.exp(-x))
    reach = math.isqrt(int(variance * 2 * 260)) + 20
    return [(1 if m == 0 else 2) * mpmath.exp(-x * m * m) / total for m in range(reach)]


def distance(table, ratio=1):
    """Σ max(0, sampled - ratio·ideal) by mpmath, and the other way round."""
    laws = ideal(table.variance)
    masses = [*table.masses, *[0] * len(laws)][: max(len(laws), len(table.masses))]
    laws += [mpmath.mpf(0)] * (len(masses) - len(laws))
    sampled = [mpmath.mpf(mass) / 2**table.precision_bits for mass in masses]
    over = sum(max(0, p - ratio * q) for p, q in zip(sampled, laws, strict=True))
    under = sum(max(0, q - ratio * p) for p, q in zip(sampled, laws, strict=True))
    return over, under


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_certified_distance_is_the_distance(variance):
    table = build_table(variance)
    certificate = certify_table(table)
    with mpmath.workprec(700):
        true = sum(distance(table)) / 2
        assert as_mpf(certificate.total_variation_low) <= true <= as_mpf(certificate.total_variation)
        assert as_mpf(certificate.total_variation) - true < true * 2**-60
        beyond = sum(ideal(variance)[certificate.largest + 1 :])
        assert beyond <= as_mpf(certificate.tail_mass) <= beyond * (1 + mpmath.mpf(2) ** -60)


@pytest.mark.parametrize(("bits", "expected"), [(32, -30), (64, -61), (128, -125)])
def test_precision_buys_distance_as_published(bits, expected):
    """DESIGN 1.4: tables at σ = 4."""
    assert (
        math.trunc(math.log2(certify_table(build_table(16, precision_bits=bits)).total_variation)) == expected
    )


def test_a_biased_table_has_a_large_certified_distance():
    table = build_table(16)
    moved = 1 << 100
    masses = (table.masses[0] - moved, table.masses[1] + moved, *table.masses[2:])
    biased = DiscreteGaussianTable(variance=table.variance, precision_bits=128, masses=masses)
    assert certify_table(biased).total_variation_low > Fraction(1, 2**29)


def test_a_table_of_another_variance_has_a_large_certified_distance():
    other = DiscreteGaussianTable(variance=Fraction(17), precision_bits=128, masses=build_table(16).masses)
    assert certify_table(other).total_variation_low > Fraction(1, 100)


@given(st.fractions(min_value=Fraction(1, 64), max_value=400, max_denominator=10**9))
def test_every_variance_is_certified_below_2_to_the_minus_120(variance):
    table = build_table(variance)
    assert sum(table.masses) == 2**128
    assert list(table.masses[1:]) == sorted(table.masses[1:], reverse=True)
    assert certify_table(table).total_variation < Fraction(1, 2**120)


def test_probabilities_are_symmetric_and_add_up_to_one():
    table = build_table(Fraction(5, 2))
    reach = len(table.masses)
    assert sum(table.probability(k) for k in range(-reach, reach + 1)) == 1
    assert table.probability(0) == Fraction(table.masses[0], 2**128)
    assert table.probability(3) == table.probability(-3) == Fraction(table.masses[3], 2**129)
    assert table.probability(reach) == 0


@pytest.mark.parametrize("ratio", [Fraction(1), Fraction(3, 2), Fraction(20)])
def test_the_hockey_stick_to_the_ideal_bounds_the_true_one(ratio):
    table = build_table(16)
    bound = hockey_stick_to_ideal(table, ratio)
    with mpmath.workprec(700):
        true = max(distance(table, as_mpf(ratio)))
        assert true <= as_mpf(bound) <= true * (1 + mpmath.mpf(2) ** -40) + mpmath.mpf(2) ** -200


def test_the_hockey_stick_at_ratio_one_is_the_total_variation():
    table = build_table(16)
    difference = hockey_stick_to_ideal(table, 1) - certify_table(table).total_variation
    assert abs(difference) < Fraction(1, 2**190)


def test_the_hockey_stick_of_a_shift_is_the_delta_of_one_integer():
    """Canonne, Kamath & Steinke 2020, theorem 7: δ(ε) = P(X > εσ² - 1/2) - e^ε·P(X > εσ² + 1/2), sensitivity 1."""
    table, epsilon = build_table(16), 1 / 3
    ratio = Fraction(math.exp(epsilon))
    found = float(hockey_stick_of_shift(table, 1, ratio))
    exceeds = lambda x: sum(float(table.probability(k)) for k in range(-60, 61) if k > x)  # noqa: E731
    expected = exceeds(epsilon * 16 - 0.5) - math.exp(epsilon) * exceeds(epsilon * 16 + 0.5)
    assert found == pytest.approx(expected, rel=1e-9)
    assert hockey_stick_of_shift(table, -1, ratio) == hockey_stick_of_shift(table, 1, ratio)
    assert hockey_stick_of_shift(table, 0, ratio) == 0
    assert hockey_stick_of_shift(table, 2, ratio) > hockey_stick_of_shift(table, 1, ratio)


@pytest.mark.parametrize("variance", [0, -1, 0.5, True, "16", None, Fraction(1, 65), 4097, math.nan])
def test_what_is_no_variance_is_refused(variance):
    with pytest.raises(InvalidInputError, match="variance"):
        build_table(variance)


@pytest.mark.parametrize(
    "masses", [(), (2**128 - 1,), (2**128, 0), (2**128 + 1, -1, 0), (2**127, 2**127, 1)], ids=str
)
def test_masses_that_are_no_law_are_refused(masses):
    with pytest.raises(InvalidInputError, match="masses"):
        DiscreteGaussianTable(variance=Fraction(1), precision_bits=128, masses=masses)


@pytest.mark.parametrize("ratio", [0, 0.5, Fraction(1, 2), "2", True])
def test_what_is_no_ratio_is_refused(ratio):
    for function in (lambda: hockey_stick_to_ideal(build_table(1), ratio),
                     lambda: hockey_stick_of_shift(build_table(1), 1, ratio)):  # fmt: skip
        with pytest.raises(InvalidInputError, match="ratio"):
            function()
