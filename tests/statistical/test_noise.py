"""Are they normals? Fixed keys, stated false-alarm rates, and each statistic rejects a wrong law."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from dp_flash_attention.noise import FastNormalGenerator, SecureNormalGenerator, TestKey

NUM = 4_000_000
ALARM = 1e-4
"""False-alarm rate of each test over the choice of the key; the key is fixed, so a test never flickers."""

GENERATORS = {"secure": SecureNormalGenerator, "fast": FastNormalGenerator}


@pytest.fixture(scope="module", params=GENERATORS)
def generator(request):
    return GENERATORS[request.param](TestKey("statistics"))


@pytest.fixture(scope="module")
def sample(generator):
    return generator.fill_normal_(torch.empty(NUM), step=11, stream=7).numpy().astype(np.float64)


def uniformity(values):
    """p-value of χ² over 1,000 cells of equal probability."""
    cells = np.clip((special.ndtr(values) * 1000).astype(int), 0, 999)
    return stats.chisquare(np.bincount(cells, minlength=1000)).pvalue


def variance_score(values):
    """Standard score of the sample variance against 1: its deviation is sqrt(2 / n)."""
    return (np.mean(values**2) - 1.0) / math.sqrt(2.0 / len(values))


def test_the_law_in_a_thousand_cells(sample):
    assert uniformity(sample) > ALARM


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda z: z * 0.99, "one per cent too small"),
        (lambda z: z + 0.02, "shifted"),
        (lambda z: z / math.sqrt(2), "half the variance"),
        (lambda z: np.sign(z) * np.sqrt(np.abs(z)), "another shape"),
        (lambda z: np.round(z * 16) / 16, "a coarse grid"),
    ],
)
def test_the_cells_reject_what_is_not_the_law(sample, change, what):
    assert uniformity(change(sample)) < 1e-6, what


def test_the_variance_and_that_half_a_per_cent_would_be_seen(sample):
    bound = stats.norm.isf(ALARM / 2)
    assert abs(variance_score(sample)) < bound
    assert abs(variance_score(sample * 0.995)) > bound


def test_the_tail_beyond_four_and_five(sample):
    for reach in (4.0, 4.5, 5.0):
        expected = NUM * math.erfc(reach / math.sqrt(2))
        count = int(np.sum(np.abs(sample) > reach))
        low, high = stats.poisson.interval(1 - ALARM, expected)
        assert low <= count <= high
    # A generator that stops at four sigma has none where 253 are expected.
    assert stats.poisson.cdf(int(np.sum(np.abs(np.clip(sample, -4, 4)) > 4)), 253) < 1e-6


def test_both_coordinates_of_a_pair_are_independent(sample):
    pairs = sample[: NUM // 2048 * 2048].reshape(-1, 2, 1024)
    first, second = pairs[:, 0].ravel(), pairs[:, 1].ravel()
    bound = stats.norm.isf(ALARM / 2) / math.sqrt(len(first))
    assert abs(np.mean(first * second)) < bound
    # Squares: a shared radius without the right angle would show here.
    squares = np.mean((first**2 - 1) * (second**2 - 1)) / 2
    assert abs(squares) < bound
    shared = np.abs(first) * np.sign(second)
    assert abs(np.mean((first**2 - 1) * (shared**2 - 1)) / 2) > bound


@pytest.mark.parametrize("other", [{"step": 12, "stream": 7}, {"step": 11, "stream": 8}])
def test_neighbouring_positions_are_uncorrelated(generator, sample, other):
    neighbour = generator.fill_normal_(torch.empty(NUM), **other).numpy().astype(np.float64)
    bound = stats.norm.isf(ALARM / 2) / math.sqrt(NUM)
    assert abs(np.mean(sample * neighbour)) < bound
    for lag in (1, 1024, 2048):
        assert abs(np.mean(sample[:-lag] * neighbour[lag:])) < bound * 1.01
        assert abs(np.mean(sample[:-lag] * sample[lag:])) < bound * 1.01
    assert abs(np.mean(sample * (neighbour + 0.01 * sample))) > bound


def test_float64_has_the_law_too(generator):
    values = generator.fill_normal_(torch.empty(1_000_000, dtype=torch.float64), step=1, stream=1).numpy()
    assert uniformity(values) > ALARM
    assert uniformity(values * 0.98) < 1e-6
    assert len(np.unique(values)) == len(
        values
    )  # 64 bits: an equal pair among 10^6 has probability below 1e-7
