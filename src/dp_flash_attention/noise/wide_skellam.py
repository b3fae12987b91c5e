"""Wide Skellam noise: the table of P(A) ∝ I_{kA}(μ), A ≥ 0, and the coin I_{kA+u}(μ)/I_{kA}(μ) for ``wide_sampler``.

Skellam's law is P(y) = e^−μ·I_|y|(μ), which falls with |y|, so the coin's probability is at most 1 and accepted y = kA + u have
P(y) ∝ I_y(μ), y ≥ 0: signs make the law of it.

The coin, fast. I_{ν+1}/I_ν lies between μ/(s + √(μ² + (s+1)²)) and μ/(s + √(μ² + s²)) = exp(−asinh(s/μ)), s = ν + 1/2, for ν ≥ 0
(Amos 1974, equations 11 and 16). With t − t³/6 ≤ asinh t ≤ t, and the sum of (ν + 1/2)/μ over ν = kA … y−1 being
(y² − (kA)²)/2μ = γ, the exponent of the discrete Gaussian of the same variance, the logarithm of the coin's probability is
between −γ − u·y/μ² and −γ + u·y³/6μ³. With u < k and y below the table's end that is the law's *slack*, 114/μ: the float
and the double of exp(−γ) decide nearly every coin, as for the Gaussian.

The law, exactly. For any N, (1/N)·Σ_j exp(μ(cos θ_j − 1))·cos(yθ_j) over θ_j = 2πj/N, 0 ≤ j < N, is Σ_m P(y + mN): the
discrete Fourier transform of a law is the law folded. With N ≥ 40σ and |y| ≤ 14σ the folds are at most P(|X| ≥ 26σ) ≤
2·exp(−338/(1 + 26/3σ)) < 10^−140 (Bernstein). Terms fall like exp(−11μθ²/24) for θ ≤ 1 and are below exp(−μ/5) beyond; those
left out, with 11μθ²/24 > 320, add less than 10^−130. What is left, some 170 terms of 150 digits, gives P(y) to 10^−120
absolutely, and where the table has mass, P ≥ 10^−60, to 10^−60 of itself. The recurrence of cosines loses at most the square
of its length.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Final

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise.discrete_gaussian import Consume, ExactCipher
from dp_flash_attention.noise.discrete_gaussian_table import TABLE_BITS, DiscreteGaussianTable
from dp_flash_attention.noise.entropy import NoiseKey
from dp_flash_attention.noise.wide_discrete_gaussian import wide_shift
from dp_flash_attention.noise.wide_sampler import Integers, WideLaw, WideSampler

MIN_VARIANCE: Final = Fraction(2**28)
MAX_VARIANCE: Final = Fraction(2**90)
_DIGITS: Final = 150
# What the terms that are left out, the folds and 150 digits leave of a table's masses, which are at most 1.
_ARITHMETIC: Final = Fraction(1, 10**50)
_EXPONENT: Final = 320
_FOLD: Final = 40


class SkellamLaw:
    """P(y) = e^−μ·I_|y|(μ) for wide μ, to 60 digits where it is above 10^−60.

    Args:
        variance: μ, from 2^28 to 2^90.
    """

    def __init__(self, variance: Fraction) -> None:
        self._size = _FOLD * (math.isqrt(math.ceil(variance)) + 1)
        with localcontext(Context(prec=_DIGITS)):
            mu = Decimal(variance.numerator) / Decimal(variance.denominator)
            self._turn = 2 * _pi() / self._size
            # 11μθ²/24 > 320 from here on.
            num = int((Decimal(24 * _EXPONENT) / (11 * mu)).sqrt() / self._turn) + 1
            self._weights = [(mu * _cos_minus_1(self._turn * j)).exp() for j in range(1, num + 1)]

    def probability(self, y: int) -> Decimal:
        """Returns P(y) for |y| ≤ 14σ."""
        with localcontext(Context(prec=_DIGITS)):
            first = 1 + _cos_minus_1(self._turn * y)
            total, before, cosine = Decimal(1), Decimal(1), first
            for weight in self._weights:
                total += 2 * weight * cosine
                before, cosine = cosine, 2 * first * cosine - before
            return total / self._size


class WideSkellam:
    """The sampler of one variance; make it once and draw under any key.

    Args:
        variance: μ, rational, from 2^28 to 2^90.

    Attributes:
        variance: As given.
        multiplier: k.
        table: The one-sided law of A; its masses are those of 0, 1, 2, …
        total_variation: Upper bound of the distance of one sample from Skellam's law.
        largest: The largest magnitude that can come out.

    Raises:
        InvalidInputError: If ``variance`` is out of range.

    Guarantees:
        * Neighbouring relation, unit, sensitivity: the caller's. Public: all attributes. Secret: keys.
        * Theorem: N samples are within N·``total_variation`` of N independent ideal ones (the docstrings of this module and
          of ``wide_sampler``); sums of Skellam numbers are Skellam numbers, variances added.
        * Time: as ``wide_sampler``: no memory is read at a place that depends on a value.
        * Source: Skellam 1946; Amos 1974; Ducas, Durmus, Lepoint & Lyubashevsky 2013, section 6.
    """

    def __init__(self, variance: Fraction) -> None:
        if not isinstance(variance, Fraction) or not MIN_VARIANCE <= variance <= MAX_VARIANCE:
            raise InvalidInputError(
                "variance",
                str(variance),
                bound="a Fraction from 2^28 to 2^90",
                remedy="Use skellam for narrow noise, and a wider grid for wider.",
            )
        self.variance = variance
        shift = wide_shift(variance)
        self.multiplier = k = 1 << shift
        self._law = SkellamLaw(variance)
        self.table, distance = _table(self._law, k, variance / k**2)
        end = k * len(self.table.masses)
        slack = max(Fraction(k * end) / variance**2, Fraction(k * end**3) / (6 * variance**3))
        law = WideLaw(
            purpose=f"noise.wide-skellam.v1:{variance}",
            shift=shift,
            table=self.table,
            half_inverse=float(1 / (2 * variance)),
            slack=float(slack) * (1.0 + 1e-15),
            acceptance=self.acceptance,
            table_distance=distance,
        )
        self.total_variation = law.total_variation
        self.largest = law.largest
        self._sampler = WideSampler(law)

    def draw(
        self, key: NoiseKey, num: int, *, step: int, stream: int = 0, cipher: ExactCipher = "aes-256-ctr"
    ) -> Integers:
        """Returns ``num`` independent samples, int64; arguments and errors are those of ``WideDiscreteGaussian.draw``."""
        return self._sampler.draw(key, num, step=step, stream=stream, cipher=cipher)

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

    def acceptance(self, scaled: int, low: int) -> Decimal:
        """Returns the coin's probability I_{kA+u}(μ)/I_{kA}(μ) for ``scaled`` = kA and ``low`` = u, to 60 digits."""
        return self._law.probability(scaled + low) / self._law.probability(scaled)


