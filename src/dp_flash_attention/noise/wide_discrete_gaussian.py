"""Wide discrete Gaussians from one narrow table and one coin: x = ±(k·A + u), whatever σ is.

With k = 2^b, A from the one-sided law P(A) ∝ exp(−A²k²/2σ²), A ≥ 0, and u uniform below k, accept y = kA + u with probability
exp(−γ), γ = u(u + 2kA)/2σ². Accepted y have P(y) ∝ exp(−y²/2σ²), y ≥ 0; a sign, and refusing −0, makes N_ℤ(0, σ²) of
them (Ducas, Durmus, Lepoint & Lyubashevsky 2013, section 6). k is chosen so that σ/k lies in [4, 8): nine of ten are accepted.

Distance, per sample:
    table    the one-sided table is within d = 3·t + n·2^-128 of its law, t the two-sided table's certified distance and n
             its length; what is accepted of it within 1.5·d/0.9.
    coin     a 192-bit word is compared with exp(−γ): 64 bits against a double, and all of them against 90 decimal
             digits where these are closer than 2^-45. Off by less than 2^-180.
    supply   a chunk proposes 65,536 for 57,344. By Hoeffding's inequality it runs short with probability below
             exp(−2·65536·(0.905 − 0.875)²) < 2^-170; then nothing is released. 2^-160 is charged for that.

Time: the scan and the arithmetic do not depend on the values; how many proposals are refused, and which, is independent of
the values that are accepted. The exact comparison happens once in 2^44 proposals.
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
_TILES: Final = 8
_PROPOSALS: Final = _TILES * TILE
CHUNK: Final = 7 * TILE
_WORD_BYTES: Final = 16 * TILE
_ACCEPTED: Final = Fraction(9, 10)
_CLOSE: Final = 2.0**-45
_DIGITS: Final = 90

Integers = npt.NDArray[np.int64]


class _Worker:
    """One thread's scratch, a tile wide so that it stays in the cache."""

    def __init__(self, table: DiscreteGaussianTable) -> None:
        self.scan = TableScan(table, max_tiles=_TILES)
        self.bytes = new_buffer(max(_WORD_BYTES, _TILES * TILE_BYTES))
        self.magnitudes = np.empty(_PROPOSALS, dtype=np.int16)
        self.scaled = np.empty(TILE, dtype=np.int64)
        self.low = np.empty(TILE, dtype=np.int64)
        self.float_u = np.empty(TILE, dtype=np.float64)
        self.float_bound = np.empty(TILE, dtype=np.float64)
        self.accepted = np.empty(TILE, dtype=np.bool_)
        self.negative = np.empty(TILE, dtype=np.bool_)


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
        exact = Fraction(3, 2) * one_sided / _ACCEPTED + Fraction(1, 2**180) + Fraction(1, 2**160)
        self.total_variation = float(exact) * (1.0 + 1e-15)
        self.largest = self.multiplier * len(self.table.masses) - 1
        self._half_inverse = float(1 / (2 * variance))
        self._threads = ChunkThreads(lambda: _Worker(self.table), chunk=CHUNK)

    def draw(
        self, key: NoiseKey, num: int, *, step: int, stream: int = 0, cipher: ExactCipher = "aes-256-ctr"
    ) -> Integers:
        """Returns ``num`` independent samples, int64. A larger ``num`` begins with the samples of a smaller one.

        Args:
            key: Secret; the samples use a subkey of their own for this variance.
            num: How many.
            step: A triple (key, step, stream) is for one release only.
            stream: As ``step``.
            cipher: As in ``DiscreteGaussianGenerator``.

        Raises:
            InvalidInputError: If an argument is out of range.
            NoiseUnavailableError: If the cipher cannot be used.
        """
        count = checked_count("num", num)
        step, stream = checked_position(step, stream)
        own = key.derive(f"noise.wide-discrete-gaussian.v1:{self.variance}")
        keystream: Keystream = ShakeKeystream(own) if cipher == "shake256" else CipherKeystream(own, cipher)
        source = keystream.at(step=step, stream=stream)
        out = np.empty(count, dtype=np.int64)

        def write_chunk(worker: _Worker, start: int) -> None:
            part = out[start : start + CHUNK]
            self._fill(worker, source, start // CHUNK, part)

        if count:
            self._threads.run(write_chunk, count, num_threads=torch.get_num_threads())
        return out

    def _fill(self, worker: _Worker, source: Stream, index: int, out: Integers) -> None:
        """Writes the first accepted samples of one chunk's proposals."""
        worker.magnitudes[:] = self._scan(worker, source, index)
        filled = 0
        for tile in range(_TILES):
            kept = self._tile(worker, source, index, tile)[: len(out) - filled]
            out[filled : filled + len(kept)] = kept
            filled += len(kept)
            if filled == len(out):
                return
        raise NoiseUnavailableError(
            f"Only {filled} of {_PROPOSALS} proposals were accepted, but {len(out)} are needed, which has "
            "probability below 2^-170. Test this machine's memory and processor."
        )

    def _scan(self, worker: _Worker, source: Stream, index: int) -> npt.NDArray[Any]:
        """Returns A of all proposals of a chunk, with a sign that is not used."""
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

        return worker.scan.draw(words.reshape(_TILES, TILE_BYTES), _PROPOSALS, read_overflow)

    def _tile(self, worker: _Worker, source: Stream, index: int, tile: int) -> Integers:
        """Returns the accepted ones of a tile's proposals."""
        blocks, place = source.block_bytes, index * _TILES + tile
        scaled, low = worker.scaled, worker.low
        np.abs(worker.magnitudes[tile * TILE : (tile + 1) * TILE], out=scaled, dtype=np.int64)
        scaled <<= self._shift
        pairs = source.read(
            _WORD_BYTES, domain=Domain.BITS, block=place * _WORD_BYTES // blocks, buffer=worker.bytes
        ).view("<u8")
        signed, coins = pairs[:TILE].view("<i8"), pairs[TILE:]
        np.bitwise_and(signed, self.multiplier - 1, out=low)
        accepted = self._coins(worker, coins, source, place)
        scaled += low
        negative = np.less(signed, 0, out=worker.negative)
        accepted &= (scaled != 0) | ~negative  # zero has no sign, and would otherwise come twice
        # −1 where the sign bit is set: (y ^ −1) − (−1) is −y.
        sign = np.right_shift(signed, 63, out=low)
        np.bitwise_xor(scaled, sign, out=scaled)
        np.subtract(scaled, sign, out=scaled)
        kept: Integers = scaled[accepted]
        return kept

    def _coins(
        self, worker: _Worker, words: npt.NDArray[Any], source: Stream, place: int
    ) -> npt.NDArray[np.bool_]:
        """True with probability exp(−u(u + 2kA)/2σ²) each; ``scaled`` holds kA and ``low`` holds u."""
        u, bound = worker.float_u, worker.float_bound
        np.copyto(u, worker.low)
        np.multiply(worker.scaled, 2.0, out=bound)
        bound += u
        bound *= u
        bound *= -self._half_inverse
        np.exp(bound, out=bound)
        uniform = np.multiply(words, 2.0**-64, out=u)
        uniform -= bound
        accepted: npt.NDArray[np.bool_] = np.less(uniform, 0.0, out=worker.accepted)
        np.abs(uniform, out=uniform)
        if float(uniform.min()) < _CLOSE:
            for i in np.flatnonzero(uniform < _CLOSE).tolist():
                accepted[i] = self._exact_coin(
                    int(worker.scaled[i]), int(worker.low[i]), int(words[i]), source, place * TILE + i
                )
        return accepted

    def _exact_coin(self, scaled: int, low: int, word: int, source: Stream, place: int) -> bool:
        """The same comparison with 128 bits more and 90 digits."""
        size = source.block_bytes
        more = source.read(size, domain=Domain.BERNOULLI, block=place, buffer=new_buffer(size))[:16]
        uniform = (word << 128) | int.from_bytes(more.tobytes(), "little")
        gamma = Fraction(low * (low + 2 * scaled)) / (2 * self.variance)
        with localcontext(Context(prec=_DIGITS)):
            exponent = -Decimal(gamma.numerator) / Decimal(gamma.denominator)
            return Decimal(uniform) < exponent.exp() * Decimal(2) ** 192


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
