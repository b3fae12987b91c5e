"""Enclosures contain the number, whatever the precision, and are narrow; against mpmath."""

from fractions import Fraction

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_flash_attention.noise.exp_bounds import PI_LOW, exp_minus, gaussian_weights


def as_mpf(value):
    return mpmath.mpf(value.numerator) / value.denominator


@given(
    st.fractions(min_value=0, max_value=2000, max_denominator=10**12),
    st.sampled_from([1, 8, 53, 128, 320, 640]),
)
def test_the_exponential_is_enclosed_within_two_units(x, bits):
    found = exp_minus(x, bits)
    with mpmath.workprec(bits + 200):
        true = mpmath.exp(-as_mpf(x)) * mpmath.mpf(2) ** bits
        assert found.low <= true <= found.high
    assert 0 <= found.high - found.low <= 2


def test_zero_and_whole_numbers():
    assert exp_minus(Fraction(0), 64).high >= 1 << 64 >= exp_minus(Fraction(0), 64).low
    assert exp_minus(Fraction(10**6), 64).low == 0
    assert exp_minus(Fraction(10**6), 64).high >= 1


@pytest.mark.parametrize("variance", [Fraction(1, 64), Fraction(1), Fraction(355, 113), Fraction(4096)])
def test_weights_their_tail_and_their_sum_are_enclosed(variance):
    found = gaussian_weights(variance, 320, negligible_bits=256)
    with mpmath.workprec(2500):
        unit = mpmath.mpf(2) ** 320
        x = 1 / (2 * as_mpf(variance))
        for k, weight in enumerate(found.weights):
            assert weight.low <= mpmath.exp(-x * k * k) * unit <= weight.high
        whole = mpmath.jtheta(3, 0, mpmath.exp(-x)) * unit
        assert found.total.low <= whole <= found.total.high
        listed = sum(mpmath.exp(-x * k * k) for k in range(len(found.weights)))
        tail = (whole / unit + 1) / 2 - listed
        assert 0 < tail * unit <= found.tail < unit * mpmath.mpf(2) ** -240
        for m in (0, 1, len(found.weights) - 1):
            law = found.magnitude_law(m)
            true = (1 if m == 0 else 2) * mpmath.exp(-x * m * m) * unit * unit / whole
            assert law.low <= true <= law.high
        assert found.tail_law() >= 2 * tail * unit * unit / whole
    # The widest enclosure is narrow beside a table's unit of 2^-128.
    assert max(weight.high - weight.low for weight in found.weights) < 1 << 64


def test_a_coarse_scale_still_encloses():
    """Correct whatever the precision: at 40 bits the recursion's errors are large and still covered."""
    found = gaussian_weights(Fraction(100), 40, negligible_bits=30)
    with mpmath.workprec(200):
        for k, weight in enumerate(found.weights):
            assert weight.low <= mpmath.exp(-mpmath.mpf(k * k) / 200) * 2**40 <= weight.high


def test_pi_is_cut_below():
    with mpmath.workprec(300):
        assert 0 < mpmath.pi - as_mpf(PI_LOW) < mpmath.mpf(10) ** -49