def _table(law: SkellamLaw, k: int, narrow: Fraction) -> tuple[DiscreteGaussianTable, Fraction]:
    """The table of P(A) ∝ P(kA), and its distance from it."""
    unit = 1 << TABLE_BITS
    # Behind 13.5σ a mass is below 2^-128, and each is less than half of the one before: all of them less than the last.
    num = math.isqrt(math.ceil(narrow * 13 * 14)) + 1
    values = [Fraction(law.probability(k * a)) for a in range(num + 1)]
    total = sum(values, Fraction(0))
    masses = [int(value / total * unit) for value in values]
    masses[0] += unit - sum(masses)
    while masses[-1] == 0:
        masses.pop()
    padded = [*masses, *[0] * (len(values) - len(masses))]
    gaps = sum(
        (abs(value / total - Fraction(mass, unit)) for value, mass in zip(values, padded, strict=True)),
        Fraction(0),
    )
    table = DiscreteGaussianTable(variance=narrow, precision_bits=TABLE_BITS, masses=tuple(masses))
    return table, gaps / 2 + 2 * values[-1] / total + _ARITHMETIC


def _cos_minus_1(angle: Decimal) -> Decimal:
    """Cos − 1 by Taylor's series, which keeps the digits of small angles; for angles of at most 2π."""
    square = angle * angle
    total, term, n = Decimal(0), Decimal(1), 0
    while term and term.adjusted() > total.adjusted() - _DIGITS:
        term = -term * square / ((n + 1) * (n + 2))
        total, n = total + term, n + 2
    return total


@lru_cache(maxsize=1)
def _pi() -> Decimal:
    """π to 160 digits: 16·atan(1/5) − 4·atan(1/239), in whole numbers (Machin 1706)."""
    unit = 10 ** (_DIGITS + 20)

    def arctangent_of_inverse(x: int) -> int:
        total, power, n = 0, unit // x, 0
        while power:
            total += (-1) ** n * (power // (2 * n + 1))
            power, n = power // (x * x), n + 1
        return total

    with localcontext(Context(prec=_DIGITS + 20)):
        pi: Decimal = Decimal(16 * arctangent_of_inverse(5) - 4 * arctangent_of_inverse(239)) / unit
        return pi
