"""The call: what it computes, forward and backward, and what it spends."""

import pytest
import torch

from dp_flash_attention.accounting import GaussianFilter
from dp_flash_attention.attention import (
    AttentionBounds,
    CallNoise,
    dp_flash_attention,
    reference_attention,
)
from dp_flash_attention.attention.backends import plain
from dp_flash_attention.attention.reference import reference_noise
from dp_flash_attention.core.errors import (
    BudgetExhaustedError,
    InvalidInputError,
)
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget
from dp_flash_attention.noise import TestKey

REMOVAL = NeighboringRelation.ADD_OR_REMOVE_ONE
NUM_ROWS = 33


def bounds(**changes):
    given = {"query_norm": 2.0, "key_norm": 2.0, "value_norm": 1.5, "num_rows": NUM_ROWS, **changes}
    return AttentionBounds(**given)


def removal(**changes):
    return bounds(num_rows=None, null_rows=20.0, neighboring_relation=REMOVAL, **changes)


def rows(
    *, batch=2, heads=4, groups=4, queries=6, keys=NUM_ROWS, width=8, value_width=8, dtype=torch.float32
):
    return (
        torch.randn(batch, heads, queries, width).to(dtype),
        torch.randn(batch, groups, keys, width).to(dtype),
        torch.randn(batch, groups, keys, value_width).to(dtype),
    )


def noise(label="call", **changes):
    return CallNoise(TestKey(label), **changes)


@pytest.fixture
def expected(call_of):
    """The reference's answer to the call with number 0, noise included."""

    def make(tensors, plan, hidden=None):
        call = call_of(tensors, plan, noise().claim(), hidden)
        return reference_attention(call) + reference_noise(call)

    return make


# Outputs and noise are of order 10; float32 sums of 33 to 20,000 rows and one rounding of the result.
FLOAT32 = 3e-5


@pytest.mark.parametrize("backend", ["flash", "math"])
@pytest.mark.parametrize(
    ("shape", "settings", "hides", "made"),
    [
        ({}, {}, False, bounds),
        ({}, {"is_causal": True}, False, bounds),
        ({"groups": 2}, {"enable_gqa": True}, False, bounds),
        ({"groups": 1}, {"enable_gqa": True, "is_causal": True}, True, lambda: bounds(num_rows=16)),
        ({"value_width": 12}, {}, True, lambda: bounds(num_rows=16)),
        ({"value_width": 3}, {"is_causal": True}, False, removal),
        ({"groups": 2}, {"enable_gqa": True, "is_causal": True}, True, removal),
        ({"queries": 50}, {"is_causal": True}, False, bounds),
        ({"keys": 0}, {}, False, removal),
        ({"keys": 20_000, "queries": 2, "groups": 2}, {"enable_gqa": True}, True, removal),
        ({"keys": 20_000, "queries": 2}, {"scale": 0.7}, False, lambda: bounds(num_rows=20_000)),
        ({"queries": 1, "keys": 1, "width": 1, "value_width": 1}, {}, False, lambda: bounds(num_rows=1)),
    ],
)
def test_a_call_is_the_reference_plus_the_noise_of_its_number(
    backend, shape, settings, hides, made, expected
):
    tensors = rows(**shape)
    hidden = None
    if hides:
        hidden = torch.zeros(2, tensors[1].shape[2], dtype=torch.bool)
        hidden[0, -17:] = True
        if made is removal:
            hidden[1] = True  # nobody is there
    output, release = dp_flash_attention(
        *tensors, bounds=made(), noise=noise(), mu=0.5, key_padding_mask=hidden, backend=backend, **settings
    )
    assert output.is_contiguous()
    assert output.dtype is torch.float32
    assert release.backend == backend
    difference = (output.double() - expected(tensors, release.plan, hidden)).abs()
    assert float(difference.max()) <= FLOAT32  # a NaN fails


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Weights, outputs and results are rounded to the dtype: a few units of 2^-8 and 2^-11 of numbers up to 8.
    [(torch.bfloat16, 0.15), (torch.float16, 0.02), (torch.float64, FLOAT32)],
)
def test_other_dtypes(dtype, tolerance, expected):
    tensors = rows(dtype=dtype)
    output, release = dp_flash_attention(*tensors, bounds=bounds(), noise=noise(), mu=5.0)
    assert output.dtype is (torch.float32 if dtype is torch.float64 else dtype)
    assert float((output.double() - expected(tensors, release.plan)).abs().max()) <= tolerance


def test_narrow_rows_may_be_computed_in_float32(expected):
    tensors = rows(dtype=torch.bfloat16)
    output, release = dp_flash_attention(
        *tensors, bounds=bounds(), noise=noise(), mu=5.0, compute_dtype=torch.float32, out_dtype=torch.float32
    )
    assert float((output.double() - expected(tensors, release.plan)).abs().max()) <= FLOAT32


