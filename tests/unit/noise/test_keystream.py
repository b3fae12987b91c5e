from __future__ import annotations

from typing import Any

import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise.keystream import (
    MAX_NUMBERS,
    MAX_READ_BYTES,
    MAX_STEP,
    MAX_STREAM,
    Domain,
    checked_count,
    checked_position,
    new_buffer,
)
from dp_flash_attention.noise.writer import CHUNK_NUMBERS


def test_the_last_position_is_the_last_that_the_counters_hold() -> None:
    assert checked_position(MAX_STEP, MAX_STREAM) == (2**63 - 1, 2**32 - 1)
    assert checked_count("n", MAX_NUMBERS) == 2**44


@pytest.mark.parametrize(
    ("step", "stream"),
    [(MAX_STEP + 1, 0), (0, MAX_STREAM + 1), (-1, 0), (0, -1), (0.0, 0), (True, 0), (None, 0), ("0", 0)],
)
def test_a_position_that_would_wrap_round_is_refused(step: Any, stream: Any) -> None:
    with pytest.raises(InvalidInputError):
        checked_position(step, stream)


@pytest.mark.parametrize("count", [-1, MAX_NUMBERS + 1, 1.5, None])
def test_a_count_beyond_one_position_is_refused(count: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^n is"):
        checked_count("n", count)


def test_domains_are_distinct_and_fit_their_field() -> None:
    numbers = [int(domain) for domain in Domain]
    assert len(set(numbers)) == len(numbers)
    assert all(0 < number < 2**32 for number in numbers)


def test_a_chunk_of_either_width_is_one_read() -> None:
    assert 8 * CHUNK_NUMBERS <= MAX_READ_BYTES
    assert len(new_buffer(64)) >= 64 + 15  # a cipher's block less one byte
