"""Every rule against one ordinary backward pass for each example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dp_flash_attention.clipping import ClippedGradientAccumulator, combined_norms, contributions
from dp_flash_attention.clipping.clip_groups import Clipping
from dp_flash_attention.clipping.reference import clipped_sum, clipped_sum_of_groups, per_example_gradients
from dp_flash_attention.clipping.strategies import Strategy
from dp_flash_attention.core.errors import (
    ExampleCouplingError,
    InvalidInputError,
    MissingRuleError,
    RunStateError,
)

VOCABULARY, WIDTH = 23, 12


def sq_mean(values: Tensor) -> Tensor:
    """A per-example loss with gradients of different sizes for different examples."""
    return values.flatten(1).pow(2).mean(1) + values.flatten(1)[:, 0]


class Tied(nn.Module):
    """Embedding and output head share one weight; the body is reused."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for _ in range(2):
            hidden = hidden + torch.tanh(self.body(hidden))
        return F.cross_entropy(self.head(hidden).mT, ids.roll(1, 1), reduction="none").mean(1)


class Positions(nn.Module):
    """Shared positions as [T] or [1, T], and a padding index."""

    def __init__(self, *, leading: bool) -> None:
        super().__init__()
        self.leading = leading
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.positions = nn.Embedding(31, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        hidden = self.tokens(ids) + self.positions(places[None] if self.leading else places)
        return sq_mean(self.head(hidden.tanh()))


class Raw(nn.Module):
    """Parameters of its own with a leading dimension of 1, as in vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, 8, WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        return sq_mean(self.head((rows + self.places).tanh()))


class Attention(nn.Module):
    """A module without a rule of its own: torch's multi-head attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 3, batch_first=True)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return sq_mean(self.head(self.inner(x, x, x, need_weights=False)[0]))


class Checkpointed(nn.Module):
    """Activation checkpointing: the forward of the middle runs again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        )
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return sq_mean(self.head(checkpoint(self.inner, x, use_reentrant=False)))


class Flattened(nn.Module):
    """Merges examples and tokens before a linear map, as Hugging Face's OPT and Conv1D do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return sq_mean(self.inner(self.norm(x).view(-1, WIDTH)).view(*x.shape[:2], 5).sin())


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.dtype], Tensor]
    fallback: tuple[str, ...] = ()


def sequence(rows: int) -> Callable[[int, torch.dtype], Tensor]:
    return lambda size, dtype: torch.randn(size, rows, WIDTH, dtype=dtype)


def tokens(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 6, (size, 9))  # few values: repeated tokens in every example


def image(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, 4, 9, 9, dtype=dtype)


class Scored(nn.Module):
    """Any tensor-to-tensor module with a per-example loss on top."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return sq_mean(self.inner(x).sin())


class Offset(nn.Module):
    """Activations with a mean ten times their spread, where a careless formula would cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return 10.0 + self.inner(x)


