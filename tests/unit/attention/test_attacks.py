"""Ways round the noise, the clip and the budget that once worked. Each test failed before its defect was mended."""

import math
import os

import pytest
import torch

from dp_flash_attention.accounting import GaussianFilter
from dp_flash_attention.attention import (
    AttentionBounds,
    AttentionCall,
    CallNoise,
    Rounding,
    RowNorms,
    dp_flash_attention,
    plan_attention_release,
    reference_attention,
    release_attention,
)
from dp_flash_attention.attention.backends import get_backend
from dp_flash_attention.attention.interface import PASS_ROWS
from dp_flash_attention.attention.sensitivity import clip_threshold, rounding_slack
from dp_flash_attention.core.errors import BudgetExhaustedError, InvalidInputError, NoiseReuseError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget
from dp_flash_attention.noise import SecretKey, TestKey

NUM_ROWS = 8


def bounds(**changes):
    given = {"query_norm": 1.0, "key_norm": 1.0, "value_norm": 1.0, "num_rows": NUM_ROWS, **changes}
    return AttentionBounds(**given)


def rows(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shapes = ((1, 1, 2, 8), (1, 1, NUM_ROWS, 8), (1, 1, NUM_ROWS, 8))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def budget_filter():
    return GaussianFilter(PrivacyBudget(epsilon=2.0, delta=1e-6))


@pytest.mark.parametrize(
    ("dtype", "compute", "number"),
    [(torch.float32, torch.float16, 1e6), (torch.float64, torch.float32, 1e100), (torch.float64, torch.bfloat16, 1e60)],
)  # fmt: skip
def test_a_number_beyond_the_compute_dtype_is_refused_and_spends_nothing(dtype, compute, number):
    """It became infinite, and the output NaN: one record decided whether every answer was a number."""
    query, key, value = rows(dtype)
    value[0, 0, 0, 0] = number
    gate, noise = budget_filter(), CallNoise(TestKey("overflow"))
    with pytest.raises(InvalidInputError, match="value"):
        dp_flash_attention(
            query,
            key,
            value,
            bounds=bounds(),
            noise=noise,
            mu=0.1,
            compute_dtype=compute,
            privacy_filter=gate,
        )
    assert (gate.num_releases, noise.next_call) == (0, 0)


def test_a_bound_whose_squares_vanish_is_refused():
    """Squares of rows around 1e-25 are 0 in float32: a row of 280 bounds had norm 0 and was not clipped."""
    for norm in (1e-13, 1e-25):
        with pytest.raises(InvalidInputError, match="Rescale"):
            clip_threshold(norm, torch.float32, 8)
    assert clip_threshold(1e-11, torch.float32, 8) == pytest.approx(1e-11, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("backend", ["flash", "math"])
def test_a_graph_without_the_noise_cannot_be_recorded(backend):
    """``make_fx`` gave a graph that answered exactly, as often as it was asked, and took no call number."""
    from torch.fx.experimental.proxy_tensor import make_fx

    plan = plan_attention_release(bounds(), num_queries=2, query_width=8, num_key_rows=NUM_ROWS, mu=0.1)
    gate, noise = budget_filter(), CallNoise(SecretKey.from_os())

    def call(*tensors):
        return release_attention(*tensors, plan=plan, noise=noise, backend=backend, privacy_filter=gate)[0]

    with pytest.raises(NoiseReuseError, match="traced"):
        make_fx(call, _error_on_data_dependent_ops=False)(*rows())
    with pytest.raises(NoiseReuseError, match="traced"):
        torch.jit.trace(call, tuple(rows()), check_trace=False)
    assert (gate.num_releases, noise.next_call) == (0, 0)


def test_autocast_does_not_round_what_float32_was_charged_for():
    """Under autocast the scores of 'math' were products in bfloat16, 40,000 times less exact."""

    def answer():
        noise = CallNoise(TestKey("autocast"))
        return dp_flash_attention(*rows(), bounds=bounds(), noise=noise, mu=1.0, backend="math")[0]

    with torch.autocast("cpu", torch.bfloat16):
        inside = answer()
    assert torch.equal(inside, answer())


def test_a_call_number_beyond_the_generator_is_refused_before_it_is_paid_for():
    gate, noise = budget_filter(), CallNoise(TestKey("number"))
    with pytest.raises(InvalidInputError, match="call_id"):
        dp_flash_attention(*rows(), bounds=bounds(), noise=noise, mu=0.1, privacy_filter=gate, call_id=2**63)
    assert (gate.num_releases, noise.next_call) == (0, 0)
    with pytest.raises(InvalidInputError, match="first_call"):
        CallNoise(TestKey("number"), first_call=2**63)
    last = CallNoise(TestKey("number"), first_call=2**63 - 1)
    last.claim()
    with pytest.raises(InvalidInputError, match="call_id"):
        last.check()


def test_a_forked_copy_of_a_filter_spends_nothing(monkeypatch):
    """Parent and child each spent the whole budget."""
    gate = budget_filter()
    gate.spend(0.1)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(BudgetExhaustedError, match="process"):
        gate.spend(0.1)
    assert gate.num_releases == 1


def test_noise_of_a_causal_call_does_not_tell_a_private_number_of_rows():
    """Rounding was charged by the length of the key tensor, which σ then gave away."""
    private = bounds(num_rows=None, null_rows=5.0, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    query, key, value = rows()
    plans = [
        dp_flash_attention(
            query, key[:, :, :n], value[:, :, :n], bounds=private, noise=CallNoise(TestKey("n")), mu=1.0, is_causal=True
        )[1].plan
        for n in (NUM_ROWS, NUM_ROWS - 1)
    ]  # fmt: skip
    assert torch.equal(plans[0].stddev, plans[1].stddev)
    assert plans[0].num_key_rows is plans[1].num_key_rows is None


def error(backend, dtype, constants, num_rows, *, causal=False):
    """The error of equal values, one head for each constant, relative to their norm."""
    heads, width = len(constants), 8
    query = torch.zeros(1, heads, num_rows if causal else 1, width, dtype=dtype)
    query[..., 0] = 1.0
    key = torch.zeros(1, heads, num_rows, width, dtype=dtype)
    value = torch.zeros(1, heads, num_rows, width, dtype=dtype)
    value[0, :, :, 0] = constants[:, None]
    call = AttentionCall(
        query=query, key=key, value=value, norms=RowNorms(query=9.0, key=9.0, value=9.0), scale=1.0, score_bound=2.0,
        causal=causal, hidden=None, null_rows=0.0, stddev=None, noise=None, out_dtype=torch.float32,
    )  # fmt: skip
    with torch.no_grad():
        found = get_backend(backend, torch.device("cpu")).release(call)[0, :, -1, 0].double()
    last = AttentionCall(**{**call.__dict__, "query": query[:, :, :1], "causal": False})
    exact = reference_attention(last)[0, :, 0, 0]
    return float(((found - exact) / exact).abs().max())


def charged(dtype, num_rows, *, causal=False, score_bound=0.0):
    passed = num_rows if causal else min(num_rows, PASS_ROWS)
    passes = 1 if causal else math.ceil(num_rows / PASS_ROWS)
    slack = rounding_slack(
        rounding=Rounding.RUNNING_MAX, dtype=dtype, width=8, num_rows=passed, num_passes=passes, score_bound=score_bound
    )  # fmt: skip
    return slack.output / 2.0


def one_sided(num_rows, dtype=torch.float32):
    """Values just below 1 of which every addition to a sum above num_rows/2 loses almost half a unit."""
    unit = 2.0 ** (math.ceil(math.log2(num_rows)) - 1 - 23)
    return (1.0 - unit * (torch.arange(1, 5, dtype=torch.float64) + 0.502)).to(dtype)


@pytest.mark.parametrize(
    ("num_rows", "causal"), [(16_384, True), (8192, False), (40_000, False), (1000, True)]
)
def test_sums_that_all_round_the_same_way_stay_within_what_is_charged(num_rows, causal):
    """Kernels add row by row; a tree of blocks was charged for, and 16,384 causal rows lost more than that."""
    constants = one_sided(num_rows)[: 1 if causal else 4]
    found = error("flash", torch.float32, constants, num_rows, causal=causal)
    assert found <= charged(torch.float32, num_rows, causal=causal)


def test_a_float64_output_is_rounded_before_the_noise_and_charged_for():
    constants = 0.7 + 0.01 * torch.arange(16, dtype=torch.float64)
    for backend in ("flash", "math"):
        found = error(backend, torch.float64, constants, NUM_ROWS)
        assert 1e-9 < found <= charged(torch.float64, NUM_ROWS)
