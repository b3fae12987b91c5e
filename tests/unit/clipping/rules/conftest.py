"""What every rule is held against: one ordinary backward pass for each example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_attention.clipping import ClippedGradientAccumulator
from dp_flash_attention.clipping.reference import clipped_sum, per_example_gradients

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


class Scored(nn.Module):
    """A module with a per-example loss whose gradients differ from example to example."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Any) -> Tensor:
        flat = self.inner(inputs).sin().flatten(1)
        return flat.square().mean(1) + flat[:, 0]


def error_of(inner: nn.Module, inputs: Tensor, dtype: torch.dtype, fallback: tuple[str, ...] = ()) -> float:
    """Returns the worst relative error of any example's norm, and of the clipped sum over C."""
    model = Scored(inner).to(dtype)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    gradients = per_example_gradients(model, model, inputs, batch_size=len(inputs))
    _, norms = clipped_sum(gradients, l2_clip_norm=1.0)
    clip = float(norms.median())
    expected, _ = clipped_sum(gradients, l2_clip_norm=clip)
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=clip, fallback_modules=fallback)
    seen = accumulator.add(lambda: model(inputs), batch_size=len(inputs))
    of_norms = ((seen.norms.double() - norms) / norms).abs().max()
    of_sums = max(float((accumulator.sums[name] - total).abs().max()) for name, total in expected.items())
    return max(float(of_norms), of_sums / clip)


@pytest.fixture(params=TOLERANCE, ids=["float64", "float32"])
def check_exact(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Asserts that a module's norms and clipped sums are exact, to 1e-10 and to 1e-4."""

    def check(inner: nn.Module, inputs: Tensor, fallback: tuple[str, ...] = ()) -> None:
        assert error_of(inner, inputs, request.param, fallback) < TOLERANCE[request.param]

    return check


@pytest.fixture
def check_fault_is_seen() -> Callable[..., None]:
    """Asserts that the comparison above notices the fault which the caller has planted."""

    def check(inner: nn.Module, inputs: Tensor, fallback: tuple[str, ...] = ()) -> None:
        assert error_of(inner, inputs, torch.float64, fallback) > 1e-3

    return check
