from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dp_flash_attention.clipping.clip import flat_clip_factors


def factor(
    norm: float, *, clip: float = 2.0, weight: float = 1.0, dtype: torch.dtype = torch.float32
) -> float:
    clipped = flat_clip_factors(
        torch.tensor([norm], dtype=dtype).square(), l2_clip_norm=clip, weights_B=torch.tensor([weight])
    )
    return float(clipped.factors_B[0])


@pytest.mark.parametrize(
    ("norm", "expected"),
    [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (4.0, 0.5), (math.inf, 0.0), (math.nan, 0.0)],
)
def test_the_table_of_factors(norm: float, expected: float) -> None:
    assert factor(norm) == expected
    assert factor(norm, weight=0.0) == 0.0


@given(st.floats(1e-18, 1e18), st.floats(1e-6, 1e6))
def test_no_contribution_is_longer_than_the_clip_norm(norm: float, clip: float) -> None:
    for dtype, rounding in ((torch.float32, 1e-6), (torch.float64, 1e-15)):
        scaled = factor(norm, clip=clip, dtype=dtype) * norm
        assert scaled <= clip * (1 + 2 * rounding)
        assert scaled >= min(norm, clip) * (1 - 2 * rounding)  # and none is shorter than it has to be


def test_an_example_without_a_norm_changes_no_other() -> None:
    squares, ones = torch.tensor([9.0, math.nan, 16.0, math.inf]), torch.ones(4)
    clipped = flat_clip_factors(squares, l2_clip_norm=1.0, weights_B=ones)
    assert clipped.not_finite_B.tolist() == [False, True, False, True]
    alone = flat_clip_factors(squares[::2], l2_clip_norm=1.0, weights_B=ones[::2])
    assert torch.equal(clipped.factors_B[::2], alone.factors_B)


def test_a_norm_that_is_a_rounding_error_below_zero_is_no_reason_to_drop_the_rest() -> None:
    """Squared norms are sums of squares, but if a rule ever returned less, NaN must not reach the sum."""
    clipped = flat_clip_factors(torch.tensor([-1e-12, 4.0]), l2_clip_norm=1.0, weights_B=torch.ones(2))
    assert bool(torch.isfinite(clipped.factors_B).all())
    assert clipped.factors_B.tolist() == [0.0, 0.5]
    assert clipped.not_finite_B.tolist() == [True, False]
