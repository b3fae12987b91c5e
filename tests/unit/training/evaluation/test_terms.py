from __future__ import annotations

import pytest
import torch

from dp_flash_attention.accounting import GaussianRelease, epsilon
from dp_flash_attention.core.errors import RunStateError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training.evaluation import ReleaseTerms, read_evaluation
from dp_flash_attention.training.evaluation.terms import release


@pytest.mark.parametrize("noise", ["secure", "fast"])
@pytest.mark.parametrize("l2_sensitivity", [0.5, 3.0])
def test_a_release_costs_what_it_says_and_adds_what_it_returns(noise: str, l2_sensitivity: float) -> None:
    values = torch.zeros(20_000, dtype=torch.float64)
    terms = ReleaseTerms(epsilon=1.0, delta=1e-6, key=TestKey("terms"), noise=noise)  # type: ignore[arg-type]
    stddev = release(values, l2_sensitivity=l2_sensitivity, terms=terms)
    spent = epsilon(GaussianRelease(noise_multiplier=stddev / l2_sensitivity), delta=1e-6)
    assert 0.99 < spent <= 1.0
    # 20,000 samples: the deviation is right to 3 % but for 1 in 10⁸.
    assert float(values.std()) == pytest.approx(stddev, rel=0.03)


def test_a_release_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(RunStateError, match="kind 'ranking'"):
        read_evaluation({"kind": "ranking"})
