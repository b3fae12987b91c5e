"""The vectorised scan against a sampler written again from the layout, in plain integers."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import DiscreteGaussianTable, build_table
from dp_flash_attention.noise.discrete_gaussian_scan import OVERFLOW_BYTES, TILE, TILE_BYTES, TableScan

TABLE = build_table(16)
HOT = [mass >> 112 for mass in TABLE.masses]
REST = [mass % 2**112 for mass in TABLE.masses]
DIRECT = sum(HOT)


def find(masses, word):
    """The index whose interval holds ``word``, by walking along."""
    for index, mass in enumerate(masses):
        if word < mass:
            return index
        word -= mass
    raise AssertionError("the word lies beyond all masses")


def rest_bits(pair):
    return (int(pair[1]) >> 16) << 64 | int(pair[0])


def reference(table, tile, overflow):
    """The tile's samples by the layout, one by one, without a vector."""
    hot, rest = [mass >> 112 for mass in table.masses], [mass % 2**112 for mass in table.masses]
    words = tile[: 2 * TILE].view("<u2")
    slots, pairs = tile[17408:].view("<u8").reshape(128, 2), overflow.view("<u8").reshape(TILE, 2)
    groups = [[i for i in range(g, TILE, 64) if words[i] >= sum(hot)] for g in range(64)]
    overflows = max(map(len, groups)) > 2
    samples = []
    for i, word in enumerate(words):
        if word < sum(hot):
            magnitude = find(hot, int(word))
        else:
            group = groups[i % 64]
            slot = i % 64 if i == group[-1] else 64 + i % 64
            v = rest_bits(pairs[i] if overflows else slots[slot])
            magnitude = find(rest, (int(word) - sum(hot)) << 112 | v)
        negative = tile[2 * TILE + i // 8] >> (i % 8) & 1
        samples.append(-magnitude if negative else magnitude)
    return samples, overflows


def random_bytes(rng, num):
    return np.frombuffer(rng.bytes(num), dtype=np.uint8).copy()


def drawn(table, tile, overflow, num=TILE):
    return TableScan(table).draw(tile[None], num, lambda index: overflow).tolist()


@pytest.mark.parametrize("variance", [Fraction(1, 64), Fraction(1, 3), 1, 16, Fraction(579, 8), 576, 3000])
def test_the_scan_is_the_reference(rng, variance):
    table = build_table(Fraction(variance))
    for _ in range(2):
        tile, overflow = random_bytes(rng, TILE_BYTES), random_bytes(rng, OVERFLOW_BYTES)
        assert drawn(table, tile, overflow) == reference(table, tile, overflow)[0]


def test_a_tile_whose_groups_hold_too_many_late_samples_reads_overflow(rng):
    tile, overflow = random_bytes(rng, TILE_BYTES), random_bytes(rng, OVERFLOW_BYTES)
    words = tile[: 2 * TILE].view("<u2")
    words[[5, 5 + 64, 5 + 640]] = [DIRECT, 65535, DIRECT + 1]
    expected, overflows = reference(TABLE, tile, overflow)
    assert overflows
    assert drawn(TABLE, tile, overflow) == expected
    words[5] = 0
    expected, overflows = reference(TABLE, tile, overflow)
    assert not overflows
    assert drawn(TABLE, tile, overflow) == expected


def test_overflow_is_read_in_that_event_only(rng):
    tile = random_bytes(rng, TILE_BYTES)
    tile[: 2 * TILE].view("<u2")[:] = 0

    def forbidden(index):
        raise AssertionError("overflow was read")

    assert set(TableScan(TABLE).draw(tile[None], TILE, forbidden).tolist()) == {0}


def test_a_slot_that_its_first_32_bits_do_not_decide_is_searched_in_full(rng):
    """Words exactly at, and one below, every threshold of the second search."""
    ends = list(itertools.accumulate(REST))[:-1]
    for end in ends[:: len(ends) // 9]:
        for word in (end - 1, end):
            tile, overflow = random_bytes(rng, TILE_BYTES), random_bytes(rng, OVERFLOW_BYTES)
            words, slots = tile[: 2 * TILE].view("<u2"), tile[17408:].view("<u8").reshape(128, 2)
            words[:] = 0
            words[77] = DIRECT + (word >> 112)
            v = word % 2**112
            slots[77 % 64] = (v % 2**64, (v >> 64) << 16)
            assert abs(drawn(TABLE, tile, overflow)[77]) == find(REST, word)


@pytest.mark.parametrize("num_tiles", [1, 2, 5])
def test_tiles_drawn_together_are_the_same(rng, num_tiles):
    """Overflow and ties of the first 32 bits in one tile leave the others alone."""
    tiles = random_bytes(rng, num_tiles * TILE_BYTES).reshape(num_tiles, TILE_BYTES)
    overflow = random_bytes(rng, num_tiles * OVERFLOW_BYTES).reshape(num_tiles, OVERFLOW_BYTES)
    tiles[-1, : 2 * TILE].view("<u2")[[7, 71, 135]] = 65535
    scan, num = TableScan(TABLE, 5), num_tiles * TILE - 100
    found = scan.draw(tiles, num, lambda index: overflow[index]).tolist()
    expected = [sample for t in range(num_tiles) for sample in reference(TABLE, tiles[t], overflow[t])[0]]
    assert found == expected[:num]


@pytest.mark.parametrize("num", [1, 63, 64, 65, 4097, TILE - 1])
def test_fewer_samples_are_the_first_ones(rng, num):
    tile, overflow = random_bytes(rng, TILE_BYTES), random_bytes(rng, OVERFLOW_BYTES)
    assert drawn(TABLE, tile, overflow, num) == drawn(TABLE, tile, overflow)[:num]


def test_every_hot_word_has_the_magnitude_of_its_interval():
    magnitudes = []
    for start in range(0, DIRECT, TILE):
        tile = np.zeros(TILE_BYTES, dtype=np.uint8)
        words = tile[: 2 * TILE].view("<u2")
        stop = min(start + TILE, DIRECT)
        words[: stop - start] = np.arange(start, stop)
        magnitudes += drawn(TABLE, tile, np.zeros(OVERFLOW_BYTES, dtype=np.uint8))[: stop - start]
    assert [magnitudes.count(m) for m in range(len(HOT))] == HOT


def flat(size):
    masses = (2**128 // size,) * size
    return DiscreteGaussianTable(variance=Fraction(1), precision_bits=128, masses=masses)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (build_table(16, precision_bits=64), "precision_bits"),
        (flat(256), "likely magnitudes"),
        (DiscreteGaussianTable(variance=Fraction(1), precision_bits=128, masses=(2**128,)), "likely"),
    ],
)
def test_a_table_that_the_scan_cannot_hold_is_refused(table, said):
    with pytest.raises(InvalidInputError, match=said):
        TableScan(table)
