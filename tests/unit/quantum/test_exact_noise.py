"""Both samplers behind one name. Fixed keys; the false-alarm rate of each statistic is 1e-4 over keys."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import Layers, TestKey
from dp_flash_attention.noise.skellam import SkellamTable
from dp_flash_attention.noise.wide_discrete_gaussian import WideDiscreteGaussian
from dp_flash_attention.noise.wide_skellam import WideSkellam
from dp_flash_attention.quantum.exact_noise import MAX_DISTANCE, makes_layers, noise_for, skellam_noise_for


@pytest.mark.parametrize(
    ("variance", "sampler"),
    [
        (Fraction(18), Layers),
        (Fraction(64**2) - 1, Layers),
        (Fraction(64**2), WideDiscreteGaussian),
        (Fraction(300**2), WideDiscreteGaussian),
        (Fraction(10**12, 7), WideDiscreteGaussian),
    ],
)
def test_either_sampler_has_the_scale_and_a_certificate(variance, sampler):
    noise, num = noise_for(variance), 100_000
    assert isinstance(noise.sampler, sampler)
    assert 0 < noise.total_variation <= MAX_DISTANCE
    drawn = noise.draw(TestKey("exact"), num, step=0)
    assert drawn.dtype == np.int64
    assert np.abs(drawn).max() <= noise.largest
    score = (np.mean(drawn.astype(float) ** 2) / float(variance) - 1.0) / math.sqrt(2.0 / num)
    bound = stats.norm.isf(1e-4 / 2)
    assert abs(score) < bound
    assert abs(np.mean((drawn / 2.0) ** 2) / float(variance) - 1.0) / math.sqrt(2.0 / num) > bound
    assert np.array_equal(drawn, noise.draw(TestKey("exact"), num, step=0))
    assert not np.array_equal(drawn, noise.draw(TestKey("exact"), num, step=1))


@pytest.mark.parametrize("variance", [Fraction(1, 100), Fraction(2**97)])
def test_a_variance_out_of_range_is_refused(variance):
    with pytest.raises(InvalidInputError, match="variance"):
        noise_for(variance)


def test_only_the_cipher_with_a_kernel_makes_layers_whatever_the_width():
    assert [makes_layers(cipher) for cipher in ("aes-256-ctr", "chacha20", "shake256")] == [
        False,
        True,
        False,
    ]
    noise = noise_for(Fraction(10**8), layered=True)
    assert isinstance(noise.sampler, Layers)
    generator = noise.generator(TestKey("exact"), cipher="chacha20")
    drawn = noise.draw(TestKey("exact"), 20_000, step=3, cipher="chacha20")
    assert np.array_equal(generator.fill_(torch.empty(20_000, dtype=torch.int64), step=3, stream=0), drawn)


@pytest.mark.parametrize(
    ("variance", "sampler"),
    [(Fraction(100), SkellamTable), (Fraction(2**28) - 1, SkellamTable), (Fraction(2**28), WideSkellam)],
)
def test_either_skellam_sampler_has_the_scale_and_a_certificate(variance, sampler):
    noise, num = skellam_noise_for(variance), 100_000
    assert isinstance(noise.sampler, sampler)
    assert 0 < noise.total_variation <= MAX_DISTANCE
    drawn = noise.draw(TestKey("exact"), num, step=0)
    assert np.abs(drawn).max() <= noise.largest
    # The fourth moment is 3μ² + μ: the mean square's variance is (2 + 1/μ)/n.
    score = (np.mean(drawn.astype(float) ** 2) / float(variance) - 1.0) / math.sqrt(2.01 / num)
    assert abs(score) < stats.norm.isf(1e-4 / 2)
