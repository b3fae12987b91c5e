"""Groups are clipped in the backward pass, hold one record at a time, and move the sum by at most C together.

That their norms and sums are exact for every kind of module is in ``test_accumulator``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dp_flash_attention.clipping import ClippedGradientAccumulator, clip_groups, group_clipping
from dp_flash_attention.clipping.clip_groups import ClipGroup
from dp_flash_attention.clipping.contributions import LinearContribution
from dp_flash_attention.clipping.reference import clipped_sum_of_groups, per_example_gradients
from dp_flash_attention.core.errors import InvalidInputError, MissingRuleError, RunStateError
from dp_flash_attention.training.models import TextTransformer, TextTransformerConfig

C = 0.5


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.times = 1
        self.dead: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            for k, layer in enumerate(self.layers):
                x = F.dropout((layer(x) if k != self.dead else x).tanh(), 0.3, self.training)
        return x.square().sum((1, 2))


def inputs(size: int = 3) -> Tensor:
    return torch.randn(size, 5, 16)


def per_layer(model: nn.Module, **options: Any) -> ClippedGradientAccumulator:
    return ClippedGradientAccumulator(model, l2_clip_norm=C, clipping="per_layer", **options)


def warm(accumulator: ClippedGradientAccumulator, model: nn.Module, x: Tensor) -> None:
    """The first microbatch shows how often parameters are used."""
    accumulator.add(lambda: model(x), batch_size=len(x))
    accumulator.reset()


def norm_of(sums: dict[str, Tensor]) -> float:
    return float(torch.cat([total.flatten() for total in sums.values()]).norm())


# --- the theorem: sqrt(Σ C_k²) = C, attained and never passed


def moved_by(model: nn.Module, accumulator: ClippedGradientAccumulator, rest: Tensor, one: Tensor) -> float:
    """Returns by how much the sum moves when ``one`` joins ``rest``."""
    sums = []
    for x in (rest, torch.cat([rest, one])):
        accumulator.reset()
        accumulator.add(lambda x=x: model(x), batch_size=len(x))
        sums.append({name: total.double() for name, total in accumulator.sums.items()})
    return norm_of({name: sums[1][name] - sums[0][name] for name in sums[0]})


def worst_neighbour(model: nn.Module, accumulator: ClippedGradientAccumulator) -> tuple[float, float]:
    """Returns the largest and the smallest move that a search over neighbouring batches finds."""
    rest, moves = inputs(3).double(), []
    warm(accumulator, model, rest)
    for k in range(24):
        one = inputs(1).double() * 10.0 ** (k % 8 - 4)
        moves.append(moved_by(model, accumulator, rest, one))
    return max(moves), min(moves)


def test_the_worst_neighbour_moves_the_sum_by_c_and_none_by_more() -> None:
    model = Deep().double().eval()
    largest, smallest = worst_neighbour(model, per_layer(model))
    assert largest <= C * (1 + 1e-12)
    assert largest > 0.999 * C, "the bound is tight: every group of some neighbour is at its own"
    assert smallest < 0.9 * C, "the search sees neighbours that are not clipped too"


def test_bounds_by_weight_are_attained_group_by_group() -> None:
    model = Deep().double().eval()
    groups = [
        ClipGroup(name=str(k), parameters=(f"layers.{k}.weight", f"layers.{k}.bias"), weight=k + 1.0)
        for k in range(4)
    ]
    accumulator = per_layer(model, clip_groups=groups)
    x = inputs(1).double()
    for _ in range(2):
        accumulator.reset()
        accumulator.add(lambda: 1e6 * model(x), batch_size=1)
        sums = accumulator.sums
        for k in range(4):
            part = {name: total for name, total in sums.items() if name.startswith(f"layers.{k}.")}
            assert norm_of(part) == pytest.approx(C * (k + 1) / math.sqrt(30), rel=1e-12)
        assert norm_of(sums) == pytest.approx(C, rel=1e-12)


def test_clipping_each_layer_to_the_whole_bound_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer's bug: with C for each of K layers the sum moves by C·sqrt(K)."""
    monkeypatch.setattr(clip_groups.math, "hypot", lambda *weights: 1.0)
    model = Deep().double().eval()
    largest, _ = worst_neighbour(model, per_layer(model))
    assert largest == pytest.approx(C * 2.0)


# --- the backward pass


