"""The sampler's law is tested with the mutations; here, what a step's sample may depend on."""

from __future__ import annotations

import pytest
import torch

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training import PrivacyPlan
from dp_flash_attention.training.sampler import PoissonSampler


def plan(sampling_prob: float) -> PrivacyPlan:
    return PrivacyPlan(
        epsilon=1e4,
        delta=1e-5,
        sampling_prob=sampling_prob,
        expected_batch_size=1.0 * sampling_prob,
        num_steps=3,
        l2_clip_norm=1.0,
        noise_multiplier=1.0,
        accountant="rdp",
    )


def sampler(num_records: int, sampling_prob: float = 0.3, key: str = "k") -> PoissonSampler:
    return PoissonSampler(num_records, plan(sampling_prob), TestKey(key))


def test_the_last_record_changes_no_other_records_coin() -> None:
    with_it, without = sampler(501), sampler(500)
    for step in range(20):
        drawn = with_it.indices(step)
        assert torch.equal(drawn[drawn < 500], without.indices(step))


def test_steps_and_keys_draw_independently_and_repeatably() -> None:
    draws = [sampler(500).indices(0), sampler(500).indices(1), sampler(500, key="other").indices(0)]
    assert torch.equal(draws[0], sampler(500).indices(0))
    for i in range(3):
        for j in range(i):
            # Independent samples of 150 share about 45; 90 or more would be 8 deviations away.
            assert len(set(draws[i].tolist()) & set(draws[j].tolist())) < 90


def test_indices_are_sorted_distinct_and_within_the_data() -> None:
    drawn = sampler(500).indices(0)
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn, drawn.unique())
    assert 0 <= int(drawn[0]) <= int(drawn[-1]) < 500


def test_probability_one_takes_all_and_a_tiny_one_none() -> None:
    assert sampler(7, 1.0).indices(0).tolist() == list(range(7))
    assert len(sampler(7, 1e-4).indices(0)) == 0


def test_no_records_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="number of records"):
        sampler(0)
