"""The gradients of the attention kernels, under the interpreter, against the float64 reference and finite differences."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from dp_flash_attention.attention.interface import RowNorms
from dp_flash_attention.attention.kernels import backward, launch_backward
from dp_flash_attention.attention.kernels.launch_backward import attention_backward
from dp_flash_attention.attention.reference import reference_attention, reference_gradients
from dp_flash_attention.attention.rows import clip_rows

NAMES = ("query", "key", "value")


def tolerance(dtype):
    """How far a gradient may be from the reference, in norm, as a share of its own.

    float32: every number is a sum of at most some hundred products with an error of 2^-24 each, and scores carry (width +
    4)·2^-24·S: 2.5e-7 is the most that was found. The narrow dtypes round p, ds, the clipped query and the gradient itself,
    each by half a unit in the last place (2^-9, 2^-12) at most and by less than a third of that in the mean.
    """
    return {torch.float32: 2e-6, torch.bfloat16: 4 * 2.0**-9, torch.float16: 4 * 2.0**-12}[dtype]


def misses(got, want):
    """Returns the distance of each of three gradients from the reference, as a share of the reference's norm."""
    return [
        float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(got, want, strict=True)
    ]


def drawn_gradient(call):
    return torch.randn(*call.query.shape[:3], call.value.shape[3]).to(call.query.dtype)


