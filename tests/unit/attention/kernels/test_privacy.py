"""The guarantee through the kernel: it moves as far as the theorem says and no further, and refuses before it spends."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from dp_flash_attention.accounting import GaussianFilter
from dp_flash_attention.attention import (
    AttentionBounds,
    CallNoise,
    dp_flash_attention,
    plan_attention_release,
)
from dp_flash_attention.attention.backends import registry
from dp_flash_attention.attention.interface import AttentionCall, Rounding, RowNorms
from dp_flash_attention.attention.kernels.backend import TritonBackend
from dp_flash_attention.attention.kernels.launch import attention_forward
from dp_flash_attention.attention.sensitivity import (
    add_or_remove_sensitivity,
    clip_threshold,
    replace_one_sensitivity,
    rounding_slack,
)
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget
from dp_flash_attention.noise import TestKey

WIDTH, ROWS = 16, 40
R_Q, R_K, R_V, SCALE = 1.0, 1.5, 2.0, 1.0
S = SCALE * R_Q * R_K


def exact(query, key, value, *, dtype, hidden=None, null_rows=0.0, clip_values=True):
    thresholds = [clip_threshold(norm, dtype, WIDTH) for norm in (R_Q, R_K, R_V)]
    if not clip_values:
        thresholds[2] = 2.0**39
    call = AttentionCall(
        query=query.to(dtype),
        key=key.to(dtype),
        value=value.to(dtype),
        norms=RowNorms(query=thresholds[0], key=thresholds[1], value=thresholds[2]),
        scale=SCALE,
        score_bound=S,
        causal=False,
        hidden=hidden,
        null_rows=null_rows,
        stddev=None,
        noise=None,
        out_dtype=torch.float32,
    )
    with np.errstate(over="ignore", invalid="ignore"):
        out, _ = attention_forward(call)
    return out.double()


def charged(sensitivity, dtype, **arguments):
    slack = rounding_slack(
        rounding=Rounding.FIXED_SHIFT, dtype=dtype, width=WIDTH, num_rows=ROWS, num_passes=1, score_bound=S
    )
    return sensitivity(value_norm=R_V, score_bound=S + slack.score, **arguments) + slack.output * R_V


def worst_context():
    """The rest lies at score −S with values −R·u; the record's row at +S with ±R·u. Rows are far longer than bounds."""
    query, u = torch.zeros(1, 1, 1, WIDTH), torch.zeros(WIDTH)
    query[..., 0], u[1] = 10.0, 1.0
    key = torch.zeros(1, 1, ROWS, WIDTH)
    key[..., 0] = -50.0
    key[0, 0, 7, 0] = 50.0
    value = (-30.0 * u).expand(1, 1, ROWS, WIDTH).clone()
    value[0, 0, 7] = 30.0 * u
    return query, key, value, u


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_worst_pair_of_contexts_reaches_the_sensitivity_and_stays_within_it(dtype):
    query, key, value, u = worst_context()
    other_value, other_key = value.clone(), key.clone()
    other_value[0, 0, 7] = -30.0 * u  # the row's own value turned round
    moved = (exact(query, key, value, dtype=dtype) - exact(query, other_key, other_value, dtype=dtype)).norm()
    bound = charged(replace_one_sensitivity, dtype, rest=ROWS - 1)
    assert moved <= bound
    assert moved >= (0.95 if dtype is torch.bfloat16 else 0.99) * bound
    # Planted: values that are not clipped.
    far = exact(query, key, value, dtype=dtype, clip_values=False)
    assert (far - exact(query, key, other_value, dtype=dtype, clip_values=False)).norm() > bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_removing_the_worst_row_stays_within_the_sensitivity(dtype):
    query, key, value, _ = worst_context()
    hidden = torch.zeros(1, ROWS, dtype=torch.bool)
    rest = hidden.clone()
    hidden[0, 30:], rest[0, 30:] = True, True
    rest[0, 7] = True
    null_rows = 5.0
    moved = exact(query, key, value, dtype=dtype, hidden=hidden, null_rows=null_rows) - exact(
        query, key, value, dtype=dtype, hidden=rest, null_rows=null_rows
    )
    bound = charged(add_or_remove_sensitivity, dtype, null_rows=null_rows)
    assert 0.2 * bound <= moved.norm() <= bound
    # Planted: the null rows forgotten where the record is alone.
    alone = torch.ones(1, ROWS, dtype=torch.bool)
    alone[0, 7] = False
    none = torch.ones(1, ROWS, dtype=torch.bool)
    forgotten = exact(query, key, value, dtype=dtype, hidden=alone) - exact(
        query, key, value, dtype=dtype, hidden=none
    )
    assert forgotten.norm() > bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_row_whatever_it_holds_moves_the_output_further(dtype, rng):
    query = torch.randn(1, 1, 1, WIDTH)
    bound = charged(replace_one_sensitivity, dtype, rest=ROWS - 1)
    largest = 0.0
    for _ in range(40):
        scale = torch.tensor(10.0 ** rng.uniform(-30, 38, size=(2, ROWS, 1)), dtype=torch.float64)
        key, value = (torch.randn(1, 1, ROWS, WIDTH).double() * scale[k] for k in (0, 1))
        other_key, other_value = key.clone(), value.clone()
        for each in (other_key, other_value):
            each[0, 0, 3] = torch.randn(WIDTH) * 10.0 ** rng.uniform(-30, 37)
        most = 0.9 * torch.finfo(dtype).max
        key, value, other_key, other_value = (
            each.clamp(-most, most) for each in (key, value, other_key, other_value)
        )
        moved = exact(query, key, value, dtype=dtype) - exact(query, other_key, other_value, dtype=dtype)
        assert float(moved.norm()) <= bound  # a NaN is not
        largest = max(largest, float(moved.norm()))
    assert largest > 0.02 * bound  # one of forty random rows: the search did move the output


