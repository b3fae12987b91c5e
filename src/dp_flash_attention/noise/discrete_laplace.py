"""Exact two-sided geometric ("discrete Laplace") integers, in rational arithmetic.

Follows Canonne, Kamath & Steinke 2020, "The Discrete Gaussian for Differential Privacy", algorithms 1 and
2. No floating-point number is computed, so there is no rounding to leak through.
"""

from __future__ import annotations

from fractions import Fraction
from numbers import Rational

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise.entropy import NoiseKey
from dp_flash_attention.noise.keystream import Domain, Stream, checked_position, new_buffer
from dp_flash_attention.noise.secure import CipherKeystream

_READ_BYTES = 256


class _Coins:
    """Exact uniform integers and Bernoulli coins from one key-stream position."""

    def __init__(self, source: Stream) -> None:
        self._source = source
        self._next_block = 0
        self._pool = b""

    def _bits(self, num_bits: int) -> int:
        num_bytes = (num_bits + 7) // 8
        while len(self._pool) < num_bytes:
            buffer, domain = new_buffer(_READ_BYTES), Domain.DISCRETE_LAPLACE
            self._pool += self._source.read(
                _READ_BYTES, domain=domain, block=self._next_block, buffer=buffer
            ).tobytes()
            self._next_block += _READ_BYTES // self._source.block_bytes
        taken, self._pool = self._pool[:num_bytes], self._pool[num_bytes:]
        return int.from_bytes(taken, "little") >> (8 * num_bytes - num_bits)

    def below(self, bound: int) -> int:
        """Returns a uniform integer in [0, bound), by rejection."""
        num_bits = (bound - 1).bit_length()
        while True:
            value = self._bits(num_bits)
            if value < bound:
                return value

    def exp_minus(self, gamma: Fraction) -> bool:
        """Returns True with probability exp(-gamma), gamma in [0, 1] (their algorithm 1)."""
        k = 1
        # Continue with probability gamma / k; the parity of where it stops has the law of exp(-gamma).
        while self.below(gamma.denominator * k) < gamma.numerator:
            k += 1
        return k % 2 == 1


def discrete_laplace(scale: Rational | float, *, key: NoiseKey, step: int = 0, stream: int = 0) -> int:
    """Returns an integer x with probability proportional to exp(-|x| / scale), exactly.

    Args:
        scale: Positive and rational; a float is taken as the exact dyadic number it is. A count with
            sensitivity 1 released with scale 1/ε is ε-private.
        key: Secret of the run.
        step: Position of the draw; the same (key, step, stream) gives the same integer.
        stream: Position of the draw.

    Raises:
        InvalidInputError: If ``scale`` is not a positive finite rational, or a position is out of range.
        NoiseUnavailableError: If ``cryptography`` cannot be imported.

    Guarantees:
        * Neighbouring relation, unit, sensitivity: the caller's. Public: ``scale``. Secret: the key.
        * Theorem: with truly random bits the law is exactly P(x) = (e^(1/s) - 1)/(e^(1/s) + 1)·e^(-|x|/s),
          so an integer query of sensitivity Δ is (Δ/s, 0)-private; with AES-256-CTR bits, computationally
          so. The running time depends on the value: do not let an observer time single draws.
        * Source: Canonne, Kamath & Steinke 2020, algorithm 2; Ghosh, Roughgarden & Sundararajan 2009.
    """
    exact = _checked_scale(scale)
    step, stream = checked_position(step, stream)
    coins = _Coins(CipherKeystream(key, "aes-256-ctr").at(step=step, stream=stream))
    numerator, denominator = exact.numerator, exact.denominator
    while True:
        remainder = coins.below(numerator)
        if not coins.exp_minus(Fraction(remainder, numerator)):
            continue
        quotient = 0
        while coins.exp_minus(Fraction(1)):
            quotient += 1
        magnitude = (remainder + numerator * quotient) // denominator
        negative = coins.below(2) == 1
        # Zero would otherwise be reached with both signs, twice as often as it should.
        if negative and magnitude == 0:
            continue
        return -magnitude if negative else magnitude


def _checked_scale(scale: object) -> Fraction:
    bound, remedy = "a positive finite rational number", "Pass sensitivity divided by epsilon."
    if isinstance(scale, bool) or not isinstance(scale, Rational | float):
        raise InvalidInputError("scale", scale, bound=bound, remedy=remedy)
    try:
        exact = Fraction(scale)
    except (ValueError, OverflowError) as error:
        raise InvalidInputError("scale", scale, bound=bound, remedy=remedy) from error
    if exact <= 0:
        raise InvalidInputError("scale", scale, bound=bound, remedy=remedy)
    return exact
