"""Wide noise: its law, its layout, its exact coin. Fixed keys; each test's false-alarm rate is 1e-4 over keys."""

import dataclasses
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from scipy import stats

from dp_flash_attention.core.errors import InvalidInputError, NoiseUnavailableError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.noise import wide_sampler as module
from dp_flash_attention.noise.discrete_gaussian_scan import TILE
from dp_flash_attention.noise.wide_discrete_gaussian import CHUNK, WideDiscreteGaussian
from dp_flash_attention.noise.wide_sampler import WideSampler

ALARM = 1e-4
KEY = TestKey("wide")
NARROWEST = Fraction(4096)
VARIANCES = [NARROWEST, Fraction(10**7) + Fraction(1, 3), Fraction(2**80)]


@pytest.mark.parametrize("variance", [NARROWEST, Fraction(16383), Fraction(5 * 10**4, 3)])
def test_the_law_is_within_the_certified_distance_by_independent_arithmetic(variance):
    noise = WideDiscreteGaussian(variance)
    k = noise.multiplier
    with mpmath.workdps(60):
        twice = 2 * mpmath.mpf(variance.numerator) / variance.denominator
        drawn = [
            mass * mpmath.exp(-u * (u + 2 * k * a) / twice)
            for a, mass in enumerate(noise.table.masses)
            for u in range(k)
        ]
        ideal = [mpmath.exp(-(mpmath.mpf(y) ** 2) / twice) for y in range(len(drawn) + 400)]
        drawn += [mpmath.mpf(0)] * 400
        ours, theirs = (2 * mpmath.fsum(law) - law[0] for law in (drawn, ideal))
        gaps = [abs(p / ours - q / theirs) for p, q in zip(drawn, ideal, strict=True)]
        distance = (2 * mpmath.fsum(gaps) - gaps[0]) / 2
        assert distance <= noise.total_variation < 2.0**-118
        assert mpmath.fsum(drawn) / (mpmath.mpf(2) ** 128 * k) >= 0.905


@pytest.mark.parametrize("variance", VARIANCES)
def test_what_is_drawn_has_the_law_and_its_neighbours_are_rejected(variance):
    num = 400_000
    values = WideDiscreteGaussian(variance).draw(KEY, num, step=1) / math.sqrt(variance)

    def cells(x):
        return stats.chisquare(
            np.bincount(np.clip((stats.norm.cdf(x) * 50).astype(int), 0, 49), minlength=50)
        ).pvalue

    # Integers spread over half a step to either side, so that narrow noise has no steps the cells could see.
    spread = (np.random.default_rng(5).random(num) - 0.5) / math.sqrt(variance)
    assert cells(values + spread) > ALARM
    assert cells(1.02 * values + spread) < ALARM
    assert cells(values + spread + 0.02) < ALARM
    assert abs(np.mean(values > 0) - np.mean(values < 0)) < 5 / math.sqrt(num)


def test_every_integer_near_zero_is_as_likely_as_it_should_be():
    num = 2_000_000
    values = WideDiscreteGaussian(NARROWEST).draw(KEY, num, step=2)
    near = np.arange(-40, 41)
    law = np.exp(-0.5 * (near / 64.0) ** 2) / (64.0 * math.sqrt(2 * math.pi))
    seen = np.array([np.count_nonzero(values == x) for x in near])
    score = (seen - num * law) / np.sqrt(num * law * (1 - law))
    bound = stats.norm.isf(ALARM / 2 / len(near))
    assert np.abs(score).max() < bound
    # Zero with both signs would come twice.
    assert (2 * seen[40] - num * law[40]) / math.sqrt(num * law[40]) > bound


