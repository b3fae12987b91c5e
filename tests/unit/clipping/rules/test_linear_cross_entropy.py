from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dp_flash_attention.clipping import (
    ClippedGradientAccumulator,
    LinearCrossEntropy,
    check_examples_independent,
    head_contribution,
)
from dp_flash_attention.clipping.head_contribution import HeadContribution
from dp_flash_attention.clipping.reference import clipped_sum, per_example_gradients
from dp_flash_attention.clipping.vocabulary_tiles import Head
from dp_flash_attention.core.errors import ExampleCouplingError, RunStateError

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
VOCABULARY, WIDTH = 37, 6

# Bytes that make one tile of everything, several groups, and tiles of a few rows of the vocabulary.
SCRATCH = {"whole": 2**27, "groups": 2 * 37 * 9 * 8, "tiles": 9 * 8 * 10}


class Tiny(nn.Module):
    """An embedding, a nonlinear layer and a head; the head's loss by tiles or by ``F.cross_entropy``."""

    def __init__(
        self,
        *,
        fused: bool = True,
        bias: bool = True,
        tied: bool = False,
        scratch_bytes: int = 2**27,
        normalizer: float | None = None,
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = LinearCrossEntropy(WIDTH, VOCABULARY, bias=bias, scratch_bytes=scratch_bytes)
        self.fused, self.normalizer = fused, normalizer
        if tied:
            self.head.weight = self.table.weight

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        ids_BT, targets_BT = inputs
        hidden = self.mix(self.table(ids_BT)).tanh()
        if self.fused:
            losses: Tensor = self.head(hidden, targets_BT, normalizer=self.normalizer)
            return losses
        return unfused(self.head(hidden), targets_BT, self.normalizer)


def unfused(logits: Tensor, targets_BT: Tensor, normalizer: float | None) -> Tensor:
    losses = F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)
    counts: Any = (targets_BT != -100).sum(1).clamp(min=1) if normalizer is None else normalizer
    total: Tensor = losses.sum(1) / counts
    return total


def drawn(size: int = 5, rows: int = 9) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 8, (size, rows))  # few ids, so that they repeat
    targets = torch.randint(0, VOCABULARY, (size, rows))
    targets[0, 3:] = -100
    targets[:, 1] = ids[:, 0]  # the tied term meets the target's own column
    return ids, targets


