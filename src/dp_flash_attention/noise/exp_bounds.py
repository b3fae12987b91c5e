"""Rigorous integer enclosures of e^(-x), of the weights of a discrete Gaussian, and of their sum.

A real number y is enclosed by integers (low, high) at a *scale* of ``bits``: low ≤ y·2^bits ≤ high. Every
operation rounds its low end down and its high end up, so an enclosure is a theorem whatever the precision; the
precision only decides how narrow it is. Nothing here computes with floating-point numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Final

# Digits of π cut off, so that the constant lies below it.
PI_LOW: Final = Fraction(314159265358979323846264338327950288419716939937510, 10**50)
_GUARD_BITS: Final = 64


@dataclass(frozen=True)
class Bounds:
    """Integers low and high with low ≤ y·2^bits ≤ high, for a ``bits`` that the context fixes."""

    low: int
    high: int


def exp_minus(x: Fraction, bits: int) -> Bounds:
    """Returns an enclosure of e^(-x) at scale ``bits``, for x ≥ 0.

    e^y is a series of positive terms, so a partial sum is a lower bound, and a partial sum plus twice the first
    neglected term is an upper one while y ≤ 1/2; x is halved until that holds and the result squared back.
    """
    halvings = max(0, (x.numerator // x.denominator).bit_length() + 1)
    work = bits + _GUARD_BITS + 2 * halvings
    one = 1 << work
    y = x / (1 << halvings)
    y_low = (y.numerator << work) // y.denominator
    y_high = y_low + 1
    sum_low = sum_high = term_low = term_high = one
    order = 0
    while term_high > 1:
        order += 1
        term_low = (term_low * y_low >> work) // order
        term_high = -(-_ceil_shift(term_high * y_high, work) // order)
        sum_low += term_low
        sum_high += term_high
    sum_high += 2 * term_high
    low = (one << work) // sum_high
    high = -(-(one << work) // sum_low)
    for _ in range(halvings):
        low, high = low * low >> work, _ceil_shift(high * high, work)
    return Bounds(low >> (work - bits), _ceil_shift(high, work - bits))


@dataclass(frozen=True, kw_only=True)
class GaussianWeights:
    """Enclosures of w_k = exp(-k²/(2·variance)) for k = 0 .. len(weights) - 1, at scale ``bits``.

    Attributes:
        bits: The scale.
        weights: The enclosures.
        tail: Upper bound of Σ_{k ≥ len(weights)} w_k.
        total: Enclosure of Σ_{k ∈ ℤ} w_k, the normaliser.
    """

    bits: int
    weights: tuple[Bounds, ...]
    tail: int
    total: Bounds

    def magnitude_law(self, magnitude: int) -> Bounds:
        """Returns an enclosure of P(|X| = magnitude) for a listed magnitude."""
        count = 1 if magnitude == 0 else 2
        weight = self.weights[magnitude]
        return Bounds(
            (count * weight.low << self.bits) // self.total.high,
            -(-(count * weight.high << self.bits) // self.total.low),
        )

    def tail_law(self) -> int:
        """Returns an upper bound of P(|X| ≥ len(weights))."""
        return -(-(2 * self.tail << self.bits) // self.total.low)


def gaussian_weights(variance: Fraction, bits: int, *, negligible_bits: int) -> GaussianWeights:
    """Returns the weights of a discrete Gaussian down to 2^-negligible_bits, and a bound for the rest.

    Two recursions and no further exponential: w_{k+1} = w_k·r_k and r_{k+1} = r_k·t² with t = e^(-1/(2·variance)),
    w_0 = 1, r_0 = t. The tail behind index K is at most w_K·r_K/(1 - r_K), for its terms fall faster than
    a geometric series of ratio r_K.
    """
    ratio = exp_minus(1 / (2 * variance), bits)
    step = Bounds(ratio.low * ratio.low >> bits, _ceil_shift(ratio.high * ratio.high, bits))
    one, negligible = 1 << bits, 1 << max(0, bits - negligible_bits)
    weights = [Bounds(one, one)]
    while weights[-1].high > negligible or ratio.high >= one:
        last = weights[-1]
        weights.append(Bounds(last.low * ratio.low >> bits, _ceil_shift(last.high * ratio.high, bits)))
        ratio = Bounds(ratio.low * step.low >> bits, _ceil_shift(ratio.high * step.high, bits))
    tail = -(-weights[-1].high * ratio.high // (one - ratio.high))
    total_low = one + 2 * sum(weight.low for weight in weights[1:])
    total_high = one + 2 * (sum(weight.high for weight in weights[1:]) + tail)
    return GaussianWeights(bits=bits, weights=tuple(weights), tail=tail, total=Bounds(total_low, total_high))


def _ceil_shift(value: int, bits: int) -> int:
    return -(-value >> bits)