# Through the call itself ---------------------------------------------------------------------------------------------


@pytest.fixture
def triton_by_name(monkeypatch):
    """Lets the name "triton" mean the back end under the interpreter."""
    monkeypatch.setattr(registry, "_triton", TritonBackend)


def given():
    torch.manual_seed(3)
    tensors = [torch.randn(2, 2, count, 16) for count in (6, 33, 33)]
    bounds = AttentionBounds(query_norm=2.0, key_norm=2.0, value_norm=1.5, num_rows=33)
    return tensors, bounds


def test_the_same_release_as_other_back_ends_for_the_same_key_and_call(triton_by_name):
    tensors, bounds = given()
    outputs = {}
    for backend in ("triton", "flash", "math"):
        noise = CallNoise(TestKey("back ends"), cipher="chacha20")
        outputs[backend], release = dp_flash_attention(
            *tensors, bounds=bounds, noise=noise, mu=1.0, backend=backend
        )
        assert release.backend == backend
    # Scores and sums in float32; noise to its last bits.
    torch.testing.assert_close(outputs["triton"], outputs["flash"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["triton"], outputs["math"], rtol=1e-5, atol=1e-5)


def test_noise_that_has_no_kernel_is_refused_before_anything_is_spent(triton_by_name):
    tensors, bounds = given()
    noise = CallNoise(TestKey("aes"))
    budget = GaussianFilter(
        PrivacyBudget(epsilon=2.0, delta=1e-6), neighboring_relation=NeighboringRelation.REPLACE_ONE
    )
    with pytest.raises(InvalidInputError, match="needs 'chacha20'"):
        dp_flash_attention(
            *tensors, bounds=bounds, noise=noise, mu=0.1, privacy_filter=budget, backend="triton"
        )
    assert noise.next_call == 0
    assert budget.num_releases == 0


def test_a_call_charged_for_the_narrower_rounding_is_taken(triton_by_name):
    tensors, bounds = given()
    fixed = dataclasses.replace(bounds, rounding=Rounding.FIXED_SHIFT)
    shape = {
        "num_queries": 6,
        "query_width": 16,
        "value_width": 16,
        "num_heads": 2,
        "batch_size": 2,
        "mu": 1.0,
    }
    wide = plan_attention_release(bounds, **shape, compute_dtype=torch.bfloat16, num_key_rows=33)
    narrow = plan_attention_release(fixed, **shape, compute_dtype=torch.bfloat16, num_key_rows=33)
    assert float(narrow.stddev.max()) < float(wide.stddev.max())
    noise = CallNoise(TestKey("fixed"), cipher="chacha20")
    output, release = dp_flash_attention(
        *(each.bfloat16() for each in tensors), bounds=fixed, noise=noise, mu=1.0, backend="triton"
    )
    assert release.backend == "triton"
    assert torch.isfinite(output).all()
    with pytest.raises(InvalidInputError, match="fixed_shift"):
        dp_flash_attention(*tensors, bounds=fixed, noise=noise, mu=1.0, backend="flash")
    assert math.isfinite(float(narrow.stddev.max()))
