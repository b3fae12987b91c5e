"""The statement that comes with an output."""

import dataclasses

import pytest
import torch

from dp_flash_attention.accounting import epsilon
from dp_flash_attention.attention import AttentionBounds, CallNoise, dp_flash_attention
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget, PrivacyUnit
from dp_flash_attention.noise import SecretKey, TestKey

NUM_ROWS = 33


def bounds(**changes):
    given = {"query_norm": 2.0, "key_norm": 2.0, "value_norm": 1.5, "num_rows": NUM_ROWS, **changes}
    return AttentionBounds(**given)


def rows():
    return tuple(torch.randn(2, 4, count, 8) for count in (6, NUM_ROWS, NUM_ROWS))


def noise(label="call", **changes):
    return CallNoise(TestKey(label), **changes)


def test_the_release_states_what_was_certified_and_assumed():
    budget = PrivacyBudget(epsilon=1.0, delta=1e-6)
    _, release = dp_flash_attention(*rows(), bounds=bounds(), noise=noise(), budget=budget)
    assert release.uses_test_key
    assert not CallNoise(SecretKey.from_os()).uses_test_key
    assert 0.999 < release.epsilon(1e-6) <= 1.0
    assert 0.99e-6 < release.delta(1.0) <= 1e-6
    assert 1.0 <= epsilon(release.event, delta=1e-6) < 1.001
    assert release.guarantee.privacy_unit is PrivacyUnit.EXAMPLE
    assert any("owns at most 1" in each for each in release.assumptions)
    assert release.neighboring_relation is NeighboringRelation.REPLACE_ONE
    _, release = dp_flash_attention(
        *rows(),
        bounds=bounds(max_rows_per_record=3),
        noise=noise(),
        budget=budget,
        record_ids=torch.arange(NUM_ROWS) // 3,
    )
    assert release.guarantee.privacy_unit is PrivacyUnit.USER
    assert not any("owns at most" in each for each in release.assumptions)


def test_a_changed_release_is_another_object():
    release = dp_flash_attention(*rows(), bounds=bounds(), noise=noise(), mu=1.0)[1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        release.call_id = 5
