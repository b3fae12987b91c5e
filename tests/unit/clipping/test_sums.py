from __future__ import annotations

import pytest
import torch
from torch import nn

from dp_flash_attention.clipping.sums import ClippedSums
from dp_flash_attention.core.errors import RunStateError


def sums(dtype: torch.dtype = torch.float32) -> ClippedSums:
    return ClippedSums({"a": nn.Parameter(torch.ones(2, 3, dtype=dtype)), "b": nn.Parameter(torch.ones(4))})


def test_what_nothing_was_added_to_is_zero_and_at_least_float32() -> None:
    found = sums(torch.bfloat16).all()
    assert [total.dtype for total in found.values()] == [torch.float32, torch.float32]
    assert not any(total.any() for total in found.values())
    assert sums(torch.float64).all()["a"].dtype == torch.float64


def test_a_fresh_sum_is_fresh_once() -> None:
    held = sums()
    first, fresh = held.of("a")
    second, fresh_again = held.of("a")
    assert (fresh, fresh_again) == (True, False)
    assert first is second


def test_whole_microbatches_add_up() -> None:
    held = sums()
    for value in (1.0, 2.0):
        held.add({"a": torch.full((2, 3), value)})
    assert bool((held.all()["a"] == 3.0).all())
    held.reset()
    assert not held.all()["a"].any()


def test_half_a_microbatch_is_never_handed_out() -> None:
    held = sums()
    held.begin()
    for action in (held.all, held.check_whole, lambda: held.add({"b": torch.ones(4)})):
        with pytest.raises(RunStateError, match="count an example twice"):
            action()
    held.reset()
    held.begin()
    held.end()
    held.check_whole()