def test_several_microbatches_with_dropout_and_padding_equal_the_definition() -> None:
    model = Deep().double()
    accumulator = per_layer(model)
    parts = [
        (group.parameters, bound)
        for group, bound in zip(accumulator.groups.groups, accumulator.groups.l2_clip_norms, strict=True)
    ]
    expected = {name: torch.zeros_like(p) for name, p in accumulator.parameters.items()}
    for seed in range(3):
        x, weights = inputs(1).double(), torch.tensor([float(seed != 1)])
        torch.manual_seed(seed)
        gradients = per_example_gradients(model, model, x, batch_size=1)
        sums, _ = clipped_sum_of_groups(gradients, groups=parts, weights=weights)
        expected = {name: expected[name] + sums[name] for name in expected}
        torch.manual_seed(seed)
        accumulator.add(lambda x=x: model(x), batch_size=1, weights=weights)
    for name, total in accumulator.sums.items():
        torch.testing.assert_close(total, expected[name])


def test_one_record_is_alive_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive, peak = 0, 0
    make = LinearContribution.__init__

    def counting(self: Any, **fields: Any) -> None:
        nonlocal alive, peak
        make(self, **fields)
        alive += 1
        peak = max(peak, alive)

    def gone(self: Any) -> None:
        nonlocal alive
        alive -= 1

    monkeypatch.setattr(LinearContribution, "__init__", counting)
    monkeypatch.setattr(LinearContribution, "__del__", gone, raising=False)
    peaks = {}
    model = Deep()
    for clipping in ("per_layer", "flat"):
        accumulator = ClippedGradientAccumulator(model, l2_clip_norm=C, clipping=clipping)
        warm(accumulator, model, inputs())
        peak = alive
        accumulator.add(lambda: model(inputs()), batch_size=3)
        peaks[clipping] = peak
    assert peaks == {"per_layer": 1, "flat": 4}


def test_a_reused_module_waits_for_its_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped use by use, each would be bounded alone and the two together by twice as much."""
    model = Deep().double().eval()
    model.times = 2
    accumulator = per_layer(model)
    x = inputs(1).double()
    warm(accumulator, model, x)
    accumulator.add(lambda: 1e6 * model(x), batch_size=1)
    assert norm_of(accumulator.sums) == pytest.approx(C, rel=1e-12)
    # The planted fault: a group that does not wait is refused at the second use, and never added in two parts.
    accumulator.reset()
    accumulator._uses = dict.fromkeys(accumulator._uses, 1)
    with pytest.raises(MissingRuleError, match="more often in this microbatch than its 1 times"):
        accumulator.add(lambda: model(x), batch_size=1)
    with pytest.raises(RunStateError, match="reset"):
        _ = accumulator.sums


def test_fewer_uses_than_in_the_first_microbatch_stay_exact() -> None:
    model = Deep().eval()
    model.times = 2
    ours, reference = per_layer(model), per_layer(model)
    x = inputs()
    warm(ours, model, x)
    model.times = 1
    ours.add(lambda: model(x), batch_size=3)
    reference.add(lambda: model(x), batch_size=3)  # book-kept, as a first microbatch is
    for name, total in reference.sums.items():
        torch.testing.assert_close(ours.sums[name], total)


def test_a_group_without_a_gradient_is_an_error_and_nothing_of_the_step_can_be_released() -> None:
    model = Deep().eval()
    accumulator = per_layer(model)
    warm(accumulator, model, inputs())
    model.dead = 1
    with pytest.raises(MissingRuleError, match=r"layers\.1\.weight.*saw no gradient"):
        accumulator.add(lambda: model(inputs()), batch_size=3)
    with pytest.raises(RunStateError, match="reset"):
        _ = accumulator.sums


def test_breaking_off_in_the_backward_pass_asks_for_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Deep().eval()
    accumulator = per_layer(model)
    warm(accumulator, model, inputs())
    add = group_clipping.add_group

    def breaking(contributions: Any, parameters: Any, **rest: Any) -> Tensor:
        if "layers.1.weight" in parameters:
            raise MemoryError
        return add(contributions, parameters, **rest)

    monkeypatch.setattr(group_clipping, "add_group", breaking)
    with pytest.raises(MemoryError):
        accumulator.add(lambda: model(inputs()), batch_size=3)
    with pytest.raises(RunStateError, match="reset"):
        _ = accumulator.sums


def test_breaking_off_in_the_forward_pass_leaves_the_sums_whole() -> None:
    model = Deep().eval()
    accumulator = per_layer(model)
    warm(accumulator, model, inputs())

    def fails() -> Tensor:
        raise KeyError("broken loss")

    with pytest.raises(KeyError):
        accumulator.add(fails, batch_size=3)
    assert not any(total.any() for total in accumulator.sums.values())


# --- what is not finite


class Branches(nn.Module):
    """Two maps that do not touch each other, so that one can be broken alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.first(x).square().sum(1) + self.second(y).square().sum(1)


