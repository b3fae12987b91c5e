"""The coin of wide noise at its edge: bits just below the law's own probability accept, and just above refuse."""

from fractions import Fraction

import mpmath
import numpy as np
import pytest

from dp_flash_attention.noise.wide_discrete_gaussian import WideDiscreteGaussian
from dp_flash_attention.noise.wide_skellam import WideSkellam

WIDE_GAUSSIAN = [WideDiscreteGaussian, Fraction(10**7) + Fraction(1, 3)]
WIDE_SKELLAM = [WideSkellam, Fraction(2**28)]


class _Bits:
    """A stream whose every block begins with given bytes."""

    block_bytes = 16

    def __init__(self, content):
        self._content = np.frombuffer(content, dtype=np.uint8)

    def read(self, num_bytes, *, domain, block, buffer):
        return self._content


def _probability(make, variance, scaled, low):
    """By mpmath: no table, no cosine, no Decimal."""
    if make is WideDiscreteGaussian:
        exponent = Fraction(low * (low + 2 * scaled)) / (2 * variance)
        return mpmath.exp(-mpmath.mpf(exponent.numerator) / exponent.denominator)
    mu = mpmath.mpf(variance.numerator) / variance.denominator
    return mpmath.besseli(scaled + low, mu) / mpmath.besseli(scaled, mu)


@pytest.mark.parametrize(("make", "variance"), [WIDE_GAUSSIAN, WIDE_SKELLAM])
def test_the_coin_turns_where_the_law_says(make, variance):
    noise = make(variance)
    sampler, k = noise._sampler, noise.multiplier
    for a, u in ((0, k - 1), (3, k // 2), (9, k - 1)):
        with mpmath.workdps(70):
            edge = int(_probability(make, variance, k * a, u) * mpmath.mpf(2) ** 160)
        # From one part in 2^150, where digits decide, to one in 2^21, where doubles do.
        for away in (2**10, 2**100, 2**120, 2**135, 2**139):
            for word, accepted in ((edge - away, True), (edge + away, False)):
                coin, more = divmod(word, 2**128)
                source = _Bits(more.to_bytes(16, "big"))
                assert sampler._close_coin(k * a, u, coin, source, 0) is accepted


@pytest.mark.parametrize(("make", "variance"), [WIDE_GAUSSIAN, WIDE_SKELLAM])
def test_the_fast_coin_has_the_variance_to_the_last_place(make, variance):
    law = make(variance)._sampler._law
    assert abs(Fraction(law.half_inverse) * 2 * variance - 1) <= Fraction(1, 2**53)
