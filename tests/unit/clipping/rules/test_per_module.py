"""The fallback: which arguments are one an example and which are shared, and what may come back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_attention.clipping import ClippedGradientAccumulator, check_examples_independent
from dp_flash_attention.clipping.reference import clipped_sum, per_example_gradients
from dp_flash_attention.core.errors import ExampleCouplingError

WIDTH = 4


class Masked(nn.Module):
    """Mixes positions by a matrix [T, T] that all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor, *, mask: Tensor, note: str = "") -> dict[str, Any]:
        return {"rows": torch.einsum("ts,bsd->btd", mask, x @ self.weight), "note": note}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Masked(), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x, mask=torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril(), note="kept")
        assert found["note"] == "kept"
        return self.head(found["rows"]).sin().sum((1, 2))


def errors(model: nn.Module, accumulator: ClippedGradientAccumulator, x: Tensor) -> float:
    _, norms = clipped_sum(per_example_gradients(model, model, x, batch_size=len(x)), l2_clip_norm=1.0)
    return float((accumulator.add(lambda: model(x), batch_size=len(x)).norms - norms).abs().max())


def test_a_shared_mask_is_not_split_where_the_length_equals_the_batch() -> None:
    model, x = Model().double(), torch.randn(8, 6, WIDTH, dtype=torch.float64)
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0, fallback_modules=["inner"])
    check_examples_independent(accumulator, model, model, x)
    for size in (5, 6, 7, 1):
        assert errors(model, accumulator, x[:size]) < 1e-10


def test_what_one_microbatch_told_holds_for_the_next() -> None:
    model, x = Model().double(), torch.randn(6, 6, WIDTH, dtype=torch.float64)
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0, fallback_modules=["inner"])
    assert errors(model, accumulator, x[:5]) < 1e-10
    assert errors(model, accumulator, x[:6]) < 1e-10
    guessed = ClippedGradientAccumulator(model, l2_clip_norm=1.0, fallback_modules=["inner"])
    guessed.add(lambda: model(x), batch_size=6)
    with pytest.raises(ExampleCouplingError, match="check_examples_independent"):
        guessed.add(lambda: model(x[:5]), batch_size=5)


def test_a_call_without_a_batch_is_refused() -> None:
    model = Model()
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0, fallback_modules=["inner"])
    with pytest.raises(ExampleCouplingError, match="no tensor with leading dimension 3"):
        accumulator.add(lambda: model(torch.randn(5, 4, WIDTH))[:3], batch_size=3)
