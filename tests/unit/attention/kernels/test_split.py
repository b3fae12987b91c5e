"""Few queries over many rows: whatever the ranges, the reference and the same noise; which path runs; the rounding."""

import dataclasses
import inspect

import pytest
import torch

from dp_flash_attention.attention.interface import PASS_ROWS, Rounding
from dp_flash_attention.attention.kernels import launch, launch_split
from dp_flash_attention.attention.kernels.launch import attention_forward
from dp_flash_attention.attention.kernels.launch_split import NUM_PROGRAMS, default_splits, part_blocks
from dp_flash_attention.attention.reference import reference_attention, reference_noise
from dp_flash_attention.attention.sensitivity import rounding_slack

VALUE_NORM = 1.5  # of the calls of conftest.py


@pytest.fixture(autouse=True)
def _short_passes(monkeypatch):
    for module in (launch, launch_split):
        monkeypatch.setattr(module, "PASS_ROWS", 64)


def worst_row(got, want):
    return float(torch.linalg.vector_norm(got.double() - want, dim=-1).max()) / VALUE_NORM


CASES = {
    "one query": {"queries": 1, "rows": 300},
    "odd, grouped, hidden": {
        "queries": 19,
        "rows": 150,
        "heads": 4,
        "groups": 2,
        "hides": True,
        "null_rows": 0.5,
    },
    "widths of 24 and 128": {"queries": 3, "rows": 129, "width": 24, "value_width": 128, "null_rows": 2.0},
    "several blocks": {"queries": 70, "rows": 140, "batch": 2},
}


@pytest.mark.parametrize("splits", [2, 3, 1000])
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranges_is_the_reference(case, splits, make_call):
    call = make_call(**CASES[case], noise=None)
    got, lse = attention_forward(call, splits=splits, with_lse=True)
    whole, whole_lse = attention_forward(call, splits=1, with_lse=True)
    assert worst_row(got, reference_attention(call)) <= 2e-5  # test_forward.tolerance
    assert worst_row(got, whole.double()) <= 2e-6  # another order of some float32 sums
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factors", ["inline", "ahead"])
def test_narrow_dtypes_and_both_ways_to_factors(dtype, factors, make_call):
    call = make_call(queries=3, rows=200, heads=2, hides=True, null_rows=0.5, dtype=dtype, noise=None)
    got, _ = attention_forward(call, splits=3, factors=factors)
    whole, _ = attention_forward(call, splits=1, factors=factors)
    # A row's rounded weight is its own, so that only the order of sums differs.
    assert worst_row(got, whole.double()) <= 2e-6


@pytest.mark.parametrize("name", ["secure", "fast"])
def test_the_noise_is_that_of_the_call_whatever_the_ranges(name, make_call):
    call = make_call(queries=35, rows=130, heads=2, value_width=128, noise=name)
    noise = reference_noise(call)
    for splits in (2, 3):
        noisy, _ = attention_forward(call, splits=splits)
        exact, _ = attention_forward(dataclasses.replace(call, noise=None, stddev=None), splits=splits)
        torch.testing.assert_close((noisy - exact).double(), noise, rtol=2e-6, atol=2.0**-21)


