from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_attention.clipping.contributions import DenseContribution
from dp_flash_attention.clipping.rules import broadcast
from dp_flash_attention.clipping.rules.broadcast import BroadcastRule


class Tokens(nn.Module):
    """A class token in front and learned positions, as vision transformers keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places * x.mean(
            (1, 2), keepdim=True
        )


@pytest.mark.parametrize("size", [1, 4])
def test_tokens_and_positions_are_exact(check_exact: Any, size: int) -> None:
    check_exact(nn.Sequential(Tokens(), nn.Linear(6, 3)), torch.randn(size, 7, 6))


def test_a_frozen_one_stays_as_it_is(check_exact: Any) -> None:
    module = Tokens()
    module.places.requires_grad_(False)
    check_exact(module, torch.randn(4, 7, 6))


def test_half_a_gradient_is_seen(check_fault_is_seen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        broadcast, "DenseContribution", lambda grads_B: DenseContribution(grads_B=0.5 * grads_B)
    )
    check_fault_is_seen(nn.Sequential(Tokens(), nn.Linear(6, 3)), torch.randn(4, 7, 6))


def test_attributes_come_back_even_after_an_error() -> None:
    module = Tokens()
    token = module.token
    with pytest.raises(RuntimeError):
        broadcast.call_with_attributes(module, {"token": torch.zeros(3, 3)}, (torch.zeros(2, 7, 6),), {})
    assert module.token is token
    assert "token" not in module.__dict__


def test_a_parameter_without_a_leading_one_has_no_rule() -> None:
    module = Tokens()
    module.scale = nn.Parameter(torch.ones(6))
    assert not BroadcastRule().matches(module)
    module.scale.requires_grad_(False)
    assert BroadcastRule().matches(module)
    assert not BroadcastRule().matches(nn.Identity())
