"""Random words to magnitudes: the scan of one table over one tile, vectorised, the same work for every value.

A 128-bit mass is split, q_m = a_m·2^112 + b_m with a_m of 16 bits. One 16-bit *hot word* u decides almost every
sample: with A_m = a_0 + … + a_{m-1} and M = Σ a_m, the magnitude is m where A_m ≤ u < A_{m+1}. If u ≥ M, 112 more
random bits v make the number w = (u - M)·2^112 + v, uniform below Σ b_m = (2^16 - M)·2^112, and the magnitude is m
where B_m ≤ w < B_{m+1} with B_m = b_0 + … + b_{m-1}. So magnitude m owns a_m·2^112 + b_m = q_m of the 2^128
equally likely pairs (u, v): exactly the table's law. Both searches count how many thresholds a word reaches, over
all thresholds.

Few words go the second way (1.4e-4 at σ = 4), but nobody should see which. A tile's 8,192 samples form 64 groups
(sample i belongs to group i mod 64); each group has two *slots* of random bits, for the last and the first of its
samples with u ≥ M, and all 128 slots are searched whether used or not. If some group has more than two such
samples, all of them in the tile read bits of their own from another domain ("overflow"). Which of the two happens
depends on the hot words alone, so the law is the same.

Layout of a tile, 19,456 bytes, little-endian:

    0      uint16 [8192]      hot words
    16384  bits [8192]        signs, lowest bit of a byte first; 1 is negative
    17408  uint64 [128, 2]    slots: v = (second word >> 16)·2^64 + first word; slot g is the last of
                              group g, slot 64 + g its first if that is another sample
    overflow: uint64 [8192, 2], the same form, one pair a sample

How even the time is: every step is a NumPy pass over arrays whose size does not depend on the values, but for two
events. Overflow happens to a tile with probability 4e-5 at σ = 4, 4e-4 at σ = 8, 1e-2 at σ = 24. The first 32 bits
of a slot leave it undecided in one tile of 10,000 at σ = 4, of 1,700 at σ = 24; then the slots of all tiles at hand
are compared in full. Both say that something rare happened among 8,192 samples, and neither says to which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise.discrete_gaussian_table import TABLE_BITS, DiscreteGaussianTable
from dp_flash_attention.noise.keystream import Bytes

TILE: Final = 8192
TILE_BYTES: Final = 19456
OVERFLOW_BYTES: Final = 16 * TILE
_GROUPS: Final = 64
_MEMBERS: Final = TILE // _GROUPS
_SLOTS: Final = 2 * _GROUPS
_ROW: Final = np.dtype((np.void, _GROUPS))
_SIGN_START: Final = 2 * TILE
_SLOT_START: Final = _SIGN_START + TILE // 8
_REST_BITS: Final = TABLE_BITS - 16
# Counts of hot thresholds are added up in bytes.
_MAX_HOT: Final = 255

Words64 = npt.NDArray[np.uint64]
Magnitudes = npt.NDArray[Any]
ReadOverflow = Callable[[int], Bytes]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What the scan compares words with. Public.

    Attributes:
        hot: A_1, A_2, … without M, each of 16 bits.
        direct: M: hot words from here on need more bits.
        rest: B_1, B_2, … without their end, each of 128 bits.
    """

    hot: tuple[int, ...]
    direct: int
    rest: tuple[int, ...]


def scan_thresholds(table: DiscreteGaussianTable) -> Thresholds:
    """Returns the thresholds of a 128-bit table.

    Raises:
        InvalidInputError: If the table has another precision, or too many magnitudes for bytes.
    """
    if table.precision_bits != TABLE_BITS:
        raise InvalidInputError(
            "precision_bits",
            table.precision_bits,
            bound=str(TABLE_BITS),
            remedy="Use build_table's default.",
        )
    hot = [mass >> _REST_BITS for mass in table.masses]
    rest = [mass & (1 << _REST_BITS) - 1 for mass in table.masses]
    num_hot = max((m + 1 for m, count in enumerate(hot) if count), default=0)
    if not 0 < num_hot <= _MAX_HOT or sum(hot) >= 1 << 16:
        raise InvalidInputError(
            "the table's likely magnitudes",
            num_hot,
            bound=f"1 to {_MAX_HOT}",
            remedy="Use plan_layers.",
        )
    # The last threshold of either search is its end, which says nothing.
    *hot_ends, direct = accumulate(hot[:num_hot])
    *rest_ends, _ = accumulate(rest)
    return Thresholds(hot=tuple(hot_ends), direct=direct, rest=tuple(rest_ends))


