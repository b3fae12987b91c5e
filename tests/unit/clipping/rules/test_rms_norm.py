from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_attention.clipping.contributions import DenseContribution
from dp_flash_attention.clipping.rules import broadcast
from dp_flash_attention.clipping.rules.rms_norm import RMSNormRule


class OwnRMSNorm(nn.Module):
    """A copy as Hugging Face models have it, Gemma's with an offset."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(width)), offset

    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + 1e-6)
        return (self.offset + self.weight) * (hidden_states * scale)


@pytest.mark.parametrize("shape", [(4, 6), (4, 7, 6), (4, 3, 5, 6), (1, 7, 6)])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.RMSNorm(6),
        lambda: nn.RMSNorm(6, eps=0.1),
        lambda: OwnRMSNorm(6),
        lambda: OwnRMSNorm(6, 1.0),
    ],
)
def test_every_layout_is_exact(check_exact: Any, build: Any, shape: tuple[int, ...]) -> None:
    check_exact(nn.Sequential(nn.Linear(6, 6), build()), torch.randn(shape))


def test_half_a_gradient_is_seen(check_fault_is_seen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        broadcast, "DenseContribution", lambda grads_B: DenseContribution(grads_B=0.5 * grads_B)
    )
    check_fault_is_seen(nn.RMSNorm(6), torch.randn(4, 7, 6))


def test_norms_with_more_than_one_gain_vector_have_no_rule() -> None:
    more = OwnRMSNorm(6)
    more.bias = nn.Parameter(torch.zeros(6))
    with_child = OwnRMSNorm(6)
    with_child.inner = nn.Identity()
    for module in (more, with_child, nn.RMSNorm((2, 6)), nn.RMSNorm(6, elementwise_affine=False)):
        assert not RMSNormRule().matches(module)
