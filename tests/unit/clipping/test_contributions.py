"""Every kind of contribution and every pair of kinds against its own dense gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from dp_flash_attention.clipping import combined_norms, contributions
from dp_flash_attention.clipping.combined_norms import combined_sq_norms
from dp_flash_attention.clipping.contributions import (
    Contribution,
    DenseContribution,
    EmbeddingContribution,
    LinearContribution,
    linear_contribution,
)

B, ROWS, COLUMNS = 3, 11, 6
SHAPE = torch.Size((ROWS, COLUMNS))


def linear(dtype: torch.dtype = torch.float64, *, num_rows: int = 5) -> LinearContribution:
    x, g = torch.randn(B, num_rows, COLUMNS, dtype=dtype), torch.randn(B, num_rows, ROWS, dtype=dtype)
    return LinearContribution(x_BTD=x, g_BTP=g, weight_shape=SHAPE)


def input_first(dtype: torch.dtype = torch.float64) -> LinearContribution:
    x, g = torch.randn(B, 4, ROWS, dtype=dtype), torch.randn(B, 4, COLUMNS, dtype=dtype)
    return LinearContribution(x_BTD=x, g_BTP=g, weight_shape=SHAPE, input_first=True)


def lookup(dtype: torch.dtype = torch.float64) -> EmbeddingContribution:
    ids = torch.randint(0, 4, (B, 7))  # repeated in every example
    return EmbeddingContribution(
        ids_BT=ids, g_BTD=torch.randn(B, 7, COLUMNS, dtype=dtype), weight_shape=SHAPE
    )


def dense(dtype: torch.dtype = torch.float64) -> DenseContribution:
    return DenseContribution(grads_B=torch.randn(B, *SHAPE, dtype=dtype))


KINDS: tuple[Callable[..., Contribution], ...] = (linear, input_first, lookup, dense)
PAIRS = list(itertools.combinations_with_replacement(KINDS, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_norms_sums_and_mass_follow_from_the_gradients(kind: Callable[..., Contribution]) -> None:
    contribution, factors = kind(), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    grads = contribution.dense(0, B)
    assert grads.shape == (B, *SHAPE)
    torch.testing.assert_close(contribution.sq_norms(), grads.square().sum((1, 2)))
    assert bool((contribution.mass() ** 2 >= contribution.sq_norms() * (1 - 1e-12)).all())
    total = torch.full(SHAPE, torch.nan, dtype=torch.float64)
    contribution.add_weighted_sum(factors, total, fresh=True)
    expected = torch.einsum("b,bpd->pd", factors, grads)
    torch.testing.assert_close(total, expected)
    contribution.add_weighted_sum(factors, total, fresh=False)
    torch.testing.assert_close(total, 2 * expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_example_is_zero_even_where_it_is_not_finite(kind: Callable[..., Contribution]) -> None:
    contribution = kind()
    values = (
        contribution.grads_B
        if isinstance(contribution, DenseContribution)
        else (contribution.g_BTD if isinstance(contribution, EmbeddingContribution) else contribution.g_BTP)
    )
    values[1] = torch.nan
    clean = contribution.without(torch.tensor([False, True, False]))
    assert torch.equal(clean.dense(1, 2), torch.zeros(1, *SHAPE, dtype=torch.float64))
    assert torch.equal(clean.dense(2, 3), contribution.dense(2, 3))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_uses_of_a_parameter_are_combined_exactly(
    first: Callable[..., Contribution], second: Callable[..., Contribution]
) -> None:
    uses = [first(), second()]
    expected = (uses[0].dense(0, B) + uses[1].dense(0, B)).square().sum((1, 2))
    torch.testing.assert_close(combined_sq_norms(uses), expected)


def test_uses_that_cancel_keep_their_norm() -> None:
    """A tied weight whose two gradients nearly cancel: a difference of large numbers would tell nothing."""
    head = linear(torch.float32)
    away = -head.dense(0, B) + 1e-4 * torch.randn(B, *SHAPE)
    uses = [head, DenseContribution(grads_B=away)]
    expected = (head.dense(0, B) + away).square().sum((1, 2)).sqrt()
    torch.testing.assert_close(combined_sq_norms(uses).sqrt(), expected, rtol=1e-2, atol=0.0)


def test_the_tied_cross_term_is_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combined_norms, "SCRATCH_BYTES", 1)
    uses = [linear(), lookup()]
    expected = (uses[0].dense(0, B) + uses[1].dense(0, B)).square().sum((1, 2))
    torch.testing.assert_close(combined_sq_norms(uses), expected)


def test_half_precision_sums_are_widened_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    half, factors = linear(torch.bfloat16), torch.tensor([0.5, 1.0, 0.25])
    expected = torch.einsum("b,bpd->pd", factors, half.dense(0, B))
    for scratch in (1, 10**6):
        monkeypatch.setattr(contributions, "SCRATCH_BYTES", scratch)
        total = torch.empty(SHAPE)
        half.add_weighted_sum(factors, total, fresh=True)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_no_look_ups_have_no_norm() -> None:
    empty = EmbeddingContribution(
        ids_BT=torch.zeros(B, 0, dtype=torch.long), g_BTD=torch.zeros(B, 0, COLUMNS), weight_shape=SHAPE
    )
    assert empty.sq_norms().tolist() == [0.0] * B


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_ids_of_either_width_are_credited_to_their_own_example(ids_dtype: torch.dtype) -> None:
    wide = lookup()
    narrow = EmbeddingContribution(ids_BT=wide.ids_BT.to(ids_dtype), g_BTD=wide.g_BTD, weight_shape=SHAPE)
    torch.testing.assert_close(narrow.sq_norms(), wide.dense(0, B).square().sum((1, 2)))


@pytest.mark.parametrize(
    ("num_rows", "dtype", "kind"),
    [
        (3, torch.float32, LinearContribution),  # 66 numbers a gradient, 51 recorded
        (4, torch.float32, DenseContribution),  # 68 recorded
        (7, torch.bfloat16, LinearContribution),  # 264 bytes, 238 recorded
        (8, torch.bfloat16, DenseContribution),
    ],
)
@pytest.mark.parametrize("is_input_first", [False, True])
def test_the_smaller_record_is_kept(
    num_rows: int, dtype: torch.dtype, kind: type[Contribution], is_input_first: bool
) -> None:
    sizes = (ROWS, COLUMNS) if is_input_first else (COLUMNS, ROWS)
    x, g = (torch.randn(B, num_rows, size).to(dtype) for size in sizes)
    kept = linear_contribution(x_BTD=x, g_BTP=g, weight_shape=SHAPE, input_first=is_input_first)
    assert type(kept) is kind
    whole = LinearContribution(
        x_BTD=x.double(), g_BTP=g.double(), weight_shape=SHAPE, input_first=is_input_first
    )
    # Products of bfloat16 numbers are exact in float32, so only float32's own rounding is left.
    torch.testing.assert_close(kept.dense(0, B).double(), whole.dense(0, B), rtol=1e-5, atol=1e-5)
    assert kept.dense(0, B).dtype is torch.float32


def test_a_gradient_formed_during_the_backward_pass_ignores_autocast_and_low_precision() -> None:
    x, g = torch.randn(B, 40, COLUMNS), torch.randn(B, 40, ROWS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = linear_contribution(x_BTD=x, g_BTP=g, weight_shape=SHAPE)
    assert isinstance(kept, DenseContribution)
    torch.testing.assert_close(kept.grads_B, torch.einsum("btp,btd->bpd", g, x), rtol=1e-5, atol=1e-5)
