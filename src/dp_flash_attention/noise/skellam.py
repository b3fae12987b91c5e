"""Exact Skellam noise: a table of the difference of two Poisson(μ/2) numbers, in 128-bit masses, with its certificate.

The law is P(k) = e^−μ·I_|k|(μ), I the modified Bessel function. Its recurrence I_{k−1} = I_{k+1} + (2k/μ)·I_k is run
downwards from far out, N, where the start (0, 1) stands for (I_{N+1}, I_N). Downwards the solution that grows is the wanted one:
what the wrong start leaves of the other solution, K_k, is at most I_{N+1}/I_k of I_k, because K_k grows with k. N is chosen so
that this is below 10^−60 wherever the table has mass. Decimal arithmetic of 90 digits adds less than 10^−75 a step. The
masses follow from Σ_k P(k) = 1 alone; no exponential is computed.

Sums of Skellam numbers are Skellam numbers, variances added: that is what it is for (Agarwal, Kairouz & Liu 2021).
Looking a number up is a binary search: its memory accesses depend on what comes out. Draw it where nobody watches the clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise.bits import SecureBits
from dp_flash_attention.noise.entropy import NoiseKey
from dp_flash_attention.noise.keystream import checked_count

MAX_VARIANCE = 2**32
_BITS = 128
_DIGITS = 90
# Everything that the two error terms above and the sums of a table can leave, as a share of the whole.
_ARITHMETIC = Decimal("1e-55")
_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class SkellamTable:
    """Cumulative masses of one Skellam law.

    Attributes:
        variance: μ.
        masses: 2^128-ths of probability of −largest … largest, symmetric, adding up to 2^128.
        total_variation: Upper bound of the distance from the ideal law.
    """

    variance: Fraction
    masses: tuple[int, ...]
    total_variation: float

    @property
    def largest(self) -> int:
        """The largest magnitude that can come out."""
        return len(self.masses) // 2


@lru_cache(maxsize=16)
def skellam_table(variance: Fraction) -> SkellamTable:
    """Returns the table of variance μ, and how far it is from the law.

    Args:
        variance: μ, rational, from 1/64 to 2^32. Building takes about a second at 2^28.

    Raises:
        InvalidInputError: If it is out of range.
    """
    if not isinstance(variance, Fraction) or not Fraction(1, 64) <= variance <= MAX_VARIANCE:
        raise InvalidInputError(
            "variance", str(variance), bound="a Fraction from 1/64 to 2^32", remedy="Use a wider grid."
        )
    with localcontext(Context(prec=_DIGITS)):
        law = _law(variance)
        unit = Decimal(2) ** _BITS
        half = [int((p * unit).to_integral_value()) for p in law]
        while half[-1] == 0:
            half.pop()
        masses = [*half[:0:-1], *half]
        masses[len(half) - 1] += (1 << _BITS) - sum(masses)  # what rounding left over, to zero
        distance = abs(law[0] - Decimal(masses[len(half) - 1]) / unit)
        distance += 2 * sum(abs(p - Decimal(m) / unit) for p, m in zip(law[1:], half[1:], strict=False))
        distance += 2 * sum(law[len(half) :], Decimal(0))
        total_variation = float(distance / 2 + _ARITHMETIC) * (1.0 + 1e-12)
    return SkellamTable(variance=variance, masses=tuple(masses), total_variation=total_variation)


def skellam(
    num: int, *, variance: Fraction, key: NoiseKey, step: int, stream: int = 0
) -> npt.NDArray[np.int64]:
    """Returns ``num`` independent Skellam integers, int64.

    Args:
        num: How many.
        variance: μ; see ``skellam_table``.
        key: Secret. The numbers use a subkey of their own for each variance.
        step: A triple (key, step, stream) is for one release only.
        stream: As ``step``.

    Raises:
        InvalidInputError: If an argument is out of range.
        NoiseUnavailableError: If ``cryptography`` cannot be imported.

    Guarantees:
        * Neighbouring relation, unit, sensitivity: the caller's. Public: the variance. Secret: the key.
        * Theorem: with truly random bits the law is the table's, within ``total_variation`` of Skellam's.
        * Source: Skellam 1946; Olver 1964 (the recurrence run downwards).
    """
    count = checked_count("num", num)
    table = skellam_table(variance)
    high, low = _cumulative(variance)
    bits = SecureBits(key.derive(f"noise.skellam.v1:{variance}"))
    words = bits.uint64(2 * count, step=step, stream=stream).reshape(-1, 2)
    # Index of the first cumulative mass above the 128-bit word: by its upper half, and by the lower one on a tie.
    index = np.searchsorted(high, words[:, 0], side="left")
    tied = np.flatnonzero(high[np.minimum(index, len(high) - 1)] == words[:, 0])
    for place in tied.tolist():
        wanted = int(words[place, 0]) << 64 | int(words[place, 1])
        position = int(index[place])
        while position < len(high) and (int(high[position]) << 64 | int(low[position])) <= wanted:
            position += 1
        index[place] = position
    drawn: npt.NDArray[np.int64] = index.astype(np.int64) - table.largest
    return drawn


@lru_cache(maxsize=16)
def _cumulative(variance: Fraction) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Both halves of the cumulative masses, the last (2^128) left out: no word reaches it."""
    ends, total = [], 0
    for mass in skellam_table(variance).masses[:-1]:
        total += mass
        ends.append(total)
    return (
        np.array([end >> 64 for end in ends], dtype=np.uint64),
        np.array([end & _MASK for end in ends], dtype=np.uint64),
    )


def _law(variance: Fraction) -> list[Decimal]:
    """P(0), P(1), … down to 10^−60, in the current decimal context."""
    mu = Decimal(variance.numerator) / Decimal(variance.denominator)
    two_over_mu = 2 / mu
    # log10 of P(k) falls below −k²·log10(e)/(2(μ + k)): 400 binary orders more than the table needs.
    start = 16
    while start * start < 600 * (float(variance) + start):
        start += max(1, start // 16)
    values = [Decimal(0)] * (start + 2)
    values[start] = Decimal(1)
    for k in range(start, 0, -1):
        values[k - 1] = values[k + 1] + two_over_mu * k * values[k]
    total = values[0] + 2 * sum(values[1:], Decimal(0))
    law = [value / total for value in values]
    floor = Decimal("1e-60")
    keep = next((k for k, p in enumerate(law) if p < floor), start)
    assert law[start] < Decimal("1e-120"), "the recurrence starts too close"
    return law[:keep]
