"""Both samplers behind one name. Fixed keys; the false-alarm rate of each statistic is 1e-4 over keys."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import Layers, TestKey
from dp_flash_attention.noise.wide_discrete_gaussian import WideDiscreteGaussian
from dp_flash_attention.quantum.exact_noise import MAX_DISTANCE, noise_for


@pytest.mark.parametrize(
    ("variance", "sampler"),
    [
        (Fraction(18), Layers),
        (Fraction(2048**2) - 1, Layers),
        (Fraction(2048**2), WideDiscreteGaussian),
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
