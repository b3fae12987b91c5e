"""The discrete Gaussian on ℤ around any rational centre, in rational arithmetic: slow, and exact.

P(x) ∝ exp(−(x−c)²/2σ²) by rejection from a discrete Laplace law around the nearest integer. With f = c − round(c),
u = |y|, s = sign(y), t = ⌊σ⌋ + 1 and y drawn with P(y) ∝ exp(−u/t), accept round(c) + y with probability

    exp(−(u − s·f − σ²/t)²/2σ² − (|f| − s·f)/t),

which is the ratio of both laws over its bound exp(|f|/t + σ²/2t²): complete the square. Both exponents are rational and
never negative, so every coin is exact (Canonne, Kamath & Steinke 2020, algorithms 1 to 3, here with a centre).

Running time depends on what comes out. Do not let an observer time single draws.
"""

from __future__ import annotations

import math
from fractions import Fraction

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import NoiseKey, SecureBits

_CHUNK_WORDS = 256
_WORD_BITS = 64


class RationalCoins:
    """Exact uniform integers and coins from a key's secret bits.

    Args:
        key: Secret; used for nothing else at this ``step``.
        step: Position.

    Raises:
        NoiseUnavailableError: If ``cryptography`` cannot be imported.
    """

    def __init__(self, key: NoiseKey, *, step: int = 0) -> None:
        self._bits = SecureBits(key)
        self._step = step
        self._chunk = 0
        self._words: list[int] = []

    def below(self, bound: int) -> int:
        """Returns a uniform integer in [0, bound), by rejection."""
        num_bits = (bound - 1).bit_length()
        num_words = -(-num_bits // _WORD_BITS)
        while True:
            value = 0
            for _ in range(num_words):
                value = (value << _WORD_BITS) | self._word()
            value >>= num_words * _WORD_BITS - num_bits
            if value < bound:
                return value

    def exp_minus(self, gamma: Fraction) -> bool:
        """Returns True with probability exp(−gamma), gamma ≥ 0 rational."""
        while gamma > 1:
            if not self._exp_minus_unit(Fraction(1)):
                return False
            gamma -= 1
        return self._exp_minus_unit(gamma)

    def _exp_minus_unit(self, gamma: Fraction) -> bool:
        k = 1
        # Continue with probability gamma / k; the parity of where it stops has the law of exp(−gamma).
        while self.below(gamma.denominator * k) < gamma.numerator:
            k += 1
        return k % 2 == 1

    def _word(self) -> int:
        if not self._words:
            # Each chunk is a stream of its own: no position is read twice.
            self._words = self._bits.uint64(_CHUNK_WORDS, step=self._step, stream=self._chunk).tolist()
            self._chunk += 1
        return self._words.pop()


def centred_discrete_gaussian(
    coins: RationalCoins, *, variance: Fraction, centre: Fraction = Fraction(0)
) -> int:
    """Returns an integer x with probability proportional to exp(−(x−centre)²/(2·variance)), exactly.

    Args:
        coins: Where the randomness comes from.
        variance: σ², rational and above 0.
        centre: c, rational.

    Raises:
        InvalidInputError: If ``variance`` is not above 0.
    """
    if variance <= 0:
        raise InvalidInputError(
            "variance", str(variance), bound="above 0", remedy="Pass a rational variance."
        )
    nearest = round(centre)
    f = centre - nearest
    t = math.isqrt(variance.numerator // variance.denominator) + 1
    while True:
        y = _discrete_laplace(coins, t)
        leaning = f if y >= 0 else -f
        gap = abs(y) - leaning - variance / t
        if coins.exp_minus(gap * gap / (2 * variance) + (abs(f) - leaning) / t):
            return nearest + y


def _discrete_laplace(coins: RationalCoins, t: int) -> int:
    """Returns y with P(y) ∝ exp(−|y|/t), t a whole number."""
    while True:
        remainder = coins.below(t)
        if not coins.exp_minus(Fraction(remainder, t)):
            continue
        quotient = 0
        while coins.exp_minus(Fraction(1)):
            quotient += 1
        magnitude = remainder + t * quotient
        negative = coins.below(2) == 1
        # Zero would otherwise be reached with both signs, twice as often as it should.
        if negative and magnitude == 0:
            continue
        return -magnitude if negative else magnitude