def test_low_bits_are_uniform_and_independent_of_the_block():
    noise = WideDiscreteGaussian(Fraction(2**40))
    values = np.abs(noise.draw(KEY, 500_000, step=3))
    middle = values[values < noise.multiplier]
    counts = np.bincount((middle * 16 // noise.multiplier).astype(int), minlength=16)
    law = [
        math.erf((i + 1) / 16 * noise.multiplier / 2**20.5) - math.erf(i / 16 * noise.multiplier / 2**20.5)
        for i in range(16)
    ]
    expected = len(middle) * np.array(law) / sum(law)
    assert stats.chisquare(counts, expected).pvalue > ALARM


@pytest.mark.parametrize("cipher", ["aes-256-ctr", "chacha20", "shake256"])
def test_a_longer_draw_begins_with_a_shorter_one_and_positions_differ(cipher):
    noise = WideDiscreteGaussian(Fraction(2**30))

    def draw(num, step=0, stream=0, key=KEY):
        return noise.draw(key, num, step=step, stream=stream, cipher=cipher)

    long = draw(CHUNK + 1000)
    assert np.array_equal(long[:500], draw(500))
    assert np.array_equal(long[: CHUNK + 1], draw(CHUNK + 1))
    others = [
        draw(500),
        draw(500, step=1),
        draw(500, stream=1),
        draw(500, key=TestKey("other")),
        long[CHUNK : CHUNK + 500],
    ]
    assert len({other.tobytes() for other in others}) == len(others)
    assert draw(0).shape == (0,)
    for num in (1, TILE, TILE + 1, CHUNK - 1, CHUNK):  # each reads another part of the chunk
        assert np.array_equal(long[:num], draw(num))


def test_two_variances_share_no_bits():
    one = WideDiscreteGaussian(Fraction(2**30)).draw(KEY, 2000, step=0)
    other = WideDiscreteGaussian(Fraction(2**30) + 1).draw(KEY, 2000, step=0)
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(2000)


def test_the_exact_coin_decides_as_the_fast_one_and_is_reached(monkeypatch):
    noise = WideDiscreteGaussian(Fraction(10**7) + Fraction(1, 3))
    fast = noise.draw(KEY, 110_000, step=4)
    calls = {"_close_coin": 0, "_exact_coin": 0}
    for name in calls:
        coin = getattr(WideSampler, name)

        def counted(*arguments, name=name, coin=coin):
            calls[name] += 1
            return coin(*arguments)

        monkeypatch.setattr(WideSampler, name, counted)
    # One proposal in a hundred goes further, to the double and to the digits.
    monkeypatch.setattr(module, "_CLOSE_FLOAT32", 0.005)
    monkeypatch.setattr(module, "_CLOSE", 0.0025)
    assert np.array_equal(noise.draw(KEY, 110_000, step=4), fast)
    assert calls["_close_coin"] > 1000
    assert 400 < calls["_exact_coin"] < calls["_close_coin"]


def test_float32_exponentials_stay_inside_the_margin_of_the_coins():
    # Every float32 of a band below zero, then many down to where no exponent of a coin reaches (0.03 + 128/4).
    bits = np.arange(np.float32(-1.0).view(np.uint32), np.float32(-1.25).view(np.uint32), dtype=np.uint32)
    spread = -np.random.default_rng(3).random(1_000_000, dtype=np.float32) * np.float32(40.0)
    for gamma in (bits.view(np.float32), spread, spread / np.float32(20.0)):
        error = np.abs(np.exp(gamma).astype(np.float64) - np.exp(gamma.astype(np.float64)))
        assert error.max() < 2.0**-21


@pytest.mark.parametrize("stddev", [2**26, 2**27 - 1, 2**27, 2**40])
def test_words_of_both_sizes_make_the_law(stddev):
    noise = WideDiscreteGaussian(Fraction(stddev) ** 2)
    values = noise.draw(KEY, 300_000, step=8) / stddev
    # Blocks' ends are where a bit too many or too few would show.
    assert stats.kstest(values, "norm").pvalue > ALARM
    assert stats.kstest(values * 1.03, "norm").pvalue < ALARM
    assert noise.largest < 2**63


def _with_coin(noise, half_inverse):
    noise._sampler._law = dataclasses.replace(noise._sampler._law, half_inverse=half_inverse)


def test_a_coin_that_always_accepts_would_be_noticed():
    noise = WideDiscreteGaussian(NARROWEST)
    _with_coin(noise, 0.0)
    values = noise.draw(KEY, 400_000, step=5) / 64.0
    assert abs(np.mean(values**2) - 1.0) / math.sqrt(2 / len(values)) > 10


def test_a_chunk_that_runs_short_releases_nothing():
    noise = WideDiscreteGaussian(NARROWEST)
    _with_coin(noise, 1.0)
    with pytest.raises(NoiseUnavailableError, match="proposals"):
        noise.draw(KEY, CHUNK, step=6)


@pytest.mark.parametrize("variance", [Fraction(4095), Fraction(2**91), 5000, 5000.0])
def test_a_variance_out_of_range_is_refused(variance):
    with pytest.raises(InvalidInputError, match="variance"):
        WideDiscreteGaussian(variance)


@pytest.mark.parametrize("first", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 7])
def test_parts_of_a_draw_are_the_whole(first):
    noise = WideDiscreteGaussian(Fraction(2**40))
    whole = noise.draw(KEY, first + CHUNK + 3, step=5, stream=2)
    for num in (0, 1, CHUNK + 3):
        part = noise.draw(KEY, num, step=5, stream=2, first=first)
        assert np.array_equal(part, whole[first : first + num])


@pytest.mark.parametrize("bad", [-1, 1.0, True, 2**44])
def test_a_first_sample_out_of_range_is_refused(bad):
    with pytest.raises(InvalidInputError, match="first"):
        WideDiscreteGaussian(NARROWEST).draw(KEY, 1, step=0, first=bad)
