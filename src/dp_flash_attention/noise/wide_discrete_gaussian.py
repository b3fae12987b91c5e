"""Wide discrete Gaussians: the table of P(A) ∝ exp(−A²k²/2σ²), A ≥ 0, and the coin exp(−γ) for ``wide_sampler``.

Accepted y = kA + u have P(y) ∝ exp(−A²k²/2σ² − u(u + 2kA)/2σ²) = exp(−y²/2σ²), y ≥ 0; signs make N_ℤ(0, σ²) of them, with no
slack. The one-sided table is within d = 3·t + n·2^-128 of its law, t the two-sided table's certified distance and n its length.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Final

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise.discrete_gaussian import Consume, ExactCipher
from dp_flash_attention.noise.discrete_gaussian_table import (
    TABLE_BITS,
    DiscreteGaussianTable,
    build_table,
    certify_table,
)
from dp_flash_attention.noise.entropy import NoiseKey
from dp_flash_attention.noise.wide_sampler import CHUNK, Integers, WideLaw, WideSampler

__all__ = ["CHUNK", "MAX_VARIANCE", "MIN_VARIANCE", "WideDiscreteGaussian", "wide_shift"]

MIN_VARIANCE: Final = Fraction(64 * 64)
MAX_VARIANCE: Final = Fraction(2**90)


class WideDiscreteGaussian:
    """The sampler of one variance; make it once and draw under any key.

    Args:
        variance: σ², rational, from 64² to 2^90.

    Attributes:
        variance: As given.
        multiplier: k.
        table: The one-sided law of A; its masses are those of 0, 1, 2, …
        total_variation: Upper bound of the distance of one sample from N_ℤ(0, variance).
        largest: The largest magnitude that can come out.

    Raises:
        InvalidInputError: If ``variance`` is out of range.

    Guarantees:
        * Neighbouring relation, unit, sensitivity: the caller's. Public: all attributes. Secret: keys.
        * Theorem: N samples are within N·``total_variation`` of N independent ideal ones (the docstrings of this module and
          of ``wide_sampler``).
        * Source: Ducas, Durmus, Lepoint & Lyubashevsky 2013, section 6; Canonne, Kamath & Steinke 2020 (the law and its privacy).
    """

    def __init__(self, variance: Fraction) -> None:
        if not isinstance(variance, Fraction) or not MIN_VARIANCE <= variance <= MAX_VARIANCE:
            raise InvalidInputError(
                "variance",
                str(variance),
                bound="a Fraction from 4096 to 2^90",
                remedy="Use DiscreteGaussianGenerator for narrow noise.",
            )
        self.variance = variance
        shift = wide_shift(variance)
        self.multiplier = 1 << shift
        narrow = build_table(variance / self.multiplier**2)
        self.table, rounding = _one_sided(narrow)
        law = WideLaw(
            purpose=f"noise.wide-discrete-gaussian.v3:{variance}",
            shift=shift,
            table=self.table,
            half_inverse=float(1 / (2 * variance)),
            slack=0.0,
            acceptance=self._acceptance,
            table_distance=3 * certify_table(narrow).total_variation + rounding,
        )
        self.total_variation = law.total_variation
        self.largest = law.largest
        self._sampler = WideSampler(law)

    def draw(
        self,
        key: NoiseKey,
        num: int,
        *,
        step: int,
        stream: int = 0,
        first: int = 0,
        cipher: ExactCipher = "aes-256-ctr",
    ) -> Integers:
        """Returns ``num`` independent samples, int64. A larger ``num`` begins with the samples of a smaller one.

        Args:
            key: Secret; the samples use a subkey of their own for this variance.
            num: How many.
            step: A triple (key, step, stream) is for one release only.
            stream: As ``step``.
            first: Number of the first sample: samples f … f + n − 1 are those that f + n samples end with. Samples are made in
                chunks of ``CHUNK``, so that runs which begin and end at its multiples waste nothing.
            cipher: As in ``DiscreteGaussianGenerator``.

        Raises:
            InvalidInputError: If an argument is out of range.
            NoiseUnavailableError: If the cipher cannot be used.
        """
        return self._sampler.draw(key, num, step=step, stream=stream, first=first, cipher=cipher)

    def stream(
        self,
        key: NoiseKey,
        num: int,
        consume: Consume,
        *,
        step: int,
        stream: int = 0,
        cipher: ExactCipher = "aes-256-ctr",
    ) -> None:
        """Hands what ``draw`` returns to ``consume``, piece by piece and from several threads; no full-size buffer."""
        self._sampler.stream(key, num, consume, step=step, stream=stream, cipher=cipher)

    def _acceptance(self, scaled: int, low: int) -> Decimal:
        gamma = Fraction(low * (low + 2 * scaled)) / (2 * self.variance)
        return (-Decimal(gamma.numerator) / Decimal(gamma.denominator)).exp()


def wide_shift(variance: Fraction) -> int:
    """Returns b with σ/2^b in [4, 8): 16 ≤ σ²/4^b < 64."""
    return (math.floor(variance / 16).bit_length() - 1) // 2


def _one_sided(table: DiscreteGaussianTable) -> tuple[DiscreteGaussianTable, Fraction]:
    """The law P(m) ∝ exp(−m²/2s²) on m ≥ 0 from the law of |X|, and a bound of what rounding its masses costs.

    |X| has Q(0) = P(0) and Q(m) = 2·P(m): relative to the others, zero has to be twice as likely.
    """
    unit = 1 << TABLE_BITS
    zero = table.masses[0]
    masses = [2 * zero, *table.masses[1:]]
    scaled = [mass * unit // (unit + zero) for mass in masses]
    scaled[0] += unit - sum(scaled)
    while scaled[-1] == 0:
        scaled.pop()
    one_sided = DiscreteGaussianTable(
        variance=table.variance, precision_bits=TABLE_BITS, masses=tuple(scaled)
    )
    return one_sided, Fraction(len(masses), unit)