CASES = {
    "odd": {"queries": 17, "rows": 33, "heads": 4, "groups": 2, "batch": 2, "null_rows": 0.5},
    "causal, hidden": {"queries": 37, "rows": 37, "causal": True, "hides": True, "heads": 2},
    "causal, fewer rows than queries": {"queries": 40, "rows": 20, "causal": True, "null_rows": 1.0},
    "causal, more rows than queries": {"queries": 20, "rows": 40, "causal": True, "hides": True},
    "widths of 80 and 32": {"width": 80, "value_width": 32, "rows": 65, "hides": True, "null_rows": 3.0},
    "widths of 24 and 128": {"width": 24, "value_width": 128, "heads": 2},
    "width of 256": {"width": 16, "value_width": 256, "queries": 5},
    "one query": {"queries": 1, "rows": 50},
    "one row": {"queries": 5, "rows": 1, "null_rows": 0.3},
}


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_the_reference(case, make_call):
    call = make_call(**CASES[case], noise=None)
    grad = drawn_gradient(call)
    assert max(misses(attention_backward(call, grad), reference_gradients(call, grad))) <= tolerance(
        torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_narrow_dtypes_miss_by_their_rounding(dtype, causal, make_call):
    shape = {"queries": 70, "rows": 66, "heads": 2, "width": 32, "value_width": 64, "null_rows": 1.0}
    call = make_call(**shape, causal=causal, hides=True, dtype=dtype, noise=None)
    grad = drawn_gradient(call)
    got = attention_backward(call, grad)
    assert [each.dtype for each in got] == [dtype] * 3
    assert max(misses(got, reference_gradients(call, grad))) <= tolerance(dtype)


@pytest.mark.parametrize("lengths", [0.02, 50.0])
def test_no_row_clipped_and_all_rows_clipped(lengths, make_call):
    call = make_call(queries=9, rows=21, heads=2, null_rows=0.5, lengths=lengths, noise=None)
    norms = [call.norms.query, call.norms.key, call.norms.value]
    longer = [(getattr(call, name).norm(dim=-1) > norm) for name, norm in zip(NAMES, norms, strict=True)]
    assert all(bool(each.all()) if lengths > 1 else not bool(each.any()) for each in longer)
    grad = drawn_gradient(call)
    got = attention_backward(call, grad)
    assert max(misses(got, reference_gradients(call, grad))) <= tolerance(torch.float32)
    if lengths > 1:  # along a row that is longer than its bound nothing changes
        for name, each in zip(NAMES, got, strict=True):
            along = (
                (each * getattr(call, name)).sum(-1) / each.norm(dim=-1) / getattr(call, name).norm(dim=-1)
            )
            assert float(along.abs().max()) < 1e-5


def test_a_row_exactly_at_its_bound_counts_as_clipped_and_one_just_below_does_not(make_call):
    call = make_call(queries=3, rows=7, heads=2, null_rows=0.5, noise=None, lengths=0.02)
    call = dataclasses.replace(call, norms=RowNorms(query=5.0, key=10.0, value=2.5))
    at = torch.zeros(16)
    at[0], at[7] = 3.0, -4.0  # a norm of 5 in every arithmetic
    call.query[0, 0, 1], call.key[0, 0, 2], call.value[0, 0, 3] = at, 2 * at, at / 2
    below = dataclasses.replace(
        call, query=call.query.clone(), key=call.key.clone(), value=call.value.clone()
    )
    for rows, place in ((below.query, (0, 0, 1)), (below.key, (0, 0, 2)), (below.value, (0, 0, 3))):
        rows[place] *= 1 - 2.0**-20
    grad = drawn_gradient(call)
    for each in (call, below):
        assert max(misses(attention_backward(each, grad), reference_gradients(each, grad))) <= tolerance(
            torch.float32
        )
    for index, place in enumerate(((0, 0, 1), (0, 0, 2), (0, 0, 3))):
        kept, moved = (attention_backward(each, grad)[index][place] for each in (call, below))
        assert abs(float(kept @ at)) < 1e-5 * float(kept.norm())
        assert abs(float(moved @ at)) > 1e-3 * float(moved.norm())  # the two sides of the kink differ
    # The other back ends clip with ``clip_rows``, whose gradient takes the same side.
    row = at.clone().requires_grad_(True)
    (side,) = torch.autograd.grad(clip_rows(row, 5.0).sum(), row)
    assert abs(float(side @ at)) < 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_they_are_the_slopes_of_the_forward_pass(causal, make_call):
    call = make_call(
        queries=6, rows=9, heads=2, groups=1, null_rows=0.5, causal=causal, hides=True, noise=None
    )
    grad = drawn_gradient(call).double()
    got = attention_backward(call, grad)
    wide = dataclasses.replace(call, **{name: getattr(call, name).double() for name in NAMES})
    for index, name in enumerate(NAMES):
        rows = getattr(wide, name)
        for _ in range(3):
            step = torch.randn_like(rows) * 1e-6 * rows.norm(dim=-1, keepdim=True)
            ends = [
                (reference_attention(dataclasses.replace(wide, **{name: rows + side * step})) * grad).sum()
                for side in (1, -1)
            ]
            slope = float(ends[0] - ends[1]) / 2
            size = float(got[index].double().norm() * step.norm())
            # The step's own error is of order 1e-12/1e-6; the gradient's is as above.
            assert abs(slope - float((got[index].double() * step).sum())) <= 5e-6 * size


@pytest.fixture
def _small_blocks(monkeypatch):
    for table in (launch_backward._QUERY_BLOCKS, launch_backward._ROW_BLOCKS):
        for kind in table:
            monkeypatch.setitem(table, kind, (16, 16, 4))


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("queries_and_rows", [(33, 49), (49, 33), (16, 16), (48, 48)])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_meet_without_a_gap_or_an_overlap(queries_and_rows, causal, make_call):
    queries, rows = queries_and_rows
    call = make_call(queries=queries, rows=rows, heads=2, null_rows=0.5, causal=causal, noise=None)
    grad = drawn_gradient(call)
    assert max(misses(attention_backward(call, grad), reference_gradients(call, grad))) <= tolerance(
        torch.float32
    )


def test_the_same_bits_every_time_and_nothing_unwritten_is_read_or_left(make_call, poisoned):
    call = make_call(queries=19, rows=35, heads=4, groups=2, hides=True, causal=True, noise=None)
    grad = drawn_gradient(call)
    first, second = attention_backward(call, grad), attention_backward(call, grad)
    assert len(poisoned) == 16  # 3 gradients, clipped queries, 1/Z, δ, two arrays of factors, twice
    for one, other in zip(first, second, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


def test_any_strides_mean_the_same(make_call):
    call = make_call(queries=9, rows=11, heads=2, hides=True, noise=None)
    other = dataclasses.replace(
        call,
        query=call.query.transpose(1, 2).contiguous().transpose(1, 2),
        key=call.key.mT.contiguous().mT,
        value=torch.cat([call.value, call.value], dim=-1)[..., : call.value.shape[-1]],
        hidden=call.hidden.T.contiguous().T,
    )
    grad = torch.ones(()).expand(*call.query.shape)
    for one, same in zip(
        attention_backward(other, grad), attention_backward(call, grad.clone()), strict=True
    ):
        assert torch.equal(one, same)
        assert one.is_contiguous()


def test_only_what_is_asked_for_is_computed(make_call, monkeypatch):
    launched = []

    class Recorded:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(backward, name)

        def __getitem__(self, grid):
            def run(*args, **kwargs):
                launched.append((self.name.split("_")[3], kwargs.get("NEEDS_QUERY")))
                return self.kernel[grid](*args, **kwargs)

            return run

    for name in ("dp_attention_bwd_query_kernel", "dp_attention_bwd_rows_kernel"):
        monkeypatch.setattr(launch_backward, name, Recorded(name))
    call = make_call(queries=3, rows=5, noise=None)
    grad = drawn_gradient(call)
    whole = attention_backward(call, grad)
    query, *nothing = attention_backward(call, grad, needs_rows=False)
    none, key, value = attention_backward(call, grad, needs_query=False)
    assert launched == [("query", True), ("rows", None), ("query", True), ("query", False), ("rows", None)]
    assert nothing == [None, None]
    assert none is None
    assert all(torch.equal(*pair) for pair in zip(whole, (query, key, value), strict=True))


# Edges ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{"queries": 0}, {"batch": 0}, {"rows": 0, "null_rows": 2.0}])
def test_empty_calls_have_gradients_of_zero(shape, make_call, poisoned):
    call = make_call(**shape, noise=None)
    for name, each in zip(NAMES, attention_backward(call, drawn_gradient(call)), strict=True):
        assert each.shape == getattr(call, name).shape
        assert torch.equal(each, torch.zeros_like(each))


def test_a_query_that_sees_nothing_moves_nothing(make_call, poisoned):
    call = make_call(queries=3, rows=5, heads=2, batch=2, hides=True, noise=None)
    call.hidden[0] = True
    for each in attention_backward(call, drawn_gradient(call)):
        assert torch.isfinite(each).all()
        assert not each[0].any()
        assert each[1].any()


def test_rows_of_zeros_have_a_gradient(make_call):
    call = make_call(queries=3, rows=5, noise=None)
    call.query[..., 1, :], call.key[..., 2, :], call.value[..., 3, :] = 0.0, 0.0, 0.0
    grad = drawn_gradient(call)
    assert max(misses(attention_backward(call, grad), reference_gradients(call, grad))) <= tolerance(
        torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e13, 3e38])
def test_huge_finite_rows_count_as_zero_rows_and_have_no_gradient(size, dtype, make_call):
    call = make_call(queries=17, rows=33, dtype=dtype, noise=None)
    zeroed = dataclasses.replace(
        call, query=call.query.clone(), key=call.key.clone(), value=call.value.clone()
    )
    for name, row in (("query", 2), ("key", 3), ("value", 20)):
        getattr(call, name)[:, :, row] = torch.tensor([size, -size]).repeat(8)
        getattr(zeroed, name)[:, :, row] = 0.0
    grad = drawn_gradient(call)
    with np.errstate(over="ignore", invalid="ignore"):  # silent on a device
        got, want = attention_backward(call, grad), attention_backward(zeroed, grad)
    for one, other, row in zip(got, want, (2, 3, 20), strict=True):
        assert not one[:, :, row].any()
        other[:, :, row] = 0.0
        assert torch.equal(one, other)


def test_the_largest_score_bound_keeps_every_gradient(make_call):
    unit = torch.zeros(1, 1, 1, 16)
    unit[..., 0] = 0.999
    call = dataclasses.replace(
        make_call(queries=1, rows=2, noise=None),
        query=unit,
        key=torch.cat([unit, -unit], dim=2),
        value=torch.cat([0 * unit, unit], dim=2),
        norms=RowNorms(query=1.0, key=1.0, value=1.0),
        scale=20.0,
        score_bound=20.0,
    )
    grad = torch.ones(1, 1, 1, 16)
    assert max(misses(attention_backward(call, grad), reference_gradients(call, grad))) <= 1e-4
    # The weight of the second row: e^-40, a gradient that is small and not lost.
    found = float(attention_backward(call, grad)[2][0, 0, 1, 0])
    assert found == pytest.approx(math.exp(-40 * 0.999**2), rel=1e-3)


# What must not go wrong, planted -------------------------------------------------------------------------------------


@triton.jit
def forgets_the_clip(grad, x, norm):
    return grad


@triton.jit
def forgets_the_direction(grad, x, norm):
    return grad * (norm / tl.maximum(tl.sqrt_rn(tl.sum(x * x, axis=1)), norm))[:, None]


@pytest.mark.parametrize("planted", [forgets_the_clip, forgets_the_direction])
def test_a_gradient_that_ignores_the_clip_is_seen(planted, make_call, monkeypatch):
    call = make_call(queries=9, rows=11, noise=None)
    grad = drawn_gradient(call)
    monkeypatch.setattr(backward, "row_gradients", planted)
    assert min(misses(attention_backward(call, grad), reference_gradients(call, grad))) > 0.05


@pytest.mark.parametrize(
    "change",
    [
        {"null_rows": 0.0},
        {"hidden": None},
        {"causal": False},
        {"scale": 0.49},
        {"norms": RowNorms(query=2.0, key=3.0, value=2.0)},
    ],
)
def test_another_call_is_seen(change, make_call):
    call = make_call(
        queries=9, rows=11, heads=2, groups=1, null_rows=0.5, causal=True, hides=True, noise=None
    )
    grad = drawn_gradient(call)
    want = reference_gradients(call, grad)
    assert max(misses(attention_backward(dataclasses.replace(call, **change), grad), want)) > 1e-3
