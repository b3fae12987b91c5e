"""The discrete Gaussian computed again, in decimal arithmetic, to check the tables that ``noise`` makes.

It shares no line with ``noise.exp_bounds``: every weight is its own exponential (the standard library's ``decimal``,
correctly rounded), sums are taken term by term, and convolutions are summed as their definition says, with no
theorem about theta functions. It is not an enclosure: with 100 digits, and weights below 10^-80 left out, its error is
about 2^-260, beside distances of 2^-125.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from typing import Final

_DIGITS: Final = 100
# Weights below 10^-80, that is 2^-265, are left out.
_NEGLIGIBLE_LOG: Final = 80 * math.log(10)
_CONVOLUTION_DIGITS: Final = 70


def magnitude_law(variance: Fraction) -> list[Decimal]:
    """Returns P(|X| = m) for m = 0, 1, … of N_ℤ(0, variance), down to negligible magnitudes."""
    with localcontext(Context(prec=_DIGITS)):
        weights = _weights(variance)
        total = weights[0] + 2 * sum(weights[1:])
        return [(weight if m == 0 else 2 * weight) / total for m, weight in enumerate(weights)]


def total_variation(variance: Fraction, masses: Sequence[int], precision_bits: int) -> Decimal:
    """Returns ½·Σ |masses[m]/2^precision_bits - P(|X| = m)|."""
    law = magnitude_law(variance)
    with localcontext(Context(prec=_DIGITS)):
        unit = Decimal(2) ** precision_bits
        total = Decimal(0)
        for m in range(max(len(law), len(masses))):
            sampled = masses[m] / unit if m < len(masses) else Decimal(0)
            total += abs(sampled - (law[m] if m < len(law) else Decimal(0)))
        return total / 2


def largest_relative_error(
    variance: Fraction, masses: Sequence[int], precision_bits: int, *, first: int, last: int
) -> Decimal:
    """Returns max |sampled/ideal - 1| over the magnitudes first … last; a magnitude that is missing counts 1."""
    law = magnitude_law(variance)
    with localcontext(Context(prec=_DIGITS)):
        unit = Decimal(2) ** precision_bits
        return max(
            abs((masses[m] / unit if m < len(masses) else Decimal(0)) / law[m] - 1)
            for m in range(first, last + 1)
        )


def convolution_total_variation(lower: Fraction, multiplier: int, upper: Fraction) -> Decimal:
    """Returns the total variation between x + multiplier·y and N_ℤ(0, lower + multiplier²·upper), by summation."""
    with localcontext(Context(prec=_CONVOLUTION_DIGITS)):
        xs, ys, zs = (_weights(v) for v in (lower, upper, lower + multiplier**2 * upper))
        norm_x, norm_y, norm_z = (w[0] + 2 * sum(w[1:]) for w in (xs, ys, zs))
        distance = Decimal(0)
        for z in range(len(zs) + multiplier):
            first, last = -((len(xs) - 1 - z) // multiplier), (z + len(xs) - 1) // multiplier
            found = sum(
                (
                    ys[abs(y)] * xs[abs(z - multiplier * y)]
                    for y in range(max(first, 1 - len(ys)), min(last, len(ys) - 1) + 1)
                ),
                Decimal(0),
            )
            ideal = zs[z] / norm_z if z < len(zs) else Decimal(0)
            distance += (1 if z == 0 else 2) * abs(found / (norm_x * norm_y) - ideal)
        return distance / 2


def log2(value: Decimal) -> float:
    """Returns log₂ of a positive number, for display."""
    return float(value.ln() / Decimal(2).ln()) if value > 0 else -math.inf


def _weights(variance: Fraction) -> list[Decimal]:
    reach = math.isqrt(math.ceil(2 * variance * Fraction(_NEGLIGIBLE_LOG))) + 1
    return [
        (Decimal(-m * m * variance.denominator) / Decimal(2 * variance.numerator)).exp()
        for m in range(reach + 1)
    ]