def budget_filter(relation=NeighboringRelation.REPLACE_ONE):
    return GaussianFilter(PrivacyBudget(epsilon=2.0, delta=1e-6), neighboring_relation=relation)


def test_a_filter_admits_what_fits_and_not_one_call_more():
    gate, source, tensors = budget_filter(), noise(), rows()
    share = gate.share(3)
    for _ in range(3):
        dp_flash_attention(*tensors, bounds=bounds(), noise=source, mu=share, privacy_filter=gate)
    with pytest.raises(BudgetExhaustedError):
        dp_flash_attention(*tensors, bounds=bounds(), noise=source, mu=share, privacy_filter=gate)
    assert source.next_call == 3
    assert gate.num_releases == 3
    assert gate.epsilon_spent <= 2.0


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_coarser_products_of_the_process_do_not_reach_a_call(setting, monkeypatch):
    """TF32 and bfloat16 products err by more than the rounding that a float32 call is charged for."""
    release, seen = plain.PlainBackend.release, []

    def looking(self, call):
        seen.append((torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        return release(self, call)

    monkeypatch.setattr(plain.PlainBackend, "release", looking)
    torch.set_float32_matmul_precision(setting)
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        dp_flash_attention(*rows(), bounds=bounds(), noise=noise(), mu=0.5)
        assert torch.backends.mkldnn.matmul.fp32_precision == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [("ieee", "ieee")]


def test_entries_of_different_lengths_get_noise_of_their_own(expected):
    tensors = rows()
    mask = torch.zeros(2, NUM_ROWS, dtype=torch.bool)
    mask[1, 20:] = True
    output, release = dp_flash_attention(
        *tensors, bounds=bounds(num_rows=(NUM_ROWS, 20)), noise=noise(), mu=1.0, key_padding_mask=mask
    )
    assert float(release.plan.stddev[1, 0, 0]) > float(release.plan.stddev[0, 0, 0])
    assert float((output.double() - expected(tensors, release.plan, mask)).abs().max()) <= FLOAT32
    with pytest.raises(InvalidInputError, match="visible rows of batch entry 1"):
        dp_flash_attention(
            *tensors, bounds=bounds(num_rows=(NUM_ROWS, 21)), noise=noise(), mu=1.0, key_padding_mask=mask
        )


@pytest.mark.parametrize("backend", ["flash", "math"])
@pytest.mark.parametrize(
    "settings", [{}, {"is_causal": True}, {"hides": True}, {"keys": 20_000}, {"null": False}]
)
def test_gradients_are_those_of_the_exact_output(backend, settings):
    """Double precision, against autograd through the formula written out; clip, null rows, chunks and groups."""
    keys, null = settings.get("keys", 12), settings.get("null", True)
    tensors = [
        each.requires_grad_()
        for each in rows(batch=2, groups=2, keys=keys, queries=5, value_width=6, dtype=torch.float64)
    ]
    hidden = torch.zeros(2, keys, dtype=torch.bool)
    if settings.get("hides"):
        hidden[0, 4:] = True
        hidden[1] = True
    causal = settings.get("is_causal", False)
    output, release = dp_flash_attention(
        *tensors, bounds=removal() if null else bounds(num_rows=keys), noise=noise(), mu=1.0, enable_gqa=True,
        is_causal=causal, key_padding_mask=hidden, backend=backend,
    )  # fmt: skip
    weight = torch.randn_like(output)
    found = torch.autograd.grad((output * weight).sum(), tensors)
    norms, mass = release.plan.norms, release.plan.bounds.null_rows
    q, k, v = (
        x * (r / x.norm(dim=-1, keepdim=True)).clamp(max=1.0)
        for x, r in zip(tensors, (norms.query, norms.key, norms.value), strict=True)
    )
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = torch.exp(release.plan.scale * q @ k.mT) * ~hidden[:, None, None]
    if causal:
        scores = scores * torch.ones(5, keys, dtype=torch.float64).tril()
    exact = scores @ v / (scores.sum(-1, keepdim=True) + mass)
    for mine, reference in zip(found, torch.autograd.grad((exact * weight).sum(), tensors), strict=True):
        # The output passes through float32, its gradient too.
        assert torch.allclose(mine, reference, rtol=1e-5, atol=1e-6)


def test_no_gradient_needs_no_graph_and_a_row_of_zeros_has_one():
    query, key, value = rows()
    key[0, 0, 0] = 0.0
    assert not dp_flash_attention(query, key, value, bounds=bounds(), noise=noise(), mu=1.0)[0].requires_grad
    key.requires_grad_()
    output = dp_flash_attention(query, key, value, bounds=bounds(), noise=noise(), mu=1.0)[0]
    output.sum().backward()
    assert torch.isfinite(key.grad).all()
