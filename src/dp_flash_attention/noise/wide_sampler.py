"""Wide integer noise from one narrow table and one coin: x = ±(k·A + u), whatever the standard deviation is.

With k = 2^b, A ≥ 0 from a table, u uniform below k, accept y = kA + u with a probability near exp(−γ), γ = u(u + 2kA)/2σ²
(Ducas, Durmus, Lepoint & Lyubashevsky 2013, section 6). A sign, and refusing −0, makes a symmetric law on ℤ of them. k is
chosen so that σ/k lies in [4, 8): nine of ten are accepted. Which law comes out is the table's and the coin's choice:
``WideLaw`` holds both.

Distance, per sample:
    table    the one-sided table is within d of its law; what is accepted of it within 1.5·d/0.9.
    coin     a 160-bit word is compared with the acceptance probability: 32 bits against a float32 of exp(−γ); where these are
             closer than 2^-19, 64 bits against a double; where those are closer than 2^-45 + 2·slack, all of them against 90
             decimal digits of the law's own probability. The float32 side is off by less than 2^-20 (six roundings of γ, of at
             most 0.37·2^-24 each, eight units in the last place of the exponential, two differences), the double's by less
             than 2^-47, and exp(−γ) itself by less than the law's slack, at most 2^-21; all in all off by less than 2^-150.
    supply   for n numbers, p tiles of proposals and two in reserve: whatever of the first n is refused is replaced by the
             next accepted one of the reserve. By Hoeffding's inequality the reserve runs short with probability below
             exp(−2·131072·(0.905 − 0.875)²) < 2^-340 (p = 14; less for fewer); then nothing is released. 2^-160 is
             charged for that.

Accepted proposals are independent of each other, and of which proposals are accepted. So filling gaps from the reserve
leaves n independent numbers of the law, and takes a third of the time of moving all accepted ones together.

Layout, little-endian, of a chunk's 131,072 proposals, of which the first 16,384 are the reserve; a shorter draw reads
the beginning of each part:
    ``DISCRETE_GAUSSIAN``   16 tiles of table bytes, for A
    ``BITS``                131,072 words of 4 bytes (8 if b > 24): u in the low bits, the sign in the top one; then as many coins
                            of 4 bytes
    ``BERNOULLI``           one block a proposal, of whose first 16 bytes the closer comparisons are made

Time: the scan and the arithmetic do not depend on the values; how many proposals are refused, and which, is independent of
the values that are accepted. The second comparison happens in every other chunk, to a proposal that nobody can tell from the
others, the exact one once in 2^44 proposals for the Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from dp_flash_attention.core.errors import NoiseUnavailableError
from dp_flash_attention.noise.chunk_threads import ChunkThreads
from dp_flash_attention.noise.discrete_gaussian import Consume, ExactCipher
from dp_flash_attention.noise.discrete_gaussian_scan import OVERFLOW_BYTES, TILE, TILE_BYTES, TableScan
from dp_flash_attention.noise.discrete_gaussian_table import DiscreteGaussianTable
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

# Threads meet at the interpreter's lock after every pass, so a pass must be long: 10 million samples on two cores of an AMD
# EPYC 9004 take 112 ms with 8 tiles, 85 with 16, 86 with 32.
_TILES: Final = 16
_PROPOSALS: Final = _TILES * TILE
_RESERVE_TILES: Final = 2
_RESERVE: Final = _RESERVE_TILES * TILE
CHUNK: Final = _PROPOSALS - _RESERVE
_COIN_BYTES: Final = 4
_MAX_SHIFT_32: Final = 24  # kA + u takes seven bits more
_ACCEPTED: Final = Fraction(9, 10)
_CLOSE_FLOAT32: Final = 2.0**-19
_CLOSE: Final = 2.0**-45
MAX_SLACK: Final = 2.0**-21
_MORE_BITS: Final = 128
DIGITS: Final = 90

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class WideLaw:
    """What a wide sampler draws from. Public.

    Attributes:
        purpose: Part of the subkey's name: other laws share no bits.
        shift: b.
        table: The law of A: masses of 0, 1, 2, …, at most 128 of them.
        half_inverse: 1/2σ² of the exponent γ.
        slack: How far the probability of acceptance may be from exp(−γ).
        acceptance: That probability for (kA, u), to ``DIGITS`` digits in the current decimal context.
        table_distance: How far the table is from the law of A that the acceptance is made for.
    """

    purpose: str
    shift: int
    table: DiscreteGaussianTable
    half_inverse: float
    slack: float
    acceptance: Callable[[int, int], Decimal]
    table_distance: Fraction

    def __post_init__(self) -> None:
        assert len(self.table.masses) <= 128, "seven bits hold every A"
        assert 0.0 <= self.slack <= MAX_SLACK, "the float32 comparison allows for no more"

    @property
    def total_variation(self) -> float:
        """Upper bound of the distance of one sample from the law; the module's docstring adds it up."""
        exact = Fraction(3, 2) * self.table_distance / _ACCEPTED + Fraction(1, 2**150) + Fraction(1, 2**160)
        return float(exact) * (1.0 + 1e-15)

    @property
    def largest(self) -> int:
        """The largest magnitude that can come out."""
        return (len(self.table.masses) << self.shift) - 1


