"""The device transform against Box and Muller's formula in 50 digits, and against the CPU's."""

import math

import mpmath
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from dp_flash_attention.noise import TestKey
from dp_flash_attention.noise.fast import PhiloxKeystream
from dp_flash_attention.noise.kernels import transform
from dp_flash_attention.noise.kernels.transform import box_muller, tile_normals
from dp_flash_attention.noise.keystream import TILE_NUMBERS, TILE_PAIRS, Domain, new_buffer
from dp_flash_attention.noise.normals import REFINE_BELOW, Float32Transform
from dp_flash_attention.noise.secure import CipherKeystream

KEY = TestKey("kernel normals")
KEYSTREAMS = {"chacha20": CipherKeystream(KEY, "chacha20"), "philox4x64": PhiloxKeystream(KEY)}

# Against the formula: the logarithm's last bits count twice in r², a polynomial and two roots add three roundings
# each; measured: 5 units in the last place (2^-24 relative). Next to r = 0 the spacing of r², 2^-31, counts.
EXACT = {"rel": 8 * 2.0**-24, "abs": 2.0**-26}
# Against the CPU, whose own error is the same.
CPU = {"rtol": 16 * 2.0**-24, "atol": 2.0**-25}

EDGES = [0, 1, 2, 511, REFINE_BELOW - 1, REFINE_BELOW, 2**24, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]


@triton.jit
def pairs_kernel(out, radius, angle, refinement, two_variance, N: tl.constexpr):
    lane = tl.arange(0, N)
    words = (tl.load(radius + lane), tl.load(angle + lane), tl.load(refinement + lane))
    first, second = box_muller(words[0], words[1], words[2], two_variance)
    tl.store(out + lane, first)
    tl.store(out + N + lane, second)


@triton.jit
def tiles_kernel(
    out, words, anchor, first_tile, stream, step, two_variance, CIPHER: tl.constexpr, TILES: tl.constexpr
):
    key = (
        tl.load(words),
        tl.load(words + 1),
        tl.load(words + 2),
        tl.load(words + 3),
        tl.load(words + 4),
        tl.load(words + 5),
        tl.load(words + 6),
        tl.load(words + 7),
    )
    numbers = tile_normals(
        key,
        first_tile.to(tl.uint64),
        stream.to(tl.uint32),
        step.to(tl.uint64),
        two_variance,
        anchor,
        CIPHER,
        TILES,
    )
    tl.store(out + tl.arange(0, 2048 * TILES), numbers)


def uint32(words):
    return torch.from_numpy(np.asarray(words, dtype=np.uint32))


def transformed(radius, angle, refinement, two_variance=2.0):
    size = triton.next_power_of_2(len(radius))
    padded = [uint32(np.resize(words, size)) for words in (radius, angle, refinement)]
    out = torch.full((2, size), float("nan"))
    pairs_kernel[(1,)](out, *padded, two_variance, size)
    return out[:, : len(radius)].double().numpy()


def exact(radius, angle, refinement):
    """The map that ``normals.py`` documents."""
    with mpmath.workdps(50):
        uniform = (mpmath.mpf(radius) + 0.5) / 2**32
        if radius < REFINE_BELOW:
            uniform = (mpmath.mpf(radius) * 2**32 + refinement + 0.5) / 2**64
        r = mpmath.sqrt(-2 * mpmath.log(uniform))
        odd = ((angle | 1) << 1) & 0xFFFFFFFF
        phase = mpmath.mpf(odd - 2**32 if odd >= 2**31 else odd) * mpmath.pi / 2**33
        small, large = r * mpmath.sin(phase), r * mpmath.cos(phase) * (-1 if angle & 1 else 1)
        return [float(x) for x in ((large, small) if angle >> 31 else (small, large))]


def words_over_the_range(rng):
    radius = np.concatenate([np.repeat(EDGES, len(EDGES)), rng.integers(2**32, size=500)])
    angle = np.concatenate([np.tile(EDGES, len(EDGES)), rng.integers(2**32, size=500)])
    # Powers of two over the whole range: the logarithm's exponents, on both sides of each.
    powers = np.array([2**k + d for k in range(32) for d in (-1, 0, 1)])
    return np.concatenate([radius, powers]), np.concatenate([angle, rng.integers(2**32, size=len(powers))])


@pytest.mark.parametrize("refinement", [0, 1, 2**31, 2**32 - 1])
def test_every_edge_and_words_between_against_50_digits(rng, refinement):
    radius, angle = words_over_the_range(rng)
    got = transformed(radius, angle, [refinement])
    for k in range(len(radius)):
        want = exact(int(radius[k]), int(angle[k]), refinement)
        assert got[:, k].tolist() == pytest.approx(want, **EXACT)


def test_the_tail_reaches_as_far_as_the_cpu_s():
    # Word 0 refined by 0: U = 2^-65, r = sqrt(130·ln 2) = 9.49. A generator that clamps U at 1e-7 ends at 5.68.
    first, second = transformed([0], [0], [0])
    assert math.hypot(first[0], second[0]) == pytest.approx(math.sqrt(130 * math.log(2)), rel=1e-6)