CASES = {
    "linear": Case(lambda: Scored(nn.Linear(WIDTH, 7)), sequence(5)),
    "linear_without_rows": Case(
        lambda: Scored(nn.Linear(WIDTH, 7)), lambda n, d: torch.randn(n, WIDTH, dtype=d)
    ),
    "linear_gram_tiles": Case(lambda: Scored(nn.Linear(WIDTH, 300), nn.Linear(300, 300)), sequence(259)),
    "linear_outer": Case(lambda: Scored(nn.Linear(WIDTH, 3)), sequence(200)),
    "linear_even_tiles": Case(lambda: Scored(nn.Linear(WIDTH, 400), nn.Linear(400, 400)), sequence(256)),
    "layer_norm": Case(lambda: Scored(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)), sequence(5)),
    "layer_norm_offset": Case(lambda: Scored(Offset(), nn.LayerNorm(WIDTH)), sequence(70)),
    "layer_norm_without_bias": Case(lambda: Scored(nn.LayerNorm(WIDTH, bias=False)), sequence(5)),
    "layer_norm_two_dims": Case(lambda: Scored(nn.LayerNorm((5, WIDTH))), sequence(5)),
    "rms_norm": Case(lambda: Scored(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 4)), sequence(5)),
    "conv2d": Case(lambda: Scored(nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2)), image),
    "conv2d_patches": Case(lambda: Scored(nn.Conv2d(4, 6, 3, stride=3), nn.Conv2d(6, 2, 2)), image),
    "conv2d_grouped": Case(lambda: Scored(nn.Conv2d(4, 6, 3, groups=2)), image),
    "conv1d": Case(lambda: Scored(nn.Conv1d(5, 6, 3, stride=2, padding=1), nn.Conv1d(6, 4, 2)), sequence(5)),
    "positions": Case(lambda: Positions(leading=False), tokens),
    "positions_leading_one": Case(lambda: Positions(leading=True), tokens),
    "tied_and_reused": Case(Tied, tokens),
    "raw_parameters": Case(Raw, sequence(7)),
    "fallback": Case(Attention, sequence(6), ("inner",)),
    "fallback_whole_model": Case(Attention, sequence(6), ("",)),
    "checkpointed": Case(Checkpointed, sequence(6)),
    "flattened": Case(Flattened, sequence(6)),
}


# Two passes for groups are refused: book-keeping lets go of a group's record in one.
MODES = [
    (s, c) for s in get_args(Strategy) for c in get_args(Clipping) if (s, c) != ("two_pass", "per_layer")
]


def relative_errors(
    case: Case,
    dtype: torch.dtype,
    *,
    size: int = 4,
    strategy: Strategy = "bookkeeping",
    clipping: Clipping = "flat",
) -> tuple[float, float]:
    """Returns the worst relative error of a norm, and of the clipped sum against C."""
    torch.manual_seed(3)
    model = case.build().to(dtype)
    inputs = case.inputs(size, dtype)
    weights = torch.ones(size)
    weights[-1] = 0  # padding
    gradients = per_example_gradients(model, model, inputs, batch_size=size)
    _, norms = clipped_sum(gradients, l2_clip_norm=1.0)
    clip = float(norms.median())  # some examples are clipped and some are not
    accumulator = ClippedGradientAccumulator(
        model, l2_clip_norm=clip, fallback_modules=case.fallback, strategy=strategy, clipping=clipping
    )
    found_groups = accumulator.groups
    parts = [
        (group.parameters, bound)
        for group, bound in zip(found_groups.groups, found_groups.l2_clip_norms, strict=True)
    ]
    expected, _ = clipped_sum_of_groups(gradients, groups=parts, weights=weights)
    microbatches = [(inputs, weights)]
    if strategy == "one_example":
        microbatches = [(inputs[i : i + 1], weights[i : i + 1]) for i in range(size)]
    else:  # the first microbatch is book-kept
        accumulator.add(lambda: model(inputs), batch_size=size, weights=weights)
        accumulator.reset()
    found = torch.cat(
        [
            accumulator.add(lambda x=x: model(x), batch_size=len(x), weights=w).norms.double()
            for x, w in microbatches
        ]
    )
    norm_error = ((found - norms) / norms).abs().max()
    sum_error = torch.stack([(accumulator.sums[k] - expected[k]).abs().max() for k in expected]).max() / clip
    return float(norm_error), float(sum_error)


@pytest.mark.parametrize(("strategy", "clipping"), MODES)
@pytest.mark.parametrize("name", CASES)
def test_float64_is_exact(name: str, strategy: Strategy, clipping: Clipping) -> None:
    norm_error, sum_error = relative_errors(CASES[name], torch.float64, strategy=strategy, clipping=clipping)
    assert norm_error < 1e-10
    assert sum_error < 1e-10


