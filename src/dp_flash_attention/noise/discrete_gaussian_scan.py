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
events. Overflow has probability below 2e-7 a tile at σ = 4 and 2e-4 at σ = 8. Deciding a slot by its first 32
bits fails with probability below 2^-18 a tile, and then the whole tile's slots are compared in full.
"""

from __future__ import annotations

from collections.abc import Callable
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
_SIGN_START: Final = 2 * TILE
_SLOT_START: Final = _SIGN_START + TILE // 8
_REST_BITS: Final = TABLE_BITS - 16
# Counts of hot thresholds are added up in bytes.
_MAX_HOT: Final = 255

Words64 = npt.NDArray[np.uint64]
Magnitudes = npt.NDArray[np.int16]


class TableScan:
    """One table in the form the scan needs, with scratch. Not shared between threads.

    Args:
        table: A 128-bit table.

    Raises:
        InvalidInputError: If the table has another precision, or too many magnitudes for bytes.
    """

    def __init__(self, table: DiscreteGaussianTable) -> None:
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
                "the table's likely magnitudes", num_hot, bound=f"1 to {_MAX_HOT}", remedy="Use plan_layers."
            )
        # The last threshold of either search is its end, which says nothing.
        *hot_ends, self._direct = accumulate(hot[:num_hot])
        self._hot = np.array(hot_ends, dtype=np.uint16)[:, None]
        self._rest = list(accumulate(rest))[:-1]
        self._rest_top = np.array([end >> 96 for end in self._rest], dtype=np.uint32)[:, None]
        self._scanned = np.empty((len(hot_ends), TILE), dtype=np.bool_)
        self._reached = np.empty((len(self._rest), _SLOTS), dtype=np.bool_)
        self._words = np.empty(TILE, dtype=np.uint16)
        self._late = np.empty(TILE, dtype=np.bool_)
        self._keys = np.empty((_MEMBERS, _GROUPS), dtype=np.uint8)
        self._counts = np.empty(TILE, dtype=np.uint8)
        self._sign = np.empty(TILE, dtype=np.int16)
        # One place more than samples: where slots without a sample write to.
        self._values = np.empty(TILE + 1, dtype=np.int16)
        self._ascending = np.arange(1, _MEMBERS + 1, dtype=np.uint8)[:, None]
        self._descending = self._ascending[::-1].copy()
        self._group = np.arange(_GROUPS)

    def draw(self, tile: Bytes, num: int, read_overflow: Callable[[], Bytes]) -> Magnitudes:
        """Returns the first ``num`` signed samples of a tile, int16; they lie in scratch until the next call.

        Args:
            tile: ``TILE_BYTES`` random bytes.
            num: 1 to ``TILE``. The scan costs in proportion, the rest does not.
            read_overflow: Returns the tile's ``OVERFLOW_BYTES`` bytes; called in the rare event only.
        """
        np.copyto(self._words, tile[:_SIGN_START].view("<u2"))
        np.greater_equal(self._words, np.uint16(self._direct), out=self._late)
        scanned = self._scanned[:, :num]
        np.greater_equal(self._words[:num], self._hot, out=scanned)
        np.add.reduce(scanned.view(np.uint8), axis=0, dtype=np.uint8, out=self._counts[:num])
        np.copyto(self._values[:num], self._counts[:num])
        late = self._late.view(np.uint8).reshape(_MEMBERS, _GROUPS)
        per_group = np.add.reduce(late, axis=0, dtype=np.uint8)
        if per_group.max() > 2:
            self._overflow(read_overflow())
        else:
            self._fill_slots(late, per_group, tile[_SLOT_START:].view("<u8").reshape(_SLOTS, 2))
        values, sign = self._values[:num], self._sign[:num]
        bits = np.unpackbits(tile[_SIGN_START:_SLOT_START], bitorder="little", count=num)
        np.negative(bits.view(np.int8), out=sign, dtype=np.int16)
        np.bitwise_xor(values, sign, out=values)
        return np.subtract(values, sign, out=values)

    def _fill_slots(
        self, late: npt.NDArray[np.uint8], per_group: npt.NDArray[np.uint8], slots: Words64
    ) -> None:
        """Searches every slot, and writes what belongs to a sample to that sample's place."""
        np.multiply(late, self._ascending, out=self._keys)
        last = np.maximum.reduce(self._keys, axis=0).astype(np.int64) - 1
        np.multiply(late, self._descending, out=self._keys)
        first = _MEMBERS - np.maximum.reduce(self._keys, axis=0).astype(np.int64)
        places = np.concatenate((last, first)) * _GROUPS
        places += np.concatenate((self._group, self._group))
        used = np.concatenate((per_group > 0, per_group > 1))
        places = np.where(used, places, TILE)
        relative = self._words.take(places, mode="clip").astype(np.uint64) - np.uint64(self._direct)
        top = ((relative << np.uint64(16)) | (slots[:, 1] >> np.uint64(48))).astype(np.uint32)
        magnitudes = self._count(top, self._reached)
        np.equal(top, self._rest_top, out=self._reached)
        if (self._reached & used).any():
            high = (relative << np.uint64(48)) | (slots[:, 1] >> np.uint64(16))
            magnitudes = self._count_in_full(high, slots[:, 0])
        self._values[places] = magnitudes

    def _count(self, top: npt.NDArray[np.uint32], reached: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
        np.greater_equal(top, self._rest_top, out=reached)
        count: npt.NDArray[Any] = np.add.reduce(reached.view(np.uint8), axis=0, dtype=np.uint16)
        return count

    def _count_in_full(self, high: Words64, low: Words64) -> npt.NDArray[Any]:
        """How many thresholds each 128-bit word (high, low) reaches."""
        count = np.zeros(len(high), dtype=np.uint16)
        for end in self._rest:
            end_high, end_low = np.uint64(end >> 64), np.uint64(end & (1 << 64) - 1)
            count += (high > end_high) | ((high == end_high) & (low >= end_low))
        return count

    def _overflow(self, words: Bytes) -> None:
        pairs = words.view("<u8").reshape(TILE, 2)
        # Wraps round where the hot word decided; nothing is written there.
        relative = self._words.astype(np.uint64) - np.uint64(self._direct)
        high = (relative << np.uint64(48)) | (pairs[:, 1] >> np.uint64(16))
        np.copyto(
            self._values[:TILE], self._count_in_full(high, pairs[:, 0]), where=self._late, casting="unsafe"
        )