def test_without_refinement_the_comparison_fails(monkeypatch):
    monkeypatch.setattr(transform, "_REFINE_BELOW", tl.constexpr(0))
    got = transformed([300, 1000, 5000], [7, 8, 9], [12345])
    for k, (radius, angle) in enumerate(((300, 7), (1000, 8), (5000, 9))):
        assert got[:, k].tolist() != pytest.approx(exact(radius, angle, 12345), **EXACT)


def test_the_scale_is_that_of_two_variance():
    radius, angle = np.arange(1, 2**32, 2**27), np.arange(3, 2**32, 2**27)
    unit, scaled = transformed(radius, angle, [0]), transformed(radius, angle, [0], two_variance=2.0 * 9)
    np.testing.assert_allclose(scaled, 3 * unit, **CPU)


def tiles_on_the_cpu(cipher, first_tile, tiles, *, step, stream):
    """What the CPU generator writes there, and how many pairs it refines."""
    source = KEYSTREAMS[cipher].at(step=step, stream=stream)
    size = 4 * TILE_NUMBERS * tiles
    block = 4 * TILE_NUMBERS * first_tile // source.block_bytes
    words = source.read(size, domain=Domain.FLOAT32, block=block, buffer=new_buffer(size))
    words = words.view("<u4").reshape(tiles, 2, TILE_PAIRS)
    out = np.empty((tiles, 2, TILE_PAIRS), dtype=np.float32)

    def refine(pairs):
        return source.words32_at(pairs + first_tile * TILE_PAIRS, domain=Domain.FLOAT32_REFINEMENT)

    Float32Transform(tiles).write(words, refine, np.float32(2.0), out)
    return out.reshape(-1), np.flatnonzero((words[:, 0] < REFINE_BELOW).reshape(-1))


def tiles_on_the_device(cipher, first_tile, tiles, *, step, stream, anchor=float("nan")):
    out = torch.full((TILE_NUMBERS * tiles,), float("nan"))
    key = KEYSTREAMS[cipher].kernel_key(step)
    tiles_kernel[(1,)](
        out, uint32(key.words), torch.tensor([anchor]), first_tile, stream, step, 2.0, cipher, tiles
    )
    return out.numpy()


@pytest.mark.parametrize("cipher", KEYSTREAMS)
@pytest.mark.parametrize(
    ("first_tile", "step", "stream"),
    # Tile 2^25 starts at ChaCha20 block 2^32; the last tile of 2^44 numbers is 2^33 - 1.
    [(0, 0, 0), (2**25 - 1, 3, 5), (2**33 - 32, 2**63 - 1, 2**32 - 1)],
)
def test_whole_tiles_are_those_of_the_cpu_and_the_refining_path_was_taken(cipher, first_tile, step, stream):
    where = {"step": step, "stream": stream}
    want, refined = tiles_on_the_cpu(cipher, first_tile, 32, **where)
    assert len(refined) > 0  # 32,768 pairs, each with probability 2^-13: 4 are expected
    got = tiles_on_the_device(cipher, first_tile, 32, **where)
    np.testing.assert_allclose(got, want, **CPU)


def tile_far_in_the_tail(cipher, *, step, stream, below=1 << 10, search=1 << 14):
    """Returns a tile with a radius word so small that its refining word shows, and that pair."""
    source = KEYSTREAMS[cipher].at(step=step, stream=stream)
    for tile in range(0, search, 128):
        size = 4 * TILE_NUMBERS * 128
        block = 4 * TILE_NUMBERS * tile // source.block_bytes
        words = source.read(size, domain=Domain.FLOAT32, block=block, buffer=new_buffer(size))
        found = np.argwhere(words.view("<u4").reshape(128, 2, TILE_PAIRS)[:, 0] < below)
        if len(found):
            return tile + int(found[0, 0]), int(found[0, 1])
    raise AssertionError("no such word: search further or take another key")


@pytest.mark.parametrize("cipher", KEYSTREAMS)
def test_a_number_far_in_the_tail_is_refined_by_the_words_of_their_own_domain(cipher, monkeypatch):
    where = {"step": 0, "stream": 0}
    tile, pair = tile_far_in_the_tail(cipher, **where)
    want, refined = tiles_on_the_cpu(cipher, tile, 1, **where)
    assert pair in refined
    assert math.hypot(want[pair], want[TILE_PAIRS + pair]) > 5.5  # r of a word below 2^10 is above 5.5
    np.testing.assert_allclose(tiles_on_the_device(cipher, tile, 1, **where), want, **CPU)
    # Planted: words of another domain.
    monkeypatch.setattr(transform, "_FLOAT32_REFINEMENT", tl.constexpr(int(Domain.FLOAT64)))
    got = tiles_on_the_device(cipher, tile, 1, **where)
    wrong = np.flatnonzero(~np.isclose(got, want, **CPU))
    assert set(wrong) & {pair, TILE_PAIRS + pair}
    assert {index % TILE_PAIRS for index in wrong} <= set(refined)


@pytest.mark.parametrize("anchor", [0.0, -1.0, float("nan"), float("-inf")])
def test_what_the_anchor_points_at_changes_nothing(anchor):
    where = {"step": 2, "stream": 1}
    want = tiles_on_the_device("philox4x64", 3, 2, **where, anchor=1.5)
    assert np.array_equal(tiles_on_the_device("philox4x64", 3, 2, **where, anchor=anchor), want)