class _Worker:
    """One thread's scratch."""

    def __init__(self, table: DiscreteGaussianTable, dtype: npt.DTypeLike) -> None:
        self.scan = TableScan(table, max_tiles=_TILES)
        self.tiles = new_buffer(_TILES * TILE_BYTES)
        self.words = new_buffer(_PROPOSALS * np.dtype(dtype).itemsize)
        self.coins = new_buffer(_PROPOSALS * _COIN_BYTES)
        self.scaled = np.empty(_PROPOSALS, dtype=dtype)
        self.low = np.empty(_PROPOSALS, dtype=dtype)
        self.float_u = np.empty(_PROPOSALS, dtype=np.float32)
        self.bound = np.empty(_PROPOSALS, dtype=np.float32)
        self.accepted = np.empty(_PROPOSALS, dtype=np.bool_)
        self.spare = np.empty(_PROPOSALS, dtype=np.bool_)


class WideSampler:
    """Draws from one law under any key; make it once.

    Args:
        law: What is drawn.
    """

    def __init__(self, law: WideLaw) -> None:
        self._law = law
        self._dtype = np.dtype("<i4" if law.shift <= _MAX_SHIFT_32 else "<i8")
        self._threads = ChunkThreads(lambda: _Worker(law.table, self._dtype), chunk=CHUNK)

    def draw(
        self, key: NoiseKey, num: int, *, step: int, stream: int, cipher: ExactCipher, first: int = 0
    ) -> Integers:
        """Returns ``num`` independent samples, int64; the arguments are those of ``stream``."""
        out = np.empty(checked_count("num", num), dtype=np.int64)

        def keep(start: int, numbers: npt.NDArray[Any]) -> None:
            out[start : start + len(numbers)] = numbers

        self.stream(key, num, keep, step=step, stream=stream, cipher=cipher, first=first)
        return out

    def stream(
        self,
        key: NoiseKey,
        num: int,
        consume: Consume,
        *,
        step: int,
        stream: int,
        cipher: ExactCipher,
        first: int = 0,
    ) -> None:
        """Hands ``num`` independent samples to ``consume``, chunk by chunk while they are in the cache, from several threads.

        The samples at the first places do not depend on ``num``, nor on the number of threads; with ``first`` they are
        those from that place on.

        Raises:
            InvalidInputError: If an argument is out of range.
            NoiseUnavailableError: If the cipher cannot be used.
        """
        count, start_at = checked_count("num", num), checked_count("first", first)
        checked_count("first + num", start_at + count)
        before, skipped = divmod(start_at, CHUNK)
        step, stream = checked_position(step, stream)
        own = key.derive(self._law.purpose)
        keystream: Keystream = ShakeKeystream(own) if cipher == "shake256" else CipherKeystream(own, cipher)
        source = keystream.at(step=step, stream=stream)

        def write_chunk(worker: _Worker, start: int) -> None:
            num = min(CHUNK, skipped + count - start)
            numbers = self._numbers(worker, source, before + start // CHUNK, num)
            consume(max(0, start - skipped), numbers[skipped:] if start == 0 else numbers)

        if count:
            self._threads.run(write_chunk, skipped + count, num_threads=torch.get_num_threads())

    def _numbers(self, worker: _Worker, source: Stream, index: int, num: int) -> npt.NDArray[Any]:
        """Returns the first ``num`` samples of one chunk; they lie in scratch."""
        tiles = _RESERVE_TILES - -num // TILE
        signed, accepted = self._proposals(worker, source, index, tiles)
        out = signed[_RESERVE : _RESERVE + num]
        gaps = np.flatnonzero(np.logical_not(accepted[_RESERVE : _RESERVE + num], out=worker.spare[:num]))
        spare = signed[:_RESERVE][accepted[:_RESERVE]]
        if len(spare) < len(gaps):
            raise NoiseUnavailableError(
                f"{len(gaps)} of {num} proposals were refused and only {len(spare)} of {_RESERVE} in reserve accepted, which "
                "has probability below 2^-340. Test this machine's memory and processor."
            )
        out[gaps] = spare[: len(gaps)]
        return out

    def _scan(self, worker: _Worker, source: Stream, index: int, tiles: int) -> npt.NDArray[Any]:
        """Returns A of the first proposals of a chunk; it lies in scratch."""
        blocks = source.block_bytes
        words = source.read(
            tiles * TILE_BYTES,
            domain=Domain.DISCRETE_GAUSSIAN,
            block=index * _TILES * TILE_BYTES // blocks,
            buffer=worker.tiles,
        )

        def read_overflow(tile: int) -> Bytes:
            return source.read(
                OVERFLOW_BYTES,
                domain=Domain.DISCRETE_GAUSSIAN_OVERFLOW,
                block=(index * _TILES + tile) * OVERFLOW_BYTES // blocks,
                buffer=new_buffer(OVERFLOW_BYTES),
            )

        return worker.scan.draw_magnitudes(words.reshape(tiles, TILE_BYTES), tiles * TILE, read_overflow)

    def _proposals(
        self, worker: _Worker, source: Stream, index: int, tiles: int
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Returns the first proposals of a chunk, with their signs, and which of them are accepted."""
        num, word_bytes = tiles * TILE, self._dtype.itemsize
        start = index * _PROPOSALS * (word_bytes + _COIN_BYTES) // source.block_bytes
        coins_start = start + _PROPOSALS * word_bytes // source.block_bytes
        words = source.read(num * word_bytes, domain=Domain.BITS, block=start, buffer=worker.words)
        coins = source.read(num * _COIN_BYTES, domain=Domain.BITS, block=coins_start, buffer=worker.coins)
        scaled, low, sign = worker.scaled[:num], worker.low[:num], words.view(self._dtype)
        np.copyto(scaled, self._scan(worker, source, index, tiles))
        np.left_shift(scaled, self._law.shift, out=scaled)
        np.bitwise_and(sign, (1 << self._law.shift) - 1, out=low)
        accepted = self._coins(worker, coins.view("<i4"), source, index * _PROPOSALS)
        np.bitwise_or(scaled, low, out=scaled)
        np.right_shift(sign, 8 * word_bytes - 1, out=low)  # −1 where the top bit is set
        # (y ^ −1) − (−1) is −y. Zero has no sign, and would otherwise come twice: 0 ^ −1 is −1, and nothing else is.
        np.bitwise_xor(scaled, low, out=scaled)
        accepted &= np.not_equal(scaled, -1, out=worker.spare[:num])
        np.subtract(scaled, low, out=scaled)
        return scaled, accepted

    def _coins(
        self, worker: _Worker, coins: npt.NDArray[Any], source: Stream, place: int
    ) -> npt.NDArray[np.bool_]:
        """True with the law's probability of acceptance each; ``scaled`` holds kA and ``low`` holds u."""
        num = len(coins)
        u, bound = worker.float_u[:num], worker.bound[:num]
        np.copyto(u, worker.low[:num], casting="unsafe")
        np.copyto(bound, worker.scaled[:num], casting="unsafe")
        np.add(bound, bound, out=bound)
        np.add(bound, u, out=bound)
        np.multiply(bound, np.float32(-self._law.half_inverse), out=bound)
        np.multiply(bound, u, out=bound)
        np.exp(bound, out=bound)
        np.subtract(bound, np.float32(0.5), out=bound)
        # A signed coin c stands for the uniform number c/2^32 + 1/2.
        np.copyto(u, coins, casting="unsafe")
        np.multiply(u, np.float32(2.0**-32), out=u)
        np.subtract(u, bound, out=u)
        accepted: npt.NDArray[np.bool_] = np.less(u, np.float32(0.0), out=worker.accepted[:num])
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
        gap = (word >> 96) * 2.0**-64 - math.exp(-float(low * (low + 2 * scaled)) * self._law.half_inverse)
        close = _CLOSE + 2.0 * self._law.slack
        return gap < 0.0 if abs(gap) >= close else self._exact_coin(scaled, low, word)

    def _exact_coin(self, scaled: int, low: int, word: int) -> bool:
        with localcontext(Context(prec=DIGITS)):
            return Decimal(word) < self._law.acceptance(scaled, low) * Decimal(2) ** (32 + _MORE_BITS)
