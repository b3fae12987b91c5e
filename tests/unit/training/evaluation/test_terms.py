from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dp_flash_attention.accounting import GaussianRelease, epsilon
from dp_flash_attention.core.errors import InvalidInputError, RunStateError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training.evaluation import ReleaseTerms, read_evaluation
from dp_flash_attention.training.evaluation.terms import release
from dp_flash_attention.training.finite_precision import finite_precision


@pytest.mark.parametrize("noise", ["secure", "fast", "exact"])
@pytest.mark.parametrize("l2_sensitivity", [0.5, 3.0])
def test_a_release_costs_what_it_says_and_adds_what_it_returns(noise: str, l2_sensitivity: float) -> None:
    values = torch.zeros(20_000, dtype=torch.float64)
    terms = ReleaseTerms(epsilon=1.0, delta=1e-6, key=TestKey("terms"), noise=noise)  # type: ignore[arg-type]
    stddev = release(values, l2_sensitivity=l2_sensitivity, terms=terms)
    spent = epsilon(GaussianRelease(noise_multiplier=stddev / l2_sensitivity), delta=1e-6)
    assert 0.99 < spent <= 1.0
    # 20,000 samples: the deviation is right to 3 % but for 1 in 10⁸.
    assert float(values.std()) == pytest.approx(stddev, rel=0.03)


def test_exact_noise_is_whole_steps_of_a_public_grid_and_paid_for() -> None:
    terms = ReleaseTerms(epsilon=1.0, delta=1e-6, key=TestKey("grid"), noise="exact")
    precision = finite_precision(
        "exact", epsilon=1.0, delta=1e-6, l2_clip_norm=3.0, num_parameters=500, num_steps=1
    )
    assert precision is not None
    found = []
    for offset in (-0.4, 0.0, 0.4):  # what rounds alike comes out alike, to the last bit
        values = (torch.arange(500, dtype=torch.float64) - 250 + offset) * precision.grid
        stddev = release(values, l2_sensitivity=3.0, terms=terms)
        assert torch.equal(values, (values / precision.grid).round() * precision.grid)
        found.append(values)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    # Rounding is charged: beside float noise of the same budget, by exactly what it adds to the sensitivity.
    float_stddev = release(values, l2_sensitivity=3.0, terms=replace(terms, noise="secure"))
    assert precision.sensitivity_factor - 1.0 >= precision.grid * math.sqrt(500) / 3.0 > 8e-7
    assert stddev / float_stddev == pytest.approx(precision.sensitivity_factor, rel=1e-12)
    event = GaussianRelease(noise_multiplier=stddev / (3.0 * precision.sensitivity_factor))
    assert epsilon(event, delta=1e-6 - precision.delta) <= 1.0
    with pytest.raises(InvalidInputError, match="delta"):
        release(torch.zeros(500), l2_sensitivity=3.0, terms=replace(terms, delta=1e-24))


def test_a_release_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(RunStateError, match="kind 'ranking'"):
        read_evaluation({"kind": "ranking"})