def test_the_same_bytes_every_time_and_nothing_unwritten_is_read_or_left(make_call, poisoned):
    call = make_call(queries=5, rows=300, heads=2, hides=True, noise=None)
    first, second = (attention_forward(call, with_lse=True) for _ in range(2))
    assert (5, 10, 16) in poisoned  # which path ran: five ranges' sums
    assert (5, 10) in poisoned
    for one, other in zip(first, second, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


def test_a_range_that_is_hidden_and_no_rows_at_all(make_call, poisoned):
    call = make_call(queries=2, rows=200, hides=True, null_rows=1.0, noise=None)
    call.hidden[:, 64:128] = True
    got, _ = attention_forward(call, splits=4)
    assert worst_row(got, reference_attention(call)) <= 2e-5
    call.hidden[:] = True
    assert not attention_forward(call, splits=4)[0].any()
    none = make_call(queries=2, rows=0, null_rows=1.0, noise=None)
    assert not attention_forward(none, splits=4)[0].any()


@pytest.mark.parametrize(
    ("queries", "rows", "heads", "causal", "splits"),
    [
        (1, 336_776, 1, False, 110),  # 329 passes, three to a range
        (1000, 336_776, 1, False, 8),  # 16 blocks of 64
        (1, 336_776, 32, False, 4),
        (1, PASS_ROWS, 1, False, 1),
        (1, PASS_ROWS + 1, 1, False, 2),
        (4096, 4096, 8, False, 1),
        (4096, 4096, 1, False, 2),
        (4096, 4096, 1, True, 1),
        (0, 5000, 1, False, 1),
    ],
)
def test_the_ranges_follow_from_the_shapes_alone(
    queries, rows, heads, causal, splits, make_call, monkeypatch
):
    monkeypatch.setattr(launch_split, "PASS_ROWS", PASS_ROWS)

    def empty(*shape):
        return torch.empty(1, dtype=torch.bfloat16).expand(shape)

    call = dataclasses.replace(
        make_call(queries=1, rows=1, noise=None),
        query=empty(1, heads, queries, 64),
        key=empty(1, 1, rows, 64),
        value=empty(1, 1, rows, 64),
        causal=causal,
    )
    assert default_splits(call) == splits
    block_m, _ = part_blocks(queries, 64, 64, torch.bfloat16)
    assert splits == 1 or splits * heads * -(-queries // block_m) <= NUM_PROGRAMS


def test_a_call_takes_the_ranges_of_its_shape_and_a_causal_one_never_does(make_call, monkeypatch):
    taken = []
    split = launch.attention_split
    monkeypatch.setattr(
        launch, "attention_split", lambda *a, **k: (taken.append(k["splits"]), split(*a, **k))[1]
    )
    attention_forward(make_call(queries=3, rows=300, noise=None))
    attention_forward(make_call(queries=3, rows=300, noise=None), splits=1)
    attention_forward(make_call(queries=3, rows=60, noise=None))
    attention_forward(make_call(queries=3, rows=300, causal=True, noise=None))
    assert taken == [5]


def test_the_rounding_stays_within_what_is_charged_for_any_number_of_ranges(make_call):
    # Equal rows, whose every addition rounds the same way, are the worst that is known.
    num_rows = 64 * 9
    call = make_call(queries=1, rows=num_rows, noise=None)
    row = torch.full((16,), 0.37)
    call = dataclasses.replace(
        call, key=(row / 3).expand(1, 1, num_rows, 16), value=(row / 1.5).expand(1, 1, num_rows, 16)
    )
    slack = rounding_slack(
        rounding=Rounding.FIXED_SHIFT,
        dtype=torch.float32,
        width=16,
        num_rows=64,
        num_passes=9,
        score_bound=3.0,
    )
    want = reference_attention(call)
    for splits in (1, 2, 3, 5, 9):
        got, _ = attention_forward(call, splits=splits)
        assert worst_row(got, want) <= slack.output / 2


@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_range_that_is_left_out_or_counted_twice_is_seen(wrong, make_call, monkeypatch):
    call = make_call(queries=5, rows=300, heads=2, noise=None)
    want = reference_attention(call)
    kernel = launch_split.dp_attention_merge_kernel
    place = list(inspect.signature(kernel.fn).parameters).index("num_splits")

    class Planted:
        def __getitem__(self, grid):
            def run(*args, **kwargs):
                changed = list(args)
                sums, weights = changed[0], changed[1]
                changed[0], changed[1] = (torch.cat([each, each[:1]]) for each in (sums, weights))
                changed[place] += wrong
                return kernel[grid](*changed, **kwargs)

            return run

    monkeypatch.setattr(launch_split, "dp_attention_merge_kernel", Planted())
    got, _ = attention_forward(call)
    assert worst_row(got, want) > 1e-3
