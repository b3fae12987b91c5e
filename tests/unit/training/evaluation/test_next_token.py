from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from dp_flash_attention.accounting import GaussianRelease, epsilon
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training.evaluation import (
    ReleaseTerms,
    evaluate_language_model,
    read_evaluation,
    token_losses,
)
from dp_flash_attention.training.losses import IGNORE_INDEX

TERMS = ReleaseTerms(epsilon=2.0, delta=1e-6, key=TestKey("tokens"))
BOUNDS = {"loss_bound": 5.0, "max_tokens": 10}


def test_token_losses_by_hand_with_padding_and_cut_off() -> None:
    logits = torch.zeros(2, 4, 3)
    logits[1, 0, 2] = 50.0  # a confident mistake
    labels = torch.tensor([[0, 1, 2, 0], [0, 1, IGNORE_INDEX, IGNORE_INDEX]])
    losses, counts = token_losses(logits, labels, loss_bound=2.0)
    assert counts.tolist() == [3, 1]
    assert losses.tolist() == pytest.approx([3 * math.log(3), 2.0])


def test_figures_are_near_the_exact_ones_and_the_noise_fits_the_price() -> None:
    counts = torch.randint(1, 11, (20_000,))
    losses = counts * torch.rand(20_000) * 5.0
    released = evaluate_language_model(losses, counts, TERMS, **BOUNDS)
    # Both sums move by at most 1: sqrt(2) in L2 norm.
    per_unit = GaussianRelease(noise_multiplier=released.noise_stddev / math.sqrt(2))
    assert epsilon(per_unit, delta=1e-6) <= 2.0
    exact = float(losses.sum() / counts.sum())
    assert released.nats_per_token == pytest.approx(exact, abs=6 * released.nats_standard_error)
    assert released.perplexity == pytest.approx(math.exp(released.nats_per_token))


def test_one_record_moves_each_sum_by_at_most_one() -> None:
    counts = torch.tensor([10, 3, 10])
    losses = torch.tensor([50.0, 1.0, 50.0 * (1 + 5e-5)])  # rounding of a float32 sum
    sums = [evaluate_language_model(losses[:n], counts[:n], TERMS, **BOUNDS) for n in (2, 3)]
    assert sums[1].loss_sum - sums[0].loss_sum == pytest.approx(1.0, abs=1e-12)
    assert sums[1].token_sum - sums[0].token_sum == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("losses", "counts"),
    [([51.0], [10]), ([-0.1], [3]), ([1.0], [11]), ([math.nan], [3]), ([math.inf], [3])],
)
def test_a_record_beyond_its_bounds_is_not_released(losses: list[float], counts: list[int]) -> None:
    with pytest.raises(InvalidInputError, match="losses"):
        evaluate_language_model(torch.tensor(losses), torch.tensor(counts), TERMS, **BOUNDS)


def test_a_loss_that_is_not_finite_counts_as_the_bound() -> None:
    logits = torch.zeros(2, 4, 3)
    logits[0, 1] = torch.nan
    losses, counts = token_losses(logits, torch.zeros(2, 4, dtype=torch.long), loss_bound=5.0)
    uniform = math.log(3.0)
    torch.testing.assert_close(losses, torch.tensor([2 * uniform + 5.0, 3 * uniform]))
    assert counts.tolist() == [3, 3]


def test_noise_that_hides_the_hold_out_leaves_the_bound() -> None:
    released = evaluate_language_model(torch.tensor([1.0]), torch.tensor([3]), TERMS, **BOUNDS)
    hidden = replace(released, token_sum=-2.0)
    assert (hidden.nats_per_token, hidden.nats_standard_error) == (5.0, 5.0)
    assert replace(released, loss_sum=-1.0, token_sum=2.0).nats_per_token == 0.0
    assert replace(released, loss_sum=9.0, token_sum=2.0).nats_per_token == 5.0


def test_a_release_comes_back_from_json() -> None:
    released = evaluate_language_model(torch.tensor([1.0]), torch.tensor([3]), TERMS, **BOUNDS)
    assert read_evaluation(json.loads(json.dumps(released.to_dict()))) == released


def test_sums_are_exact_whatever_the_records_and_their_order() -> None:
    """Float64 sums of arbitrary shares depend on the order in their last bits, and so on the records that are there."""
    torch.manual_seed(3)
    losses, counts = torch.rand(5000, dtype=torch.float64) * 50.0, torch.randint(1, 11, (5000,))
    found = set()
    for _ in range(5):
        order = torch.randperm(5000)
        released = evaluate_language_model(losses[order], counts[order], TERMS, **BOUNDS)
        found.add((released.loss_sum, released.token_sum))
    assert len(found) == 1
    exact = evaluate_language_model(losses, counts, replace(TERMS, noise="exact"), **BOUNDS)
    assert read_evaluation(exact.to_dict()) == exact
    assert exact.loss_sum != released.loss_sum
    sums = {float((losses[torch.randperm(5000)] / 50.0).sum()) for _ in range(5)}
    assert len(sums) > 1
