"""The attention kernel, under the interpreter, against the float64 reference and the CPU generators."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from dp_flash_attention.attention.interface import AttentionCall, RowNorms
from dp_flash_attention.attention.kernels import accumulate, launch
from dp_flash_attention.attention.kernels.launch import attention_forward, default_factors
from dp_flash_attention.attention.kernels.narrow import dot
from dp_flash_attention.attention.reference import reference_attention, reference_noise
from dp_flash_attention.core.errors import NoiseUnavailableError

VALUE_NORM, SCORE_BOUND = 1.5, 3.0  # of the calls of conftest.py


def tolerance(dtype):
    """How far a row of the exact part may be from the reference, in norm, as a share of the value bound.

    float32: scores carry (width + 4)·2^-24·S, sums of some hundred rows about as much. bfloat16 besides: the reference
    rounds clipped rows (2^-9 each for query, key and value), the kernel the query and the weights; a score
    moves by 2·2^-9·S, an output by twice that share at most. float16 has 2^-12 in place of 2^-9.
    """
    if dtype is torch.float32:
        return 2e-5
    half_unit = 2.0**-9 if dtype is torch.bfloat16 else 2.0**-12
    return 2 * (2 * half_unit * SCORE_BOUND + 2 * half_unit)


def worst_row(got, want):
    return float(torch.linalg.vector_norm(got.double() - want, dim=-1).max()) / VALUE_NORM


SMALL = {"queries": 17, "rows": 33, "heads": 2, "null_rows": 0.5}  # two programs: noise is slow to interpret
CASES = {
    "one query, one row": {"queries": 1, "rows": 1},
    "odd": {"queries": 17, "rows": 33, "heads": 4, "groups": 2, "batch": 2, "null_rows": 0.5},
    "many blocks, causal": {"queries": 129, "rows": 129, "causal": True, "width": 64, "value_width": 64},
    "causal, fewer rows than queries": {"queries": 70, "rows": 20, "causal": True, "null_rows": 1.0},
    "causal, more rows than queries": {"queries": 20, "rows": 70, "causal": True, "hides": True},
    "widths of 80 and 32": {"width": 80, "value_width": 32, "rows": 129, "hides": True, "null_rows": 3.0},
    "widths of 24 and 128": {"width": 24, "value_width": 128, "heads": 2, "groups": 2},
    "bfloat16": {"dtype": torch.bfloat16, "queries": 65, "rows": 130, "width": 64, "value_width": 64},
    "bfloat16, causal, grouped": {
        "dtype": torch.bfloat16,
        "queries": 65,
        "rows": 65,
        "width": 128,
        "value_width": 128,
        "causal": True,
        "heads": 2,
        "null_rows": 2.0,
    },
    "float16": {"dtype": torch.float16, "queries": 65, "rows": 130, "hides": True, "null_rows": 2.0},
    "float16, causal, grouped": {
        "dtype": torch.float16,
        "queries": 35,
        "rows": 35,
        "width": 32,
        "value_width": 128,
        "causal": True,
        "heads": 2,
    },
}


@pytest.mark.parametrize("factors", ["inline", "ahead"])
@pytest.mark.parametrize("case", CASES)
def test_the_exact_part_is_the_reference(case, factors, make_call):
    call = make_call(**CASES[case], noise=None)
    got, lse = attention_forward(call, factors=factors, with_lse=True)
    want = reference_attention(call)
    assert worst_row(got, want) <= tolerance(call.query.dtype)
    denominators = reference_denominators(call)
    torch.testing.assert_close(
        lse.double().exp(),
        denominators,
        rtol={torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.006}[call.query.dtype],
        atol=0,
    )


def reference_denominators(call):
    """Of the definition: the output of values that are all ones, times itself without null rows, inverted."""
    ones = torch.ones_like(call.value[..., :1]).double()
    norms = dataclasses.replace(call.norms, value=1.0)
    share = reference_attention(dataclasses.replace(call, value=ones, norms=norms, null_rows=1.0))[..., 0]
    return share / (1 - share) + call.null_rows


@pytest.mark.parametrize("name", ["secure", "fast"])
@pytest.mark.parametrize("case", ["odd", "many blocks, causal", "widths of 24 and 128"])
def test_the_noise_is_that_of_the_cpu_generators_element_by_element(case, name, make_call):
    call = make_call(**CASES[case], noise=name)
    exact, _ = attention_forward(dataclasses.replace(call, noise=None, stddev=None))
    noisy, _ = attention_forward(call)
    # The sum is rounded once, at a magnitude below 8; the normals agree to 16 units in the last place.
    torch.testing.assert_close((noisy - exact).double(), reference_noise(call), rtol=2e-6, atol=2.0**-21)


def test_the_comparison_of_noise_sees_another_call_head_row_and_scale(make_call, noise_stream):
    call = make_call(**SMALL)
    exact, _ = attention_forward(dataclasses.replace(call, noise=None, stddev=None))
    wrongs = {
        "call": dataclasses.replace(call, noise=noise_stream(call_id=6)),
        "scale": dataclasses.replace(call, stddev=call.stddev * 1.001),
        "rows": dataclasses.replace(call, stddev=call.stddev.flip(2)),
        "generator": dataclasses.replace(call, noise=noise_stream("fast")),
    }
    for wrong in wrongs.values():
        noisy, _ = attention_forward(wrong)
        assert not torch.allclose((noisy - exact).double(), reference_noise(call), rtol=2e-6, atol=2.0**-21)


def test_equal_rows_of_two_heads_and_entries_get_noise_of_their_own(make_call):
    call = make_call(batch=2, heads=2, groups=2, queries=5)
    call.query.fill_(0), call.value.fill_(0)
    out, _ = attention_forward(dataclasses.replace(call, stddev=torch.ones(2, 2, 5)))
    assert len(out.flatten().unique()) == out.numel()


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_is_rounded_once_after_the_noise(out_dtype, make_call):
    call = make_call(**SMALL)
    whole, _ = attention_forward(call)
    narrow, _ = attention_forward(dataclasses.replace(call, out_dtype=out_dtype))
    assert narrow.dtype is out_dtype
    assert torch.equal(narrow, whole.to(out_dtype))


@pytest.mark.parametrize("factors", ["inline", "ahead"])
def test_nothing_is_left_unwritten_and_no_scratch_is_read_before_it_is_written(factors, make_call, poisoned):
    call = make_call(**SMALL, hides=True)
    found = [attention_forward(call, factors=factors, with_lse=True) for _ in range(2)]
    assert len(poisoned) == (
        4 if factors == "inline" else 8
    )  # output, logarithms, two arrays of factors, twice
    for first, again in zip(*found, strict=True):
        assert torch.isfinite(first).all()
        assert torch.equal(first, again)  # warm and cold


def test_any_strides_mean_the_same(make_call):
    call = make_call(**SMALL, hides=True)
    other = dataclasses.replace(
        call,
        query=call.query.transpose(1, 2).contiguous().transpose(1, 2),
        key=call.key.mT.contiguous().mT,
        value=torch.cat([call.value, call.value], dim=-1)[..., : call.value.shape[-1]],
        hidden=call.hidden.T.contiguous().T,
        stddev=torch.full((), 0.7).expand(call.stddev.shape),
    )
    same = dataclasses.replace(call, stddev=torch.full_like(call.stddev, 0.7))
    assert torch.equal(attention_forward(other)[0], attention_forward(same)[0])


def test_which_factors_are_computed_is_chosen_by_shape_and_can_be_asked_for(monkeypatch, make_call):
    launched = []
    original = launch.row_factors
    monkeypatch.setattr(launch, "row_factors", lambda *args: launched.append(1) or original(*args))
    few, many = make_call(queries=1), make_call(queries=65, heads=8, noise=None, value_width=64)
    assert (default_factors(few), default_factors(many)) == ("inline", "ahead")
    attention_forward(few)
    assert len(launched) == 0
    attention_forward(few, factors="ahead")
    assert len(launched) == 2
    attention_forward(many)
    assert len(launched) == 4


# What must not go wrong, planted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["query", "key", "value"])
@pytest.mark.parametrize("factors", ["inline", "ahead"])
def test_a_missing_clip_is_seen(rows, factors, make_call):
    call = make_call(**SMALL, noise=None)
    unclipped = dataclasses.replace(call, norms=dataclasses.replace(call.norms, **{rows: 2.0**39}))
    with np.errstate(over="ignore"):
        got, _ = attention_forward(unclipped, factors=factors)
    assert not worst_row(got, reference_attention(call)) <= tolerance(torch.float32)


def test_forgotten_null_rows_are_seen(make_call):
    call = make_call(**SMALL, noise=None)
    got, _ = attention_forward(dataclasses.replace(call, null_rows=0.0))
    assert worst_row(got, reference_attention(call)) > tolerance(torch.float32)


def test_a_forgotten_mask_and_a_wrong_diagonal_are_seen(make_call):
    call = make_call(**CASES["causal, more rows than queries"], noise=None)
    want = reference_attention(call)
    for wrong in ({"hidden": None}, {"causal": False}):
        got, _ = attention_forward(dataclasses.replace(call, **wrong))
        assert worst_row(got, want) > tolerance(torch.float32)


def test_long_contexts_are_summed_in_passes_and_every_row_counts_once(monkeypatch, make_call):
    call = make_call(rows=150, noise=None, null_rows=1.0)
    one, _ = attention_forward(call)
    monkeypatch.setattr(launch, "PASS_ROWS", 64)
    several, _ = attention_forward(call)
    assert worst_row(several, reference_attention(call)) <= tolerance(torch.float32)
    assert worst_row(several, one.double()) <= 2e-6
    assert not torch.equal(several, one)  # which path ran: the sums are grouped differently


# Edges ---------------------------------------------------------------------------------------------------------------


def test_a_query_that_sees_nothing_is_zero_plus_noise(make_call):
    call = make_call(**SMALL, hides=True)
    call.hidden[0] = True
    for null_rows in (0.0, 0.5):
        out, _ = attention_forward(dataclasses.replace(call, null_rows=null_rows))
        torch.testing.assert_close(out[0].double(), reference_noise(call)[0], rtol=2e-6, atol=1e-7)


def test_no_rows_at_all(make_call):
    call = make_call(rows=0, null_rows=2.0)
    out, _ = attention_forward(call)
    torch.testing.assert_close(out.double(), reference_noise(call), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [{"queries": 0}, {"batch": 0}])
def test_empty_outputs_need_no_launch(shape, make_call):
    out, lse = attention_forward(make_call(**shape), with_lse=True)
    assert out.numel() == 0
    assert lse.numel() == 0


@pytest.mark.parametrize("factors", ["inline", "ahead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e13, 3e38])
def test_huge_finite_rows_count_as_zero_rows_and_never_make_a_nan(size, dtype, factors, make_call):
    call = make_call(**{**SMALL, "dtype": dtype}, noise=None)
    zeroed = dataclasses.replace(call, key=call.key.clone(), value=call.value.clone())
    for row in (3, 20):
        zeroed.key[:, :, row] = 0.0
        zeroed.value[:, :, row] = 0.0
        call.key[:, :, row] = torch.tensor([size, -size]).repeat(8)
        call.value[:, :, row] = size
    call.query[:, :, 2] = size
    zeroed.query[:, :, 2] = 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # silent on a device
        got, _ = attention_forward(call, factors=factors)
        want, _ = attention_forward(zeroed, factors=factors)
    assert torch.equal(got, want)


def call_at_the_edge(dtype, score_bound, values):
    """Opposite keys, so that rows weigh 1 and e^(-2S)."""
    unit = torch.zeros(1, 1, 1, 16)
    unit[..., 0] = 1.0
    return AttentionCall(
        query=unit.to(dtype),
        key=torch.cat([unit, -unit], dim=2).to(dtype),
        value=torch.cat([each * unit for each in values], dim=2).to(dtype),
        norms=RowNorms(query=1.0, key=1.0, value=1.0),
        scale=score_bound,
        score_bound=score_bound,
        causal=False,
        hidden=None,
        null_rows=0.0,
        stddev=None,
        noise=None,
        out_dtype=torch.float32,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_score_bound_keeps_every_weight(dtype):
    # S = 20: opposite rows weigh 1 and e^-40, and the second value is 2^10 times as long as its bound.
    got, _ = attention_forward(call_at_the_edge(dtype, 20.0, (0.0, 2.0**10)))
    want = math.exp(-40) / (1 + math.exp(-40))
    assert float(got[0, 0, 0, 0]) == pytest.approx(want, rel=1e-4 + float(torch.finfo(dtype).eps))


@triton.jit
def sum_of_float16_weights(weights, rows, total, PRECISION: tl.constexpr):
    return dot(weights.to(tl.float16).to(tl.float32), rows.to(tl.float32), total, PRECISION)


def test_an_average_of_float16_rows_is_no_longer_than_their_bound(monkeypatch):
    # All rows at -S, where weights are 0.69·2^-24: float16 itself would round them up to 2^-24.
    call = call_at_the_edge(torch.float16, 8.5, (1.0, 1.0))
    call.key[:, :, 0] = call.key[:, :, 1]
    limit = 1.0 + 2.0**-11 + 1e-6  # RowNorms has room for one rounding
    assert float(attention_forward(call)[0].norm()) <= limit
    monkeypatch.setattr(accumulate, "weighted_sum", sum_of_float16_weights)
    assert float(attention_forward(call)[0].norm()) > 1.4


def test_aes_has_no_kernel(make_call, noise_stream):
    stream = noise_stream()
    call = dataclasses.replace(make_call(), noise=dataclasses.replace(stream, cipher="aes-256-ctr"))
    with pytest.raises(NoiseUnavailableError, match="chacha20"):
        attention_forward(call)