@pytest.mark.parametrize(("strategy", "clipping"), MODES)
@pytest.mark.parametrize("name", CASES)
def test_float32_is_exact_to_rounding(name: str, strategy: Strategy, clipping: Clipping) -> None:
    norm_error, sum_error = relative_errors(CASES[name], torch.float32, strategy=strategy, clipping=clipping)
    assert norm_error < 1e-4
    assert sum_error < 1e-4


@pytest.mark.parametrize(("strategy", "clipping"), MODES)
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_the_reference_up_to_its_own_rounding(
    name: str, strategy: Strategy, clipping: Clipping
) -> None:
    """8 bits, 4e-3 each, of inputs, gradients, factors and the reference's own sum; the worst case was 3.6e-2."""
    norm_error, sum_error = relative_errors(CASES[name], torch.bfloat16, strategy=strategy, clipping=clipping)
    assert norm_error < 5e-2
    assert sum_error < 5e-2


@pytest.mark.parametrize(("strategy", "clipping"), MODES)
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_releases_what_was_measured(name: str, strategy: Strategy, clipping: Clipping) -> None:
    """One example far above its bounds adds exactly C_k in each group, however its gradient was rounded."""
    model = CASES[name].build().bfloat16()
    x = CASES[name].inputs(1, torch.bfloat16)
    accumulator = ClippedGradientAccumulator(
        model,
        l2_clip_norm=1e-6,
        fallback_modules=CASES[name].fallback,
        strategy=strategy,
        clipping=clipping,
    )
    for _ in range(2):  # the first microbatch is book-kept
        accumulator.reset()
        found = accumulator.add(lambda: model(x), batch_size=1)
        assert found.clipped.all()
        sums, groups = accumulator.sums, accumulator.groups
        for group, bound in zip(groups.groups, groups.l2_clip_norms, strict=True):
            part = torch.cat([sums[parameter].flatten() for parameter in group.parameters])
            assert part.dtype == torch.float32
            assert float(part.norm()) == pytest.approx(bound, rel=1e-4)


@pytest.mark.parametrize("name", ["tied_and_reused", "linear", "positions"])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_batch_sizes(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = CASES[name].build().double()
    inputs = CASES[name].inputs(size, torch.float64)
    _, norms = clipped_sum(per_example_gradients(model, model, inputs, batch_size=size), l2_clip_norm=1.0)
    result = ClippedGradientAccumulator(model, l2_clip_norm=1.0).add(lambda: model(inputs), batch_size=size)
    torch.testing.assert_close(result.norms, norms)


# --- planted faults: the comparison above has to see each of them -------------------------------------


def test_dropping_the_tied_cross_term_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combined_norms, "_inner_products", lambda first, second: torch.zeros(()))
    assert relative_errors(CASES["tied_and_reused"], torch.float64)[0] > 1e-3


def test_forgetting_the_bias_norm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = lambda self: self.grads_B.new_zeros(self.grads_B.shape[0])  # noqa: E731 - a planted fault
    monkeypatch.setattr(contributions.DenseContribution, "sq_norms", zero)
    assert relative_errors(CASES["linear"], torch.float64)[0] > 1e-3


def test_counting_repeated_tokens_once_each_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    naive = lambda self: self.g_BTD.pow(2).sum((1, 2))  # noqa: E731 - a planted fault
    monkeypatch.setattr(contributions.EmbeddingContribution, "sq_norms", naive)
    assert relative_errors(CASES["positions"], torch.float64)[0] > 1e-3


def test_a_skipped_layer_is_seen() -> None:
    model = Scored(nn.Linear(WIDTH, 7), nn.Linear(7, 3))
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    accumulator._recorded = accumulator._recorded[:1]
    with pytest.raises(MissingRuleError, match=r"inner\.1\.weight"):
        accumulator.add(lambda: model(torch.randn(4, 5, WIDTH)), batch_size=4)


# --- state ------------------------------------------------------------------------------------------


