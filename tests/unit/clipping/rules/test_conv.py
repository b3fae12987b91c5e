from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dp_flash_attention.clipping import ClippedGradientAccumulator
from dp_flash_attention.clipping.rules import conv
from dp_flash_attention.clipping.rules.conv import ConvRule
from dp_flash_attention.core.errors import ExampleCouplingError

IMAGE, LINE = (4, 4, 9, 7), (4, 4, 11)
OPTIONS = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"dilation": 2},
    {"groups": 2},
    {"groups": 2, "stride": 3, "padding": 2, "bias": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_two_dimensions_are_exact(check_exact: Any, options: dict[str, Any]) -> None:
    check_exact(nn.Conv2d(4, 6, (3, 2), **options), torch.randn(IMAGE))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_dimension_is_exact(check_exact: Any, options: dict[str, Any]) -> None:
    check_exact(nn.Sequential(nn.Conv1d(4, 6, 3, **options), nn.Conv1d(6, 2, 1)), torch.randn(LINE))


def test_only_the_bias_may_be_trained(check_exact: Any) -> None:
    module = nn.Conv2d(4, 6, 3)
    module.weight.requires_grad_(False)
    check_exact(module, torch.randn(IMAGE))


def test_patches_in_another_order_are_seen(check_fault_is_seen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = conv._unfolded
    monkeypatch.setattr(conv, "_unfolded", lambda x, module: right(x, module).flip(1))
    check_fault_is_seen(nn.Conv2d(4, 6, 3), torch.randn(IMAGE))


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5)])
def test_an_input_without_the_batch_in_front_is_refused(shape: tuple[int, ...]) -> None:
    module = nn.Conv1d(4, 2, 1)
    accumulator = ClippedGradientAccumulator(module, l2_clip_norm=1.0)
    with pytest.raises(ExampleCouplingError, match="Put the batch dimension first"):
        accumulator.add(lambda: module(torch.randn(shape)).flatten()[:4], batch_size=4)


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "circular"}])
def test_other_paddings_have_no_rule(options: dict[str, Any]) -> None:
    assert not ConvRule().matches(nn.Conv2d(4, 4, 3, **options))
    assert not ConvRule().matches(nn.ConvTranspose2d(4, 4, 3))
