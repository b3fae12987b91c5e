"""Wide discrete Gaussians from one narrow table and one coin: x = ±(k·A + u), whatever σ is.

With k = 2^b, A from the one-sided law P(A) ∝ exp(−A²k²/2σ²), A ≥ 0, and u uniform below k, accept y = kA + u with probability
exp(−γ), γ = u(u + 2kA)/2σ². Accepted y have P(y) ∝ exp(−y²/2σ²), y ≥ 0; a sign, and refusing −0, makes N_ℤ(0, σ²) of
them (Ducas, Durmus, Lepoint & Lyubashevsky 2013, section 6). k is chosen so that σ/k lies in [4, 8): nine of ten are accepted.

Distance, per sample:
    table    the one-sided table is within d = 3·t + n·2^-128 of its law, t the two-sided table's certified distance and n
             its length; what is accepted of it within 1.5·d/0.9.
    coin     a 160-bit word is compared with exp(−γ): 32 bits against a float32; where these are closer than 2^-19, 64 bits
             against a double; where those are closer than 2^-45, all of them against 90 decimal digits. The float32 side
             is off by less than 2^-20 (six roundings of γ, of at most 0.37·2^-24 each, eight units in the last place
             of the exponential, two differences), the double's by less than 2^-47; all in all off by less than 2^-150.
    supply   a chunk proposes 131,072 for 114,688. By Hoeffding's inequality it runs short with probability below
             exp(−2·131072·(0.905 − 0.875)²) < 2^-340; then nothing is released. 2^-160 is charged for that.

Layout, little-endian, all of a chunk's proposals beside each other:
    ``DISCRETE_GAUSSIAN``   16 tiles of table bytes, for A
    ``BITS``                131,072 words of 4 bytes (8 if b > 24): u in the low bits, the sign in the top one; then as many coins
                            of 4 bytes
    ``BERNOULLI``           one block a proposal, of whose first 16 bytes the closer comparisons are made

Time: the scan and the arithmetic do not depend on the values; how many proposals are refused, and which, is independent of
the values that are accepted. The second comparison happens in every other chunk, to a proposal that nobody can tell from the
others, the exact one once in 2^44 proposals.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError
from dp_flash_attention.noise.chunk_threads import ChunkThreads
from dp_flash_attention.noise.discrete_gaussian import ExactCipher
from dp_flash_attention.noise.discrete_gaussian_scan import OVERFLOW_BYTES, TILE, TILE_BYTES, TableScan
from dp_flash_attention.noise.discrete_gaussian_table import (
    TABLE_BITS,
    DiscreteGaussianTable,
    build_table,
    certify_table,
)
from dp_flash_attention.noise.entropy import NoiseKey
from dp_flash_attention.noise.keystream import (
    Bytes,
    Domain,
    Keystream,
    Stream,
    checked_count,
    checked_position,
    new_buffer,
)
from dp_flash_attention.noise.secure import CipherKeystream
from dp_flash_attention.noise.shake import ShakeKeystream

MIN_VARIANCE: Final = Fraction(64 * 64)
MAX_VARIANCE: Final = Fraction(2**90)
# Threads meet at the interpreter's lock after every pass, so a pass must be long: 10 million samples on two cores of an AMD
# EPYC 9004 take 112 ms with 8 tiles, 85 with 16, 86 with 32.
_TILES: Final = 16
_PROPOSALS: Final = _TILES * TILE
CHUNK: Final = 14 * TILE
_COIN_BYTES: Final = 4
_MAX_SHIFT_32: Final = 24  # kA + u takes seven bits more
_ACCEPTED: Final = Fraction(9, 10)
_CLOSE_FLOAT32: Final = 2.0**-19
_CLOSE: Final = 2.0**-45
_MORE_BITS: Final = 128
_DIGITS: Final = 90

Integers = npt.NDArray[np.int64]


class _Worker:
    """One thread's scratch."""

    def __init__(self, table: DiscreteGaussianTable, dtype: npt.DTypeLike) -> None:
        self.scan = TableScan(table, max_tiles=_TILES)
        word_bytes = np.dtype(dtype).itemsize
        self.bytes = new_buffer(max(_PROPOSALS * (word_bytes + _COIN_BYTES), _TILES * TILE_BYTES))
        self.scaled = np.empty(_PROPOSALS, dtype=dtype)
        self.low = np.empty(_PROPOSALS, dtype=dtype)
        self.float_u = np.empty(_PROPOSALS, dtype=np.float32)
        self.bound = np.empty(_PROPOSALS, dtype=np.float32)
        self.accepted = np.empty(_PROPOSALS, dtype=np.bool_)
        self.spare = np.empty(_PROPOSALS, dtype=np.bool_)


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
        * Theorem: N samples are within N·``total_variation`` of N independent ideal ones (the module's docstring).
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
        # σ/k in [4, 8): 16 ≤ σ²/k² < 64.
        self._shift = (math.floor(variance / 16).bit_length() - 1) // 2
        self.multiplier = 1 << self._shift
        narrow = build_table(variance / self.multiplier**2)
        self.table, rounding = _one_sided(narrow)
        one_sided = 3 * certify_table(narrow).total_variation + rounding
        exact = Fraction(3, 2) * one_sided / _ACCEPTED + Fraction(1, 2**150) + Fraction(1, 2**160)
        self.total_variation = float(exact) * (1.0 + 1e-15)
        self.largest = self.multiplier * len(self.table.masses) - 1
        assert len(self.table.masses) <= 128, "seven bits hold every A"
        self._half_inverse = float(1 / (2 * variance))
        dtype = np.dtype("<i4" if self._shift <= _MAX_SHIFT_32 else "<i8")
        self._dtype, self._top = dtype, np.iinfo(dtype).min  # the sign bit alone
        self._threads = ChunkThreads(lambda: _Worker(self.table, dtype), chunk=CHUNK)

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
        count, start_at = checked_count("num", num), checked_count("first", first)
        checked_count("first + num", start_at + count)
        step, stream = checked_position(step, stream)
        own = key.derive(f"noise.wide-discrete-gaussian.v2:{self.variance}")
        keystream: Keystream = ShakeKeystream(own) if cipher == "shake256" else CipherKeystream(own, cipher)
        source = keystream.at(step=step, stream=stream)
        before, skipped = divmod(start_at, CHUNK)
        out = np.empty(skipped + count, dtype=np.int64)

        def write_chunk(worker: _Worker, start: int) -> None:
            part = out[start : start + CHUNK]
            self._fill(worker, source, before + start // CHUNK, part)

        if count:
            self._threads.run(write_chunk, len(out), num_threads=torch.get_num_threads())
        return out[skipped:]

    def _fill(self, worker: _Worker, source: Stream, index: int, out: Integers) -> None:
        """Writes the first accepted samples of one chunk's proposals."""
        kept = self._accepted(worker, self._scan(worker, source, index), source, index)
        if len(kept) < len(out):
            raise NoiseUnavailableError(
                f"Only {len(kept)} of {_PROPOSALS} proposals were accepted, but {len(out)} are needed, which has "
                "probability below 2^-340. Test this machine's memory and processor."
            )
        _copy_signed(kept[: len(out)], worker.low[: len(out)], out)

    def _scan(self, worker: _Worker, source: Stream, index: int) -> npt.NDArray[Any]:
        """Returns A of all proposals of a chunk; it lies in scratch."""
        blocks = source.block_bytes
        words = source.read(
            _TILES * TILE_BYTES,
            domain=Domain.DISCRETE_GAUSSIAN,
            block=index * _TILES * TILE_BYTES // blocks,
            buffer=worker.bytes,
        )

        def read_overflow(tile: int) -> Bytes:
            return source.read(
                OVERFLOW_BYTES,
                domain=Domain.DISCRETE_GAUSSIAN_OVERFLOW,
                block=(index * _TILES + tile) * OVERFLOW_BYTES // blocks,
                buffer=new_buffer(OVERFLOW_BYTES),
            )

        return worker.scan.draw_magnitudes(words.reshape(_TILES, TILE_BYTES), _PROPOSALS, read_overflow)

    def _accepted(
        self, worker: _Worker, magnitudes: npt.NDArray[Any], source: Stream, index: int
    ) -> npt.NDArray[Any]:
        """Returns the accepted ones of a chunk's proposals as sign bit and magnitude."""
        size = _PROPOSALS * (self._dtype.itemsize + _COIN_BYTES)
        read = source.read(
            size, domain=Domain.BITS, block=index * size // source.block_bytes, buffer=worker.bytes
        )
        coin_bytes = _PROPOSALS * _COIN_BYTES
        words, coins = read[:-coin_bytes].view(self._dtype), read[-coin_bytes:].view("<i4")
        scaled, low = worker.scaled, worker.low
        np.copyto(scaled, magnitudes)
        np.left_shift(scaled, self._shift, out=scaled)
        np.bitwise_and(words, self.multiplier - 1, out=low)
        accepted = self._coins(worker, coins, source, index * _PROPOSALS)
        np.bitwise_or(scaled, low, out=scaled)
        np.bitwise_and(words, self._top, out=low)
        np.bitwise_or(scaled, low, out=scaled)
        # Zero has no sign, and would otherwise come twice.
        accepted &= np.not_equal(scaled, self._top, out=worker.spare)
        kept: npt.NDArray[Any] = scaled[accepted]
        return kept

    def _coins(
        self, worker: _Worker, coins: npt.NDArray[Any], source: Stream, place: int
    ) -> npt.NDArray[np.bool_]:
        """True with probability exp(−u(u + 2kA)/2σ²) each; ``scaled`` holds kA and ``low`` holds u."""
        u, bound = worker.float_u, worker.bound
        np.copyto(u, worker.low, casting="unsafe")
        np.copyto(bound, worker.scaled, casting="unsafe")
        np.add(bound, bound, out=bound)
        np.add(bound, u, out=bound)
        np.multiply(bound, np.float32(-self._half_inverse), out=bound)
        np.multiply(bound, u, out=bound)
        np.exp(bound, out=bound)
        np.subtract(bound, np.float32(0.5), out=bound)
        # A signed coin c stands for the uniform number c/2^32 + 1/2.
        np.copyto(u, coins, casting="unsafe")
        np.multiply(u, np.float32(2.0**-32), out=u)
        np.subtract(u, bound, out=u)
        accepted: npt.NDArray[np.bool_] = np.less(u, np.float32(0.0), out=worker.accepted)
        np.abs(u, out=u)
        if float(u.min()) < _CLOSE_FLOAT32:
            for i in np.flatnonzero(u < _CLOSE_FLOAT32).tolist():
                scaled, low, coin = int(worker.scaled[i]), int(worker.low[i]), int(coins[i]) + 2**31
                accepted[i] = self._close_coin(scaled, low, coin, source, place + i)
        return accepted

    def _close_coin(self, scaled: int, low: int, coin: int, source: Stream, place: int) -> bool:
        """The same comparison with 128 bits more: of 64 bits with a double, or of all with 90 digits."""
        size = source.block_bytes
        more = source.read(size, domain=Domain.BERNOULLI, block=place, buffer=new_buffer(size))[:16]
        word = (coin << _MORE_BITS) | int.from_bytes(more.tobytes(), "big")
        gap = (word >> 96) * 2.0**-64 - math.exp(-float(low * (low + 2 * scaled)) * self._half_inverse)
        return gap < 0.0 if abs(gap) >= _CLOSE else self._exact_coin(scaled, low, word)

    def _exact_coin(self, scaled: int, low: int, word: int) -> bool:
        gamma = Fraction(low * (low + 2 * scaled)) / (2 * self.variance)
        with localcontext(Context(prec=_DIGITS)):
            exponent = -Decimal(gamma.numerator) / Decimal(gamma.denominator)
            return Decimal(word) < exponent.exp() * Decimal(2) ** (32 + _MORE_BITS)


def _copy_signed(kept: npt.NDArray[Any], scratch: npt.NDArray[Any], out: Integers) -> None:
    """Writes numbers that come as sign bit and magnitude; ``kept`` is used up."""
    magnitude = np.bitwise_and(kept, np.iinfo(kept.dtype).max, out=scratch)
    np.right_shift(kept, 8 * kept.dtype.itemsize - 1, out=kept)  # −1 where the sign bit is set
    # (m ^ −1) − (−1) is −m.
    np.bitwise_xor(magnitude, kept, out=magnitude)
    np.subtract(magnitude, kept, out=magnitude)
    np.copyto(out, magnitude)


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