def test_sums_add_up_over_microbatches_and_reset() -> None:
    torch.manual_seed(0)
    model = CASES["tied_and_reused"].build().double()
    inputs = tokens(6, torch.float64)
    whole = ClippedGradientAccumulator(model, l2_clip_norm=0.5)
    whole.add(lambda: model(inputs), batch_size=6)
    parts = ClippedGradientAccumulator(model, l2_clip_norm=0.5)
    for _ in range(2):  # the second round shows that nothing is left over from the first
        parts.reset()
        parts.add(lambda: model(inputs[:2]), batch_size=2)
        parts.add(lambda: model(inputs[2:]), batch_size=4)
        for name, expected in whole.sums.items():
            torch.testing.assert_close(parts.sums[name], expected)
    parts.reset()
    assert all(not total.any() for total in parts.sums.values())


def test_the_sum_of_n_examples_is_at_most_n_times_the_clip_norm() -> None:
    torch.manual_seed(0)
    model = CASES["positions"].build()
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1e-3)
    accumulator.add(lambda: 1e6 * model(tokens(1, torch.float32)), batch_size=1)
    total = torch.cat([s.flatten() for s in accumulator.sums.values()]).norm()
    assert float(total) == pytest.approx(1e-3, rel=1e-5)


def test_a_nan_example_is_dropped_and_others_are_kept() -> None:
    torch.manual_seed(0)
    model = CASES["linear"].build()
    inputs = torch.randn(4, 5, WIDTH)
    expected = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    expected.add(lambda: model(inputs), batch_size=4, weights=torch.tensor([1.0, 0.0, 1.0, 0.0]))
    inputs[1], inputs[3, 2, 1] = float("nan"), float("inf")
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    accumulator.add(lambda: model(inputs), batch_size=4)
    for name, total in expected.sums.items():
        torch.testing.assert_close(accumulator.sums[name], total)


def test_sums_do_not_depend_on_what_the_memory_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two published kernels forget to clear their accumulators; ours start poisoned here."""
    torch.manual_seed(0)
    model = CASES["tied_and_reused"].build()
    inputs = tokens(4, torch.float32)
    clean = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    clean.add(lambda: model(inputs), batch_size=4)
    poisoned = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    empty = poisoned._sums.empty
    monkeypatch.setattr(poisoned._sums, "empty", lambda name: empty(name).fill_(float("nan")))
    poisoned.add(lambda: model(inputs), batch_size=4)
    for name, total in clean.sums.items():
        torch.testing.assert_close(poisoned.sums[name], total, rtol=0.0, atol=0.0)


def test_gradients_and_forwards_are_left_as_they_were() -> None:
    model = CASES["linear"].build()
    kept = torch.ones_like(model.inner[0].weight)
    model.inner[0].weight.grad = kept
    ClippedGradientAccumulator(model, l2_clip_norm=1.0).add(
        lambda: model(torch.randn(4, 5, WIDTH)), batch_size=4
    )
    assert model.inner[0].weight.grad is kept
    assert "forward" not in model.inner[0].__dict__


def test_forwards_come_back_after_an_error() -> None:
    model = CASES["linear"].build()
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)

    def fails() -> Tensor:
        raise KeyError("broken loss")

    with pytest.raises(KeyError):
        accumulator.add(fails, batch_size=4)
    assert "forward" not in model.inner[0].__dict__
    accumulator.add(lambda: model(torch.randn(4, 5, WIDTH)), batch_size=4)


def test_frozen_parameters_stay_out() -> None:
    model = Scored(nn.Linear(WIDTH, 7), nn.Linear(7, 3))
    model.inner[0].requires_grad_(False)
    model.inner[1].bias.requires_grad_(False)
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    accumulator.add(lambda: model(torch.randn(4, 5, WIDTH)), batch_size=4)
    assert list(accumulator.sums) == ["inner.1.weight"]


def test_autocast_norms_match_the_released_sum() -> None:
    """With one example, the clipped sum's own norm has to be C exactly, whatever was rounded."""
    torch.manual_seed(0)
    model = Scored(nn.Linear(WIDTH, 40), nn.LayerNorm(40), nn.Linear(40, 40))
    inputs = torch.randn(1, 9, WIDTH)
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        accumulator.add(lambda: model(inputs), batch_size=1)
    total = torch.cat([s.flatten() for s in accumulator.sums.values()])
    assert total.dtype == torch.float32
    assert float(total.norm()) == pytest.approx(1e-2, rel=1e-4)