def error_of(model: Tiny, inputs: tuple[Tensor, Tensor], dtype: torch.dtype) -> float:
    """Returns the worst relative error of losses, norms and clipped sums against one ordinary pass an example."""
    model = model.to(dtype)
    model.fused = False
    gradients = per_example_gradients(model, model, inputs, batch_size=len(inputs[0]))
    losses = model(inputs).detach()
    _, norms = clipped_sum(gradients, l2_clip_norm=1.0)
    clip = float(norms.median())
    expected, _ = clipped_sum(gradients, l2_clip_norm=clip)
    model.fused = True
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=clip)
    seen = accumulator.add(lambda: model(inputs), batch_size=len(inputs[0]))
    return max(
        float((seen.losses - losses).abs().max()),
        float(((seen.norms.double() - norms).abs() / norms).max()),
        max(float((accumulator.sums[name] - total).abs().max()) for name, total in expected.items()) / clip,
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scratch", SCRATCH)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [4, 9])  # the gram and the outer form
def test_losses_norms_and_clipped_sums_are_exact(
    dtype: torch.dtype, scratch: str, tied: bool, bias: bool, rows: int
) -> None:
    model = Tiny(bias=bias, tied=tied, scratch_bytes=SCRATCH[scratch])
    assert error_of(model, drawn(rows=rows), dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("scratch", SCRATCH)
def test_strips_of_the_gram_form_are_exact(monkeypatch: pytest.MonkeyPatch, scratch: str) -> None:
    monkeypatch.setattr(head_contribution, "_STRIP_ROWS", 2)
    assert error_of(Tiny(scratch_bytes=SCRATCH[scratch]), drawn(rows=5), torch.float64) < 1e-10


def test_a_public_constant_may_divide() -> None:
    assert error_of(Tiny(normalizer=9.0), drawn(), torch.float64) < 1e-10


def test_ordinary_gradients_are_those_of_the_unfused_loss() -> None:
    for scratch in SCRATCH.values():
        model, inputs = Tiny(tied=True, scratch_bytes=scratch).double(), drawn()
        got = torch.autograd.grad(model(inputs).square().sum(), list(model.parameters()))
        model.fused = False
        want = torch.autograd.grad(model(inputs).square().sum(), list(model.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_losses_may_be_scaled_before_they_are_summed() -> None:
    model, inputs = Tiny(tied=True).double(), drawn()
    scale = torch.tensor([0.5, -2.0, 0.0, 1.0, 3.0]).double()
    model.fused = False
    gradients = per_example_gradients(model, model, inputs, batch_size=5)
    _, norms = clipped_sum(gradients, l2_clip_norm=1.0)
    model.fused = True
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1e6)
    seen = accumulator.add(lambda: scale * model(inputs), batch_size=5)
    torch.testing.assert_close(seen.norms, norms * scale.abs())
    for name, total in accumulator.sums.items():
        torch.testing.assert_close(total, torch.einsum("b,b...->...", scale, gradients[name]))


def test_an_example_s_loss_does_not_depend_on_its_company() -> None:
    model, (ids, targets) = Tiny(), drawn()
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    check_examples_independent(accumulator, model, model, (ids, targets))
    alone = torch.cat([model((ids[i : i + 1], targets[i : i + 1])) for i in range(5)])
    torch.testing.assert_close(model((ids, targets)), alone)


def test_an_example_without_targets_has_loss_and_gradient_zero() -> None:
    model, (ids, targets) = Tiny(), drawn()
    targets[2] = -100
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    seen = accumulator.add(lambda: model((ids, targets)), batch_size=5)
    assert float(seen.losses[2]) == float(seen.norms[2]) == 0.0


class _Overflowing(nn.Module):
    """Makes one example's hidden states infinite."""

    def __init__(self, inner: Tiny, which: int) -> None:
        super().__init__()
        self.inner, self.which = inner, which

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        hidden = self.inner.table(inputs[0])
        added = torch.zeros(len(hidden), 1, 1)
        added[self.which] = torch.inf
        losses: Tensor = self.inner.head(hidden + added, inputs[1])
        return losses


@pytest.mark.parametrize("tied", [False, True])
def test_an_example_without_a_finite_norm_is_dropped_and_the_others_stay(tied: bool) -> None:
    inner, (ids, targets) = Tiny(tied=tied), drawn()
    inner.mix.requires_grad_(False)
    accumulator = ClippedGradientAccumulator(inner, l2_clip_norm=0.1)
    accumulator.add(lambda: _Overflowing(inner, 2)((ids, targets)), batch_size=5)
    rest = [0, 1, 3, 4]
    expected = ClippedGradientAccumulator(inner, l2_clip_norm=0.1)
    calm = _Overflowing(inner, 0)
    calm.which = slice(0, 0)  # type: ignore[assignment]
    expected.add(lambda: calm((ids[rest], targets[rest])), batch_size=4)
    for name, total in expected.sums.items():
        torch.testing.assert_close(accumulator.sums[name], total)


def test_autocast_rounds_what_both_the_norm_and_the_sum_read() -> None:
    model, inputs = Tiny(tied=True, scratch_bytes=SCRATCH["tiles"]), drawn()
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1e6)
    one = tuple(part[1:2] for part in inputs)
    with torch.autocast("cpu", torch.bfloat16):
        seen = accumulator.add(lambda: model(one), batch_size=1)  # type: ignore[arg-type]
    released = (
        torch.stack([total.double().square().sum() for total in accumulator.sums.values()]).sum().sqrt()
    )
    # The released sum of one unclipped example has the norm that was taken: in float32, not in bfloat16.
    torch.testing.assert_close(seen.norms[0].double(), released, rtol=1e-5, atol=0)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # Parameters, their sums and expanded views hold no more memory than they did.
        sizes = [
            t.untyped_storage().nbytes() // t.itemsize for t in tree_leaves(out) if isinstance(t, Tensor)
        ]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.fixture
def large() -> tuple[LinearCrossEntropy, Tensor, Tensor]:
    head = LinearCrossEntropy(8, 3000, scratch_bytes=2**18)
    return head, torch.randn(16, 40, 8), torch.randint(0, 3000, (16, 40))


def largest_of(head: LinearCrossEntropy, x: Tensor, targets: Tensor, *, fused: bool) -> int:
    accumulator = ClippedGradientAccumulator(head, l2_clip_norm=1.0)

    def losses() -> Tensor:
        return head(x, targets) if fused else unfused(head(x), targets, None)

    with Largest() as seen:
        accumulator.add(losses, batch_size=16)
    return seen.numel


def test_no_buffer_holds_the_logits(large: Any) -> None:
    head, x, targets = large
    # The largest is each example's bias gradient, B·V; scratch is 2^16 numbers.
    assert largest_of(head, x, targets, fused=True) <= max(2**16, 16 * 3000)
    assert largest_of(head, x, targets, fused=False) >= 16 * 40 * 3000  # the count sees what it should


def test_the_ordinary_pass_holds_no_logits_either(large: Any) -> None:
    head, x, targets = large
    with Largest() as seen:
        head(x, targets).sum().backward()
    assert seen.numel <= 2**16


def test_a_weight_that_changes_between_norm_and_sum_is_refused(large: Any) -> None:
    head, x, targets = large
    accumulator = ClippedGradientAccumulator(head, l2_clip_norm=1.0)
    tape, _ = accumulator.record(lambda: head(x, targets), batch_size=16)
    with torch.no_grad():
        head.weight.mul_(1.1)
    [contribution] = tape.contributions["weight"]
    with pytest.raises(RunStateError, match="changed between"):
        contribution.add_weighted_sum(torch.ones(16), torch.empty(3000, 8), fresh=True)


def test_flattened_targets_are_refused(large: Any) -> None:
    head, x, targets = large
    accumulator = ClippedGradientAccumulator(head, l2_clip_norm=1.0)
    with pytest.raises(ExampleCouplingError, match="batch dimension first"):
        accumulator.add(lambda: head(x.flatten(0, 1), targets.flatten()).view(16, -1).sum(1), batch_size=16)


def test_rows_that_cancel_get_the_norm_of_the_outer_form() -> None:
    head = LinearCrossEntropy(8, 5, bias=False)
    x, targets = torch.randn(3, 2, 8), torch.tensor([[1, 2], [3, 3], [0, 4]])
    with torch.no_grad():
        head.weight.zero_()  # every token has the same softmax
    x[1, 1] = -x[1, 0] * (1 - 1e-4)  # and this example's two rows nearly take each other back
    accumulator = ClippedGradientAccumulator(head, l2_clip_norm=1e6)
    seen = accumulator.add(lambda: head(x, targets), batch_size=3)
    grads = per_example_gradients(
        head.double(), lambda rows: head(*rows), (x.double(), targets), batch_size=3
    )
    torch.testing.assert_close(seen.norms.double(), grads["weight"].flatten(1).norm(dim=1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("fault", ["onehot", "scale", "tile"])
def test_a_fault_in_the_gradient_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = Head.gradient

    def planted(self: Head, group: slice, tile: slice, *args: Any, **kwargs: Any) -> Tensor:
        g = gradient(self, group, tile, *args, **kwargs)
        if fault == "onehot":
            return g.clamp(min=0)
        if fault == "scale":
            return 1.01 * g
        return g * (tile.start == 0)

    monkeypatch.setattr(Head, "gradient", planted)
    assert error_of(Tiny(scratch_bytes=SCRATCH["tiles"]), drawn(), torch.float64) > 1e-3


def test_a_forgotten_cross_term_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        HeadContribution, "inner_products", lambda self, other: torch.zeros(len(other.ids_BT)).double()
    )
    assert error_of(Tiny(tied=True), drawn(), torch.float64) > 1e-3


def test_the_head_used_twice_or_for_logits_too_is_exact() -> None:
    model, inputs = Tiny(tied=True).double(), drawn()
    ids, targets = inputs

    def losses(rows: tuple[Tensor, Tensor]) -> Tensor:
        hidden = model.table(rows[0])
        extra: Tensor = model.head(hidden[:, :2]).sin().sum((1, 2))
        return model(rows) + model.head(hidden, rows[1]) + extra

    gradients = per_example_gradients(model, losses, inputs, batch_size=5)
    expected, norms = clipped_sum(gradients, l2_clip_norm=1.0)
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    seen = accumulator.add(lambda: losses((ids, targets)), batch_size=5)
    torch.testing.assert_close(seen.norms, norms)
    for name, total in expected.items():
        torch.testing.assert_close(accumulator.sums[name], total)
