from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_attention.clipping.contributions import Contribution, linear_contribution
from dp_flash_attention.clipping.rules import linear
from dp_flash_attention.clipping.rules.linear import LinearRule


class Conv1D(nn.Module):
    """As Hugging Face's: the weight is stored input-first."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(0.3 * torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x)
        return self.second(rows.flatten(0, 1)).view(*x.shape[:2], 3)


@pytest.mark.parametrize("shape", [(4, 6), (4, 1, 6), (4, 7, 6), (4, 3, 5, 6), (1, 7, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_every_layout_is_exact(check_exact: Any, shape: tuple[int, ...], bias: bool) -> None:
    check_exact(nn.Linear(6, 5, bias=bias), torch.randn(shape))


@pytest.mark.parametrize("shape", [(4, 6), (4, 7, 6)])
def test_a_weight_stored_input_first_is_exact(check_exact: Any, shape: tuple[int, ...]) -> None:
    check_exact(nn.Sequential(Conv1D(5, 6), nn.Tanh(), Conv1D(3, 5)), torch.randn(shape))


def test_flattened_rows_are_exact(check_exact: Any) -> None:
    check_exact(Flattened(), torch.randn(4, 7, 6))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_one_of_the_two_may_be_frozen(check_exact: Any, frozen: str) -> None:
    module = nn.Linear(6, 5)
    getattr(module, frozen).requires_grad_(False)
    check_exact(module, torch.randn(4, 7, 6))


def test_a_forgotten_row_is_seen(check_fault_is_seen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*, x_BTD: Tensor, g_BTP: Tensor, **rest: Any) -> Contribution:
        return linear_contribution(x_BTD=x_BTD[:, :-1], g_BTP=g_BTP[:, :-1], **rest)

    monkeypatch.setattr(linear, "linear_contribution", short)
    check_fault_is_seen(nn.Linear(6, 5), torch.randn(4, 7, 6))


def test_subclasses_and_look_alikes_have_no_rule() -> None:
    assert not LinearRule().matches(type("Quantized", (nn.Linear,), {})(3, 3))
    wrong = Conv1D(5, 6)
    wrong.nf = 6
    assert not LinearRule().matches(wrong)
    assert not LinearRule().matches(nn.Conv1d(3, 3, 1))