def test_a_microbatch_that_was_added_in_part_is_not_added_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catching an out-of-memory error and trying again would count examples twice."""
    torch.manual_seed(0)
    model, inputs = Scored(nn.Linear(WIDTH, 7), nn.Linear(7, 3)), torch.randn(4, 2, WIDTH)
    once = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    once.add(lambda: model(inputs), batch_size=4)
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    add = contributions.LinearContribution.add_weighted_sum
    calls = []

    def fails_at_the_second(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError
        add(self, *args, **kwargs)

    monkeypatch.setattr(contributions.LinearContribution, "add_weighted_sum", fails_at_the_second)
    with pytest.raises(MemoryError):
        accumulator.add(lambda: model(inputs), batch_size=4)
    for action in (
        lambda: accumulator.add(lambda: model(inputs), batch_size=4),
        lambda: accumulator.sums,
    ):
        with pytest.raises(RunStateError, match="count an example twice"):
            action()
    accumulator.reset()
    accumulator.add(lambda: model(inputs), batch_size=4)
    for name, total in once.sums.items():
        torch.testing.assert_close(accumulator.sums[name], total, rtol=0.0, atol=0.0)


def test_norms_use_full_float32_whatever_precision_products_have(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    norms = contributions.LinearContribution.sq_norms

    def looking(self: Any) -> Tensor:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return norms(self)

    monkeypatch.setattr(contributions.LinearContribution, "sq_norms", looking)
    model = CASES["linear"].build()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        ClippedGradientAccumulator(model, l2_clip_norm=1.0).add(
            lambda: model(torch.randn(4, 2, WIDTH)), batch_size=4
        )
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen
    assert set(seen) == {"ieee"}


# --- refusals ---------------------------------------------------------------------------------------


def test_a_module_without_a_rule_is_named() -> None:
    with pytest.raises(
        MissingRuleError, match=r"inner\.in_proj_weight \(MultiheadAttention\).*fallback_modules"
    ):
        ClippedGradientAccumulator(Attention(), l2_clip_norm=1.0)


def test_a_misspelt_fallback_suggests_the_near_one() -> None:
    with pytest.raises(InvalidInputError, match="Did you mean 'inner'"):
        ClippedGradientAccumulator(Attention(), l2_clip_norm=1.0, fallback_modules=["iner"])


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(WIDTH), nn.InstanceNorm1d(WIDTH, track_running_stats=True)])
def test_batch_statistics_are_refused(layer: nn.Module) -> None:
    with pytest.raises(ExampleCouplingError, match="mixes the examples"):
        ClippedGradientAccumulator(Scored(nn.Linear(WIDTH, WIDTH), layer), l2_clip_norm=1.0)


def test_batch_norm_switched_to_training_later_is_refused() -> None:
    model = Scored(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(5)).eval()
    model.inner[1].requires_grad_(False)
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    accumulator.add(lambda: model(torch.randn(4, 5, WIDTH)), batch_size=4)
    model.train()
    with pytest.raises(ExampleCouplingError, match="mixes the examples"):
        accumulator.add(lambda: model(torch.randn(4, 5, WIDTH)), batch_size=4)
    assert int(model.inner[1].num_batches_tracked) == 0


def test_a_forward_replaced_on_the_object_is_refused_and_kept() -> None:
    model = CASES["linear"].build()
    replacement = lambda x: 3 * F.linear(x, model.inner[0].weight)  # noqa: E731 - a hook of another library
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
    model.inner[0].forward = replacement
    with pytest.raises(MissingRuleError, match=r"inner\.0.*replaced on the object"):
        accumulator.add(lambda: model(torch.randn(4, 5, WIDTH)), batch_size=4)
    assert model.inner[0].forward is replacement


def test_a_router_is_refused() -> None:
    router = type("TopKRouter", (nn.Linear,), {})
    with pytest.raises(ExampleCouplingError, match="routing"):
        ClippedGradientAccumulator(Scored(router(WIDTH, 3)), l2_clip_norm=1.0)


def test_a_weight_used_outside_its_module_is_named() -> None:
    model = Scored(nn.Linear(WIDTH, WIDTH))
    weight = model.inner[0].weight

    def loss() -> Tensor:
        return sq_mean(F.linear(model.inner(torch.randn(4, 5, WIDTH)), weight))

    with pytest.raises(MissingRuleError, match=r"inner\.0\.weight.*outside the module"):
        ClippedGradientAccumulator(model, l2_clip_norm=1.0).add(loss, batch_size=4)


def test_an_unused_parameter_is_named() -> None:
    model = Scored(nn.Linear(WIDTH, 4))
    model.spare = nn.Linear(2, 2)
    with pytest.raises(MissingRuleError, match=r"spare\.weight.*saw no gradient"):
        ClippedGradientAccumulator(model, l2_clip_norm=1.0).add(
            lambda: model(torch.randn(4, 5, WIDTH)), batch_size=4
        )


@pytest.mark.parametrize("reduce", [Tensor.mean, lambda t: t[:-1], lambda t: t[:, None]])
def test_a_loss_that_is_not_per_example_is_refused(reduce: Callable[[Tensor], Any]) -> None:
    model = CASES["linear"].build()
    with pytest.raises(ExampleCouplingError, match="one entry for each of the 4 examples"):
        ClippedGradientAccumulator(model, l2_clip_norm=1.0).add(
            lambda: reduce(model(torch.randn(4, 5, WIDTH))), batch_size=4
        )


def test_rows_that_cannot_be_credited_are_refused() -> None:
    model = CASES["linear"].build()
    with pytest.raises(ExampleCouplingError, match="cannot be credited"):
        ClippedGradientAccumulator(model, l2_clip_norm=1.0).add(
            lambda: model(torch.randn(5, 4, WIDTH).transpose(0, 1).reshape(10, 2, WIDTH)), batch_size=4
        )


@pytest.mark.parametrize("weights", [torch.tensor([1.0, 2.0]), torch.ones(3)])
def test_weights_other_than_zero_and_one_are_refused(weights: Tensor) -> None:
    model = CASES["linear"].build()
    with pytest.raises(InvalidInputError, match="weights"):
        ClippedGradientAccumulator(model, l2_clip_norm=1.0).add(
            lambda: model(torch.randn(2, 5, WIDTH)), batch_size=2, weights=weights
        )


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clip_norm_that_does_not_bound_is_refused(clip: float) -> None:
    with pytest.raises(InvalidInputError, match="l2_clip_norm"):
        ClippedGradientAccumulator(CASES["linear"].build(), l2_clip_norm=clip)


def test_recording_inside_a_recording_is_refused() -> None:
    model = CASES["linear"].build()
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)

    def nested() -> Tensor:
        accumulator.add(lambda: model(torch.randn(4, 5, WIDTH)), batch_size=4)
        return torch.zeros(4)

    with pytest.raises(RunStateError, match="already being recorded"):
        accumulator.add(nested, batch_size=4)


def test_autocast_ends_with_the_forward_pass_so_that_recorded_sums_stay_float32():
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.RMSNorm(16), nn.Linear(16, 2))
    x = torch.randn(3, 5, 8)

    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float().square().sum((1, 2))

    inside = ClippedGradientAccumulator(model, l2_clip_norm=0.5)
    inside.add(loss, batch_size=3)
    around = ClippedGradientAccumulator(model, l2_clip_norm=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around.add(loss, batch_size=3)
    for name, total in inside.sums.items():
        assert torch.equal(around.sums[name], total), name
