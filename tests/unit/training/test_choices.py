from __future__ import annotations

from typing import Any

import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.training.choices import (
    RunRequest,
    TaskDefaults,
    choose,
    default_batch_size,
    default_delta,
)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 0.01, "dataset_size": 100}, "delta"),
        ({"l2_clip_norm": -1.0}, "l2_clip_norm"),
        ({"epochs": 0.0}, "epochs"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"expected_batch_size": 1.5}, "expected_batch_size"),
        ({"num_steps": 0}, "num_steps"),
        ({"dataset_size": -5}, "dataset_size"),
        ({"noise": "none"}, "noise"),
        ({"epochs": 1.0, "num_steps": 5}, "epochs"),
        ({"holdout_prob": 1.0}, "holdout_prob"),
        ({"holdout_prob": -0.1}, "holdout_prob"),
        ({"holdout_prob": float("nan")}, "holdout_prob"),
    ],
)
def test_a_request_out_of_range_is_refused_at_once(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{named} is"):
        RunRequest(**changes)


def test_what_is_left_open_gets_a_default_with_a_reason() -> None:
    choices = choose(RunRequest(), TaskDefaults(epochs=4.0), 40_000)
    assert choices.expected_batch_size == 1024
    assert choices.sampling_prob == 1024 / 40_000
    assert choices.num_steps == round(4.0 * 40_000 / 1024)
    assert choices.delta == 1e-5
    assert "epochs" in choices.reasons
    assert all(choices.reasons.values())
    with pytest.raises(TypeError):
        choices.reasons["delta"] = "none"  # type: ignore[index]


def test_what_is_asked_for_is_taken() -> None:
    request = RunRequest(
        delta=1e-7, expected_batch_size=100, num_steps=7, l2_clip_norm=0.25, learning_rate=0.5
    )
    choices = choose(request, TaskDefaults(), 1000)
    assert (choices.delta, choices.expected_batch_size, choices.num_steps) == (1e-7, 100, 7)
    assert (choices.l2_clip_norm, choices.learning_rate) == (0.25, 0.5)
    assert choices.reasons["num_steps"] == "as asked"
    assert "epochs" not in choices.reasons


@pytest.mark.parametrize("count", [1, 2, 7, 16, 99, 1000, 10**7])
def test_defaults_fit_any_count(count: int) -> None:
    choices = choose(RunRequest(), TaskDefaults(), count)
    assert 1 <= choices.expected_batch_size <= count
    assert 0.0 < choices.sampling_prob <= 1.0
    assert choices.num_steps >= 1
    assert default_delta(count) * count < 0.5
    assert default_delta(count) <= 1e-5  # the count may be noisy and far too small
    assert default_delta(count) * count >= 0.05 * 0.99 or default_delta(count) == 1e-5
    size = default_batch_size(count)
    assert 16 <= size <= 8192
    assert size & (size - 1) == 0


def test_a_batch_beyond_the_records_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="expected_batch_size"):
        choose(RunRequest(expected_batch_size=101), TaskDefaults(), 100)


def test_the_learning_rate_warms_up_and_ends_at_a_tenth() -> None:
    choices = choose(RunRequest(num_steps=100), TaskDefaults(), 1000)
    factors = [choices.learning_rate_factor(step) for step in range(100)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(0.0 < factor <= 1.0 for factor in factors)
    assert choose(RunRequest(num_steps=1), TaskDefaults(), 1000).learning_rate_factor(0) == 1.0
