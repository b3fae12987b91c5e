from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_attention.clipping.rules import layer_norm
from dp_flash_attention.clipping.rules.layer_norm import LayerNormRule


@pytest.mark.parametrize("shape", [(4, 6), (4, 7, 6), (4, 3, 5, 6), (1, 7, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_every_layout_is_exact(check_exact: Any, shape: tuple[int, ...], bias: bool) -> None:
    check_exact(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6, bias=bias)), torch.randn(shape))


def test_the_first_layer_needs_no_gradient_of_its_input(check_exact: Any) -> None:
    check_exact(nn.LayerNorm((7, 6)), torch.randn(4, 7, 6))


def test_a_frozen_gain_is_left_out(check_exact: Any) -> None:
    module = nn.LayerNorm(6)
    module.weight.requires_grad_(False)
    check_exact(module, torch.randn(4, 7, 6))


def test_a_forgotten_mean_is_seen(check_fault_is_seen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layer_norm._gain_and_bias_gradients

    def without_mean(g: Tensor, x: Tensor, mean: Tensor, *rest: Any) -> Any:
        return right(g, x, torch.zeros_like(mean), *rest)

    monkeypatch.setattr(layer_norm, "_gain_and_bias_gradients", without_mean)
    check_fault_is_seen(nn.LayerNorm(6), 1.0 + torch.randn(4, 7, 6))


def test_only_torchs_own_has_the_rule() -> None:
    assert not LayerNormRule().matches(type("Gated", (nn.LayerNorm,), {})(6))
