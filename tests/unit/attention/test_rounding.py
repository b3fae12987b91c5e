"""Rounding: clipped rows obey their bound exactly, and a kernel's rounding is charged for because it is real."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from dp_flash_attention.attention import (
    AttentionBounds,
    AttentionCall,
    Rounding,
    plan_attention_release,
    reference_attention,
)
from dp_flash_attention.attention.backends import get_backend
from dp_flash_attention.attention.backends import kernel as kernel_backends
from dp_flash_attention.attention.interface import PASS_ROWS
from dp_flash_attention.attention.rows import clip_rows
from dp_flash_attention.attention.sensitivity import clip_threshold, rounding_slack, unit_roundoff
from dp_flash_attention.core.errors import InvalidInputError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def exact_square(row):
    return sum(Fraction(float(number)) ** 2 for number in row)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [1.0, 0.37, 11.3])
@pytest.mark.parametrize("width", [1, 5, 64])
def test_the_row_as_it_is_read_never_exceeds_the_bound(dtype, norm, width):
    rows = torch.randn(500, width, dtype=torch.float64)
    # All lengths, half of them within a rounding of the bound.
    rows = (
        rows
        / rows.norm(dim=1, keepdim=True)
        * norm
        * torch.logspace(-0.003, 1.0, 500, dtype=torch.float64)[:, None]
    )
    read = clip_rows(rows.to(dtype), clip_threshold(norm, dtype, width))
    assert all(exact_square(row) <= Fraction(norm) ** 2 for row in read)
    longest = float(read.double().norm(dim=1).max())
    assert longest > norm * (1.0 - 4.0 * unit_roundoff(dtype) - 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_the_threshold_rounding_does_exceed_it(dtype):
    rows = torch.randn(2000, 8, dtype=torch.float64).mul_(10.0)
    read = clip_rows(rows.to(dtype), 1.0)
    assert any(exact_square(row) > 1 for row in read)


def test_a_bound_below_the_dtype_is_refused():
    with pytest.raises(InvalidInputError, match="norm"):
        clip_threshold(1e-8, torch.float16, 64)


def call_over(key, value, query, plan):
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        norms=plan.norms,
        scale=plan.scale,
        score_bound=plan.score_bound,
        causal=False,
        hidden=None,
        null_rows=0.0,
        stddev=None,
        noise=None,
        out_dtype=torch.float32,
    )


def test_one_row_moves_a_bfloat16_kernel_by_more_than_exact_arithmetic_allows(monkeypatch):
    """All weights of a pass are re-rounded when its running maximum moves. This is why rounding is charged for."""
    monkeypatch.setattr(kernel_backends, "PASS_ROWS", 4096)  # one pass, as torch's own call would be
    num_rows, scale = 4096, 0.5
    bounds = AttentionBounds(query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=num_rows)
    settings = {
        "num_queries": 1,
        "query_width": 8,
        "scale": scale,
        "mu": 1.0,
        "compute_dtype": torch.bfloat16,
    }
    charged = plan_attention_release(bounds, **settings)
    ideal = plan_attention_release(replace(bounds, rounding=None), **settings)
    unit = torch.zeros(8)
    unit[0] = 0.99  # within the bound in bfloat16
    kernel = get_backend("flash", torch.device("cpu"))
    query, value = unit.expand(1, 1, 1, 8), unit.expand(1, 1, num_rows, 8)
    moved = []
    for score in torch.linspace(0.01, 0.99, 60):
        first = torch.zeros(1, 1, num_rows, 8)
        second = first.clone()
        second[0, 0, 0, 0] = score
        outputs = [
            kernel.release(call_over(key.bfloat16(), value.bfloat16(), query.bfloat16(), charged)).double()
            for key in (first, second)
        ]
        moved.append(float((outputs[0] - outputs[1]).norm()))
    assert max(moved) > 1.5 * float(ideal.sensitivity.max())
    assert max(moved) <= float(charged.sensitivity.max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [7, 1000, 20_000])
def test_kernels_stay_within_the_error_that_is_charged(dtype, num_rows):
    s = 3.0
    key, value, query = (torch.randn(1, 1, count, 16) for count in (num_rows, num_rows, 4))
    value[..., 0] += 3.0  # so that the average is long
    bounds = AttentionBounds(query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=num_rows)
    plan = plan_attention_release(bounds, num_queries=4, query_width=16, scale=s, mu=1.0, compute_dtype=dtype)
    call = call_over(key.to(dtype), value.to(dtype), query.to(dtype), plan)
    slack = rounding_slack(
        rounding=Rounding.RUNNING_MAX,
        dtype=dtype,
        width=16,
        num_rows=min(num_rows, PASS_ROWS),
        num_passes=math.ceil(num_rows / PASS_ROWS),
        score_bound=plan.score_bound,
    )
    found = get_backend("flash", torch.device("cpu")).release(call).double()
    # Half of the slack is one context's error; the result is brought to float32, which float64 notices.
    allowed = slack.output / 2 + (1e-7 if dtype is torch.float64 else 0.0)
    assert float((found - reference_attention(call)).norm(dim=-1).max()) <= allowed


def test_the_slack_grows_with_rows_and_coarseness_and_a_fixed_shift_saves_most():
    def slack(dtype, rows, rounding=Rounding.RUNNING_MAX):
        return rounding_slack(
            rounding=rounding, dtype=dtype, width=64, num_rows=rows, num_passes=1, score_bound=1.0
        )

    assert slack(torch.float32, PASS_ROWS).output > slack(torch.float32, 512).output
    assert (
        slack(torch.bfloat16, 512).output
        > slack(torch.float16, 512).output
        > slack(torch.float32, 512).output
    )
    fixed = slack(torch.bfloat16, 512, Rounding.FIXED_SHIFT)
    assert fixed.output < slack(torch.bfloat16, 512).output / 50
    assert fixed.score > unit_roundoff(torch.bfloat16)
