"""The module: torch's multi-head attention plus noise, with torch's weights."""

import copy

import pytest
import torch
from torch import nn

from dp_flash_attention.accounting import GaussianFilter
from dp_flash_attention.attention import AttentionBounds, CallNoise, DPFlashAttention
from dp_flash_attention.core.errors import BudgetExhaustedError, InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget
from dp_flash_attention.noise import TestKey

# Norms so wide that nothing is clipped, and so little noise that only the exact part is seen.
LOOSE = AttentionBounds(query_norm=6.0, key_norm=6.0, value_norm=100.0, num_rows=5, rounding=None)


def private(attention, **changes):
    given = {"bounds": LOOSE, "noise": CallNoise(TestKey("module")), "mu": 1e9, **changes}
    return DPFlashAttention.from_multihead(attention, **given)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_first": True},
        {"kdim": 12, "vdim": 10},
        {"bias": False},
        {"kdim": 12, "bias": False, "batch_first": True},
    ],
)
def test_without_noise_worth_mentioning_it_is_torchs_own(settings):
    attention = nn.MultiheadAttention(16, 4, **settings).eval()
    widths = (16, settings.get("kdim") or 16, settings.get("vdim") or 16)
    rows = [torch.randn(7, 3, width) for width in widths]
    rows[0] = rows[0][:2]
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 5:] = True
    if settings.get("batch_first"):
        rows = [each.transpose(0, 1) for each in rows]
    expected, _ = attention(*rows, key_padding_mask=mask, need_weights=False)
    found, release = private(attention)(*rows, key_padding_mask=mask)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=2e-5)
    assert release.mu == 1e9


def test_weights_load_under_torchs_names():
    attention = nn.MultiheadAttention(8, 2)
    module = DPFlashAttention(8, 2, bounds=LOOSE, noise=CallNoise(TestKey(1)), mu=1.0)
    assert set(module.state_dict()) == set(attention.state_dict())
    module.load_state_dict(attention.state_dict())
    with torch.no_grad():
        attention.out_proj.weight.add_(1.0)
    assert not torch.equal(module.out_proj.weight, attention.out_proj.weight)


def test_a_budget_over_calls_and_a_copied_module_count_together():
    gate = GaussianFilter(PrivacyBudget(epsilon=1.0, delta=1e-6))
    module = private(nn.MultiheadAttention(8, 2), mu=gate.share(2), privacy_filter=gate)
    rows = torch.randn(6, 1, 8)
    outputs = [module(rows, rows, rows)[0]]
    twin = copy.deepcopy(module)
    outputs.append(twin(rows, rows, rows)[0])
    assert not torch.equal(*outputs)
    with pytest.raises(BudgetExhaustedError):
        module(rows, rows, rows)


def test_queries_and_projections_have_gradients():
    module = private(nn.MultiheadAttention(8, 2), mu=1.0)
    query = torch.randn(2, 1, 8, requires_grad=True)
    rows = torch.randn(6, 1, 8)
    module(query, rows, rows)[0].sum().backward()
    assert query.grad is not None
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_what_it_is_not_is_refused():
    for settings in ({"add_bias_kv": True}, {"add_zero_attn": True}, {"dropout": 0.1}):
        with pytest.raises(InvalidInputError, match="attention"):
            private(nn.MultiheadAttention(8, 2, **settings))
    with pytest.raises(InvalidInputError, match="num_heads"):
        DPFlashAttention(8, 3, bounds=LOOSE, noise=CallNoise(TestKey(1)), mu=1.0)
    with pytest.raises(InvalidInputError, match="budget"):
        DPFlashAttention(8, 2, bounds=LOOSE, noise=CallNoise(TestKey(1)))
    with pytest.raises(InvalidInputError, match="query"):
        private(nn.MultiheadAttention(8, 2))(torch.randn(2, 8), torch.randn(6, 8), torch.randn(6, 8))
