from __future__ import annotations

from typing import Any

import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.training import ExecutionConfig


@pytest.mark.parametrize("name", ["microbatch_size", "num_threads", "checkpoint_every", "memory_limit_bytes"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_settings_of_speed_are_checked(name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=name):
        ExecutionConfig(**{name: value})
    assert getattr(ExecutionConfig(**{name: 1}), name) == 1


def test_an_unknown_way_of_choosing_norms_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="norm_forms"):
        ExecutionConfig(norm_forms="fastest")  # type: ignore[arg-type]


def test_microbatches_of_one_example_have_one() -> None:
    with pytest.raises(InvalidInputError, match="microbatch_size is 64, but it must be 1"):
        ExecutionConfig(strategy="one_example")
    assert ExecutionConfig(strategy="one_example", microbatch_size=1).strategy == "one_example"


@pytest.mark.parametrize("strategy", ["two_pass", "one_example"])
def test_only_bookkeeping_is_compiled(strategy: Any) -> None:
    with pytest.raises(InvalidInputError, match="'bookkeeping' with compile"):
        ExecutionConfig(strategy=strategy, microbatch_size=1, compile=True)
