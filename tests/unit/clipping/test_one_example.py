"""Microbatches of one example: any module, gradients that nobody else sees, and the sums of book-keeping.

That norms and sums are exact for every kind of module that has rules is in ``test_accumulator``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dp_flash_attention.clipping import ClippedGradientAccumulator, check_examples_independent
from dp_flash_attention.clipping.reference import clipped_sum, per_example_gradients
from dp_flash_attention.clipping.strategies import checked_strategy
from dp_flash_attention.core.errors import (
    ExampleCouplingError,
    InvalidInputError,
    MissingRuleError,
    RunStateError,
)

C = 0.5


class Ruleless(nn.Module):
    """Parameters that no rule covers: recurrent maps, bare parameters, a weight used outside its module."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.recurrent = nn.GRU(6, 6, batch_first=True)
        self.scale = nn.Parameter(torch.rand(6))
        self.shift = nn.Parameter(torch.rand(6))
        self.dropout = nn.Dropout(0.2)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.recurrent(self.dropout(self.table(ids)))
        logits = F.linear(hidden * self.scale + self.shift, self.table.weight)
        return F.cross_entropy(logits.mT, ids.roll(-1, 1), reduction="none").sum(1)


def one_example(model: nn.Module, **options: Any) -> ClippedGradientAccumulator:
    return ClippedGradientAccumulator(model, l2_clip_norm=C, strategy="one_example", **options)


def add_rows(
    accumulator: ClippedGradientAccumulator,
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    weights: Tensor | None = None,
) -> list[float]:
    weights = torch.ones(len(x)) if weights is None else weights
    return [
        float(
            accumulator.add(lambda i=i: model(x[i : i + 1]), batch_size=1, weights=weights[i : i + 1]).norms
        )
        for i in range(len(x))
    ]


def norm_of(sums: dict[str, Tensor]) -> float:
    return float(torch.cat([total.flatten() for total in sums.values()]).norm())


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_a_model_without_rules_equals_the_definition(clipping: Any) -> None:
    model, ids = Ruleless().double().eval(), torch.randint(0, 11, (4, 7))
    with pytest.raises(MissingRuleError):
        ClippedGradientAccumulator(model, l2_clip_norm=C)
    accumulator = one_example(model, clipping=clipping)
    gradients = per_example_gradients(model, model, ids, batch_size=4)
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    found = add_rows(accumulator, model, ids, weights)
    flat, norms = clipped_sum(gradients, l2_clip_norm=C, weights=weights)
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), norms)
    expected = flat
    if clipping == "per_layer":
        expected = {}
        for group in (("table.weight",), ("scale", "shift"), tuple(n for n in gradients if "recurrent" in n)):
            part = {name: gradients[name] for name in group}
            expected |= clipped_sum(part, l2_clip_norm=C / math.sqrt(3.0), weights=weights)[0]
    for name, total in accumulator.sums.items():
        torch.testing.assert_close(total, expected[name])


def test_the_worst_neighbour_moves_the_sum_by_c() -> None:
    model = Ruleless().double().eval()
    accumulator = one_example(model, clipping="per_layer")
    accumulator.add(lambda: 1e9 * model(torch.randint(0, 11, (1, 7))), batch_size=1)
    assert norm_of(accumulator.sums) == pytest.approx(C, rel=1e-12)


def test_a_microbatch_of_several_is_refused() -> None:
    """Its ordinary gradient is a sum over examples, whose norm says nothing of any of them."""
    model = Ruleless()
    with pytest.raises(InvalidInputError, match=r"microbatch_size is 2, but it must be 1"):
        one_example(model).add(lambda: model(torch.randint(0, 11, (2, 7))), batch_size=2)
    with pytest.raises(ExampleCouplingError, match="one entry for each of the 1 examples"):
        one_example(model).add(lambda: model(torch.randint(0, 11, (2, 7))), batch_size=1)


def test_raw_gradients_reach_neither_grad_nor_hooks() -> None:
    model, ids = Ruleless().eval(), torch.randint(0, 11, (1, 7))
    kept, seen = torch.ones_like(model.scale), []
    model.scale.grad = kept
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(seen.append)
    one_example(model).add(lambda: model(ids), batch_size=1)
    assert model.scale.grad is kept
    assert bool((kept == 1).all())
    assert model.shift.grad is None
    assert not seen


def test_a_hook_that_changes_gradients_is_clipped_after() -> None:
    """What a hook makes of a gradient is both measured and released."""
    model, ids = Ruleless().eval(), torch.randint(0, 11, (1, 7))
    model.scale.register_hook(lambda gradient: 1e6 * gradient)
    accumulator = one_example(model)
    accumulator.add(lambda: model(ids), batch_size=1)
    assert norm_of(accumulator.sums) == pytest.approx(C, rel=1e-5)