@pytest.mark.parametrize("warmed", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_is_dropped_from_its_group_and_the_bound_holds(bad: float, warmed: bool) -> None:
    """1e30 has a finite gradient whose square is not."""
    model = Branches()
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    accumulator = per_layer(model)
    if warmed:
        accumulator.add(lambda: model(x, y), batch_size=3)
        accumulator.reset()
    x[1, 0] = bad
    found = accumulator.add(lambda: model(x, y), batch_size=3)
    assert found.norms.isfinite().tolist() == [True, False, True]
    assert bool(found.clipped[1])
    sums = {name: total.clone() for name, total in accumulator.sums.items()}
    assert all(total.isfinite().all() for total in sums.values())
    others = per_layer(model)
    others.add(lambda: model(x[[0, 2]], y[[0, 2]]), batch_size=2)
    for name in ("first.weight", "first.bias"):
        torch.testing.assert_close(sums[name], others.sums[name])
    moved = norm_of({name: sums[name] - others.sums[name] for name in sums})
    assert 0.0 < moved <= C / math.sqrt(2) * (1 + 1e-5), "only the other group's part is left"


# --- low precision, padding, heads


def test_autocast_releases_the_numbers_that_were_measured() -> None:
    """With one example each group's sum has its own bound as its norm, whatever was rounded."""
    model = nn.Sequential(nn.Linear(16, 40), nn.LayerNorm(40), nn.Linear(40, 40))
    x = inputs(1)
    accumulator = per_layer(model)
    for _ in range(2):
        accumulator.reset()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            accumulator.add(lambda: 1e4 * model(x).float().square().sum((1, 2)), batch_size=1)
        sums = accumulator.sums
        for group, bound in zip(accumulator.groups.groups, accumulator.groups.l2_clip_norms, strict=True):
            assert norm_of({name: sums[name] for name in group.parameters}) == pytest.approx(bound, rel=1e-4)


@pytest.mark.parametrize("tie_head", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_transformer_with_and_without_a_fused_head(tie_head: bool, fused: bool) -> None:
    from dp_flash_attention.clipping import LinearCrossEntropy
    from dp_flash_attention.training.losses import language_model_loss

    sizes = {"vocab_size": 30, "seq_len": 9, "d_model": 16, "num_heads": 2, "num_layers": 2}
    model = TextTransformer(TextTransformerConfig(**sizes, tie_head=tie_head)).double()

    def loss_fn(ids: Tensor) -> Tensor:
        return language_model_loss(model(ids), ids)

    reference, recorded, loss = model, model, loss_fn
    if fused:
        head = LinearCrossEntropy(16, 30, bias=False).double()
        table = nn.Embedding(30, 16).double()
        if tie_head:
            head.weight = table.weight
        reference = recorded = nn.ModuleDict(
            {"table": table, "body": nn.Linear(16, 16).double(), "head": head}
        )
        loss = lambda ids: head(reference["body"](table(ids)).tanh(), ids.roll(-1, 1))  # noqa: E731
    ids = torch.randint(0, 30, (4, 9))
    accumulator = per_layer(recorded)
    gradients = per_example_gradients(reference, loss, ids, batch_size=4)
    parts = [
        (group.parameters, bound)
        for group, bound in zip(accumulator.groups.groups, accumulator.groups.l2_clip_norms, strict=True)
    ]
    expected, _ = clipped_sum_of_groups(gradients, groups=parts)
    for _ in range(2):
        accumulator.reset()
        accumulator.add(lambda: loss(ids), batch_size=4)
        for name, total in accumulator.sums.items():
            torch.testing.assert_close(total, expected[name])


def test_two_passes_for_groups_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"'bookkeeping' or 'one_example' with clipping 'per_layer'"):
        per_layer(Deep(), strategy="two_pass")
