"""The transform against Box and Muller's formula in high precision, over the whole range of words."""

import math

import mpmath
import numpy as np
import pytest

from dp_flash_attention.noise.keystream import TILE_PAIRS
from dp_flash_attention.noise.normals import REFINE_BELOW, Float32Transform, normals_float64


def transformed(radius, angle, refinement=0):
    """One tile that holds the given words over and over; returns the first pairs."""
    words = np.zeros((1, 2, TILE_PAIRS), dtype=np.uint32)
    words[0, 0, : len(radius)], words[0, 1, : len(angle)] = radius, angle
    words[0, 0, len(radius) :] = 2**31
    out = np.full((1, 2, TILE_PAIRS), np.nan, dtype=np.float32)
    Float32Transform(1).write(
        words, lambda pairs: np.full(len(pairs), refinement, dtype=np.uint32), np.float32(2.0), out
    )
    return out[0, 0, : len(radius)].astype(float), out[0, 1, : len(radius)].astype(float)


def exact(radius, angle, refinement=0):
    """The documented map in 50 digits."""
    with mpmath.workdps(50):
        uniform = (mpmath.mpf(radius) + 0.5) / 2**32
        if radius < REFINE_BELOW:
            uniform = (mpmath.mpf(radius) * 2**32 + refinement + 0.5) / 2**64
        r = mpmath.sqrt(-2 * mpmath.log(uniform))
        odd = ((angle | 1) << 1) & 0xFFFFFFFF
        phase = mpmath.mpf(odd - 2**32 if odd >= 2**31 else odd) * mpmath.pi / 2**33
        small, large = r * mpmath.sin(phase), r * mpmath.cos(phase) * (-1 if angle & 1 else 1)
        return (large, small) if angle >> 31 else (small, large)


EDGES = [
    0,
    1,
    2,
    REFINE_BELOW - 1,
    REFINE_BELOW,
    REFINE_BELOW + 1,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 2,
    2**32 - 1,
]


def test_every_edge_and_a_thousand_words_between(rng):
    radius = np.concatenate([np.repeat(EDGES, len(EDGES)), rng.integers(2**32, size=880)]).astype(np.uint32)
    angle = np.concatenate([np.tile(EDGES, len(EDGES)), rng.integers(2**32, size=880)]).astype(np.uint32)
    for refinement in (0, 2**32 - 1):
        first, second = transformed(radius, angle, refinement)
        for k in range(len(radius)):
            for got, want in zip(
                (first[k], second[k]), exact(int(radius[k]), int(angle[k]), refinement), strict=True
            ):
                # 8 units in the last place of float32 relative; next to radius 0 the spacing of r² = 2^-31 counts.
                assert got == pytest.approx(float(want), rel=1e-6, abs=1e-7)


def test_the_tail_reaches_as_far_as_it_is_said_to_and_no_uniform_is_clamped():
    # Word 0 refined by 0: U = 2^-65, r = sqrt(130·ln 2).
    first, second = transformed([0], [0])
    assert math.hypot(first[0], second[0]) == pytest.approx(math.sqrt(130 * math.log(2)), rel=1e-6)
    # A uniform of 1e-7, at which a well-known kernel clamps, is an ordinary value here.
    beyond = transformed([100], [0], refinement=5)
    assert math.hypot(*(values[0] for values in beyond)) > 5.68


def test_without_refinement_the_tail_would_be_cut(monkeypatch):
    monkeypatch.setattr("dp_flash_attention.noise.normals._REFINE_BELOW_UNIFORM", np.float32(-1.0))
    first, second = transformed([1 << 9], [0])
    fine = exact(1 << 9, 0, 0)
    assert math.hypot(first[0], second[0]) != pytest.approx(math.hypot(*map(float, fine)), rel=1e-06)


def test_each_sign_has_a_bit_of_its_own():
    angles = [base | low for base in (0x12345678 & ~1, 0x92345678 & ~1) for low in (0, 1)]
    first, second = transformed([2**30] * 4, angles)
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    assert second[0] == -second[1]
    assert second[2] == pytest.approx(second[3], rel=1e-6)
    assert first[2] == -first[3]
    mirrored = transformed([2**30], [0x12345678 ^ 0x7FFFFFFE])[0]
    assert mirrored[0] == pytest.approx(-first[0], rel=1e-6)


def test_float64_against_the_formula(rng):
    words = rng.integers(2**64, size=(1, 2, TILE_PAIRS), dtype=np.uint64)
    words[0, 0, :4] = [0, 2**64 - 1, 2**63 - 1, 2**63]
    words[0, 1, :4] = [0, 2**64 - 1, 2**62 - 1, 2**62]
    got = normals_float64(words, 3.0)
    for k in range(200):
        with mpmath.workdps(50):
            radius, angle = int(words[0, 0, k]), int(words[0, 1, k])
            r = 3 * mpmath.sqrt(-2 * mpmath.log((mpmath.mpf(radius) + 0.5) / 2**64))
            phase = ((angle & (2**62 - 1)) + mpmath.mpf(0.5)) * mpmath.pi / 2**63
            want = [
                float(mpmath.sin(phase) * r * (-1 if angle >> 63 else 1)),
                float(mpmath.cos(phase) * r * (-1 if angle >> 62 & 1 else 1)),
            ]
        assert got[0, :, k] == pytest.approx(want, rel=1e-12, abs=1e-14)