def test_gradients_that_share_memory_are_read_and_never_written() -> None:
    """Autograd gives ``a`` and ``b`` one tensor, and that of a mean one number expanded."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.rand(3, 4)), nn.Parameter(torch.rand(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return ((self.a + self.b).mean() * x).flatten()

    model, x = Sum().double(), torch.tensor([[3.0], [5.0]], dtype=torch.float64)
    accumulator = one_example(model)
    add_rows(accumulator, model, x)
    assert norm_of(accumulator.sums) == pytest.approx(2 * C, rel=1e-12)
    assert torch.equal(accumulator.sums["a"], accumulator.sums["b"])


def test_sparse_gradients_of_a_table_are_added_up_before_the_norm() -> None:
    table = nn.Embedding(7, 3, sparse=True).double()
    ids = torch.tensor([[1, 1, 2]])
    accumulator = one_example(table)
    found = add_rows(accumulator, lambda i: table(i).sum((1, 2)), ids)
    assert found[0] == pytest.approx(math.sqrt(3 * 4 + 3 * 1))


def test_an_example_that_is_not_finite_is_dropped_and_padding_adds_nothing() -> None:
    model = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    x[1, 0] = float("nan")
    accumulator, others = one_example(model), one_example(model)
    add_rows(accumulator, lambda x: model(x).square().sum(1), x, torch.tensor([1.0, 1.0, 0.0]))
    add_rows(others, lambda x: model(x).square().sum(1), x[:1])
    for name, total in others.sums.items():
        torch.testing.assert_close(accumulator.sums[name], total, rtol=0.0, atol=0.0)


def test_the_sums_of_bookkeeping_with_checkpointing_and_autocast() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9)), torch.randn(3, 5, 6)

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = checkpoint(model, x, use_reentrant=False)
        return hidden.float().square().sum((1, 2))

    ours, reference = one_example(model), ClippedGradientAccumulator(model, l2_clip_norm=C)
    add_rows(ours, loss, x)
    reference.add(lambda: loss(x), batch_size=3)
    for name, total in reference.sums.items():
        # A linear map's weight gradient is rounded to bfloat16 here and kept in float32 there.
        torch.testing.assert_close(ours.sums[name], total, rtol=2e-2, atol=2e-3)


def test_a_parameter_without_a_gradient_is_named() -> None:
    model = Ruleless()
    model.spare = nn.Linear(2, 2)
    accumulator = one_example(model)
    with pytest.raises(MissingRuleError, match=r"spare\.weight.*saw no gradient"):
        accumulator.add(lambda: model(torch.randint(0, 11, (1, 7))), batch_size=1)
    assert not any(total.any() for total in accumulator.sums.values())


def test_a_model_that_writes_to_its_parameters_is_refused() -> None:
    """An embedding's max_norm shortens the rows of the example's own tokens, without noise."""
    table = nn.Embedding(7, 3, max_norm=0.1)
    with pytest.raises(ExampleCouplingError, match="'weight' was written to"):
        one_example(table).add(lambda: table(torch.tensor([[1, 2]])).sum((1, 2)), batch_size=1)


def test_an_example_inside_another_is_refused() -> None:
    """It would count twice."""
    model = nn.Linear(4, 4)
    accumulator = one_example(model)

    def nested() -> Tensor:
        accumulator.add(lambda: model(torch.ones(1, 4)).sum(1), batch_size=1)
        return model(torch.ones(1, 4)).sum(1)

    with pytest.raises(RunStateError, match="already being recorded"):
        accumulator.add(nested, batch_size=1)


def test_batch_statistics_are_refused() -> None:
    """With one example they are its own, but the running ones are released without noise."""
    with pytest.raises(ExampleCouplingError, match="mixes the examples"):
        one_example(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))


# --- the start-up check


def check(model: nn.Module, inputs: Tensor) -> None:
    check_examples_independent(one_example(model), model, model, inputs)


def test_an_honest_model_passes_the_start_up_check() -> None:
    check(Ruleless(), torch.randint(0, 11, (3, 7)))


class Remembers(nn.Module):
    """Adds what it saw before to what it sees now."""

    def __init__(self, *, in_a_buffer: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.in_a_buffer = in_a_buffer
        self.last = torch.zeros(4)
        self.register_buffer("kept", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.in_a_buffer:
            self.kept += x.detach().mean(0)
            return self.inner(x).square().sum(1)
        y = self.inner(x + self.last).square().sum(1)
        self.last = x.detach().mean(0)
        return y


@pytest.mark.parametrize(("in_a_buffer", "said"), [(True, "buffer 'kept' changes"), (False, "ran before it")])
def test_a_model_that_remembers_examples_is_refused(in_a_buffer: bool, said: str) -> None:
    with pytest.raises(ExampleCouplingError, match=said):
        check(Remembers(in_a_buffer=in_a_buffer), torch.randn(3, 4))


def test_a_parameter_outside_is_named() -> None:
    model, outside = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
    with pytest.raises(MissingRuleError, match=r"shape \(4,\) outside the model"):
        check_examples_independent(
            one_example(model), model, lambda x: (model(x) * outside).sum(1), torch.randn(3, 4)
        )


def test_no_graph_is_made_of_single_examples() -> None:
    with pytest.raises(InvalidInputError, match="'bookkeeping' with compile"):
        checked_strategy("one_example", compile=True)