class TableScan:
    """One table in the form the scan needs, with scratch. Not shared between threads.

    Args:
        table: A 128-bit table.
        max_tiles: Most tiles of one call. Their slots are searched together, because a search of 128 slots is mostly
            the cost of calling NumPy (measured at σ = 8: 41 µs for a tile alone, 14 µs a tile for eight).

    Raises:
        InvalidInputError: If the table has another precision, or too many magnitudes for bytes.
    """

    def __init__(self, table: DiscreteGaussianTable, max_tiles: int = 1) -> None:
        thresholds = scan_thresholds(table)
        self._direct = np.uint16(thresholds.direct)
        self._hot = np.array(thresholds.hot, dtype=np.uint16)[:, None]
        ends = thresholds.rest
        self._rest_top = np.array([end >> 96 for end in ends], dtype=np.uint32)[:, None]
        self._rest_high = np.array([end >> 64 for end in ends], dtype=np.uint64)[:, None]
        self._rest_low = np.array([end & (1 << 64) - 1 for end in ends], dtype=np.uint64)[:, None]
        self._allocate(max_tiles, len(thresholds.hot), len(ends))

    def _allocate(self, max_tiles: int, num_hot: int, num_rest: int) -> None:
        self._scanned = np.empty(num_hot * max_tiles * TILE, dtype=np.bool_)
        self._counts = np.empty(max_tiles * TILE, dtype=np.uint8)
        self._words = np.empty((max_tiles, TILE), dtype=np.uint16)
        self._late = np.empty((max_tiles, TILE), dtype=np.bool_)
        self._by_member = np.empty(_MEMBERS * max_tiles, dtype=_ROW)
        self._keys = np.empty(2 * TILE * max_tiles, dtype=np.uint8)
        self._reached = np.empty(num_rest * _SLOTS * max_tiles, dtype=np.bool_)
        # Up to σ = 9.5 every magnitude fits a byte, and bytes take half the time.
        dtype = np.int8 if num_rest < 128 else np.int16
        self._sign = np.empty(max_tiles * TILE, dtype=dtype)
        # One place more than samples: where slots without a sample write to.
        self._values = np.empty(max_tiles * TILE + 1, dtype=dtype)
        ascending = np.arange(1, _MEMBERS + 1, dtype=np.uint8)
        # [member, last or first, tile, group]
        self._rank = np.stack((ascending, ascending[::-1]), axis=1)[:, :, None, None].copy()
        tiles = np.arange(max_tiles)[:, None] * TILE
        self._origin = tiles + np.arange(_GROUPS)

    def draw(self, tiles: npt.NDArray[np.uint8], num: int, read_overflow: ReadOverflow) -> Magnitudes:
        """Returns the first ``num`` signed samples of some tiles, int8 or int16; they lie in scratch until the next call.

        Args:
            tiles: Random bytes, uint8 [number of tiles, ``TILE_BYTES``], at most ``max_tiles`` of them.
            num: More than the tiles before the last one hold, at most what all hold. The scan costs in proportion.
            read_overflow: Returns the ``OVERFLOW_BYTES`` bytes of the tile with the given index among these; called
                in the rare event only.
        """
        values = self.draw_magnitudes(tiles, num, read_overflow)
        sign = self._sign[:num]
        bits = np.unpackbits(tiles[:, _SIGN_START:_SLOT_START].reshape(-1), bitorder="little", count=num)
        np.negative(bits.view(np.int8), out=sign, dtype=sign.dtype)
        np.bitwise_xor(values, sign, out=values)
        np.subtract(values, sign, out=values)
        return values

    def draw_magnitudes(
        self, tiles: npt.NDArray[np.uint8], num: int, read_overflow: ReadOverflow
    ) -> Magnitudes:
        """Returns what ``draw`` does without its signs; arguments are those of ``draw``."""
        words, late = self._words[: len(tiles)], self._late[: len(tiles)]
        for tile, row in enumerate(tiles):
            np.copyto(words[tile], row[:_SIGN_START].view("<u2"))
        self._scan(words.reshape(-1)[:num], self._values[:num])
        np.greater_equal(words, self._direct, out=late)
        served = self._fill_slots(words, late, tiles[:, _SLOT_START:])
        if np.count_nonzero(late) > served.sum():
            for tile in np.flatnonzero(np.count_nonzero(late, axis=1) > served).tolist():
                self._overflow(tile, words[tile], late[tile], read_overflow(tile))
        return self._values[:num]

    def _scan(self, words: npt.NDArray[np.uint16], out: Magnitudes) -> None:
        """The magnitudes that hot words decide: how many thresholds each one reaches."""
        scanned = self._scanned[: len(self._hot) * len(out)].reshape(len(self._hot), len(out))
        counts = self._counts[: len(out)]
        np.greater_equal(words, self._hot, out=scanned)
        np.add.reduce(scanned.view(np.uint8), axis=0, dtype=np.uint8, out=counts)
        np.copyto(out, counts, casting="unsafe")

    def _fill_slots(
        self, words: npt.NDArray[np.uint16], late: npt.NDArray[np.bool_], slot_bytes: Bytes
    ) -> npt.NDArray[np.int64]:
        """Searches every slot, writes what belongs to a sample to its place, and counts those of each tile."""
        num = len(words)
        keys = self._keys[: 2 * TILE * num].reshape(_MEMBERS, 2, num, _GROUPS)
        by_member = self._by_member[: _MEMBERS * num].reshape(_MEMBERS, num)
        # A member's 64 groups move as one item: byte by byte the same copy takes six times as long.
        np.copyto(by_member, late.view(_ROW).T)
        rows = by_member.view(np.uint8).reshape(_MEMBERS, 1, num, _GROUPS)
        np.multiply(rows, self._rank, out=keys)
        extremes: npt.NDArray[np.uint8] = np.maximum.reduce(keys.reshape(_MEMBERS, -1), axis=0)
        members = extremes.reshape(2, num, _GROUPS).astype(np.int64)
        members[0] -= 1  # the last late one, or -1
        np.subtract(_MEMBERS, members[1], out=members[1])  # the first late one, or beyond the end
        used = np.stack((members[0] >= 0, members[1] < members[0]))
        places = np.where(used, members * _GROUPS + self._origin[:num], len(self._values) - 1).reshape(-1)
        relative = words.reshape(-1).take(places, mode="clip").astype(np.uint64) - np.uint64(self._direct)
        # [tile, slot, word] to [last or first, tile, group, word], the order of places.
        by_tile = np.ascontiguousarray(slot_bytes).view("<u8").reshape(num, 2, _GROUPS, 2)
        pairs = by_tile.swapaxes(0, 1).reshape(-1, 2)
        self._values[places] = self._search(relative, pairs, used.reshape(-1))
        served: npt.NDArray[np.int64] = used.sum(axis=(0, 2))
        return served

    def _search(self, relative: Words64, pairs: Words64, used: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
        """How many thresholds the words (relative, 112 bits of a pair) reach, by their first 32 bits if possible."""
        top = ((relative << np.uint64(16)) | (pairs[:, 1] >> np.uint64(48))).astype(np.uint32)
        reached = self._reached[: len(self._rest_top) * len(top)].reshape(-1, len(top))
        np.greater_equal(top, self._rest_top, out=reached)
        # Adding bytes up in bytes takes a third of the time.
        wide = np.uint16 if len(self._rest_top) > _MAX_HOT else np.uint8
        count: npt.NDArray[Any] = np.add.reduce(reached.view(np.uint8), axis=0, dtype=wide)
        np.equal(top, self._rest_top, out=reached)
        if (reached & used).any():
            return self._search_in_full(relative, pairs)
        return count

    def _search_in_full(self, relative: Words64, pairs: Words64) -> npt.NDArray[Any]:
        high = (relative << np.uint64(48)) | (pairs[:, 1] >> np.uint64(16))
        above = (high > self._rest_high) | ((high == self._rest_high) & (pairs[:, 0] >= self._rest_low))
        count: npt.NDArray[Any] = above.sum(axis=0)
        return count

    def _overflow(
        self, tile: int, words: npt.NDArray[np.uint16], late: npt.NDArray[np.bool_], overflow: Bytes
    ) -> None:
        """Gives all late samples of a tile that has too many for its slots bits of their own."""
        places = np.flatnonzero(late)
        pairs = overflow.view("<u8").reshape(TILE, 2)[places]
        relative = words[places].astype(np.uint64) - np.uint64(self._direct)
        self._values[tile * TILE + places] = self._search_in_full(relative, pairs)
