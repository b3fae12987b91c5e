"""Are they discrete Gaussians? Fixed keys, stated false-alarm rates, and each statistic rejects a wrong law."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from dp_flash_attention.noise import DiscreteGaussianGenerator, TestKey

NUM = 4_000_000
ALARM = 1e-4
"""False-alarm rate of each test over the choice of the key; the key is fixed, so a test never flickers."""

LAWS = {
    "σ=4": {"stddev": 4},
    "σ=1/2, SHAKE256": {"stddev": Fraction(1, 2), "cipher": "shake256"},
    "σ=32, two layers": {"stddev": 32},
    "σ=300, three layers, ChaCha20": {"stddev": 300, "cipher": "chacha20"},
}


@pytest.fixture(scope="module", params=LAWS)
def drawn(request):
    generator = DiscreteGaussianGenerator(TestKey("statistics"), **LAWS[request.param])
    out = generator.fill_(torch.empty(NUM, dtype=torch.int64), step=11, stream=7)
    return out.numpy(), math.sqrt(generator.variance)


def law(stddev, reach):
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2.0 * stddev**2))
    return weights / weights.sum()


def fit(values, stddev):
    """p-value of χ² over runs of integers that are each expected at least 50 times."""
    reach = math.ceil(15 * stddev)
    expected = NUM * law(stddev, reach)
    observed = np.bincount(np.clip(values, -reach, reach) + reach, minlength=2 * reach + 1)
    cells = np.floor(np.cumsum(expected) / 50).astype(int)
    inside = np.unique(cells, return_inverse=True)[1]
    observed, expected = np.bincount(inside, observed), np.bincount(inside, expected)
    # The last run may hold less than 50: join it to its neighbour.
    observed[-2:], expected[-2:] = observed[-2:].sum() / 2, expected[-2:].sum() / 2
    return stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


def test_the_law_fits(drawn):
    assert fit(*drawn) > ALARM


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda x, s: fit(x, s * 1.01), "one per cent too narrow"),
        (lambda x, s: fit(x + (np.arange(NUM) % 10 == 0) * math.ceil(s / 4), s), "one in ten shifted by σ/4"),
        (lambda x, s: fit(np.where(np.abs(x) > 3 * s, 0, x), s), "cut off at three σ"),
        (lambda x, s: fit(np.abs(x), s), "one sign"),
    ],
)
def test_the_fit_rejects_what_is_not_the_law(drawn, change, what):
    assert change(*drawn) < 1e-6, what


def test_the_variance_and_that_one_per_cent_would_be_seen(drawn):
    values, stddev = drawn
    grid = np.arange(-math.ceil(15 * stddev), math.ceil(15 * stddev) + 1)
    weights = law(stddev, grid[-1])
    variance, fourth = (weights * grid**2).sum(), (weights * grid**4.0).sum()
    spread = math.sqrt((fourth - variance**2) / NUM)
    bound = stats.norm.isf(ALARM / 2)
    assert abs((values**2).mean() - variance) < bound * spread
    assert abs((values**2).mean() * 1.01 - variance) > bound * spread


def test_signs_are_fair_and_independent_of_magnitudes_and_neighbours(drawn):
    values, stddev = drawn
    bound = stats.norm.isf(ALARM / 2)
    signs = np.sign(values).astype(float)
    some = values != 0
    assert abs(signs[some].mean()) < bound / math.sqrt(some.sum())
    scaled = values / stddev
    for lag in (1, 64, 128, 8192):
        assert abs((scaled[:-lag] * scaled[lag:]).mean()) < bound * 1.01 / math.sqrt(NUM)
        shared = np.abs(scaled) * np.repeat(signs[::2], 2)
        assert abs((shared[:-1:2] * shared[1::2]).mean()) > bound / math.sqrt(NUM)
