"""The filter admits exactly what fits, refuses before it charges, and its theorem holds for an adaptive analyst."""

import copy
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dp_flash_attention.accounting import GaussianFilter, gdp_mu
from dp_flash_attention.core.errors import BudgetExhaustedError, InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget

BUDGET = PrivacyBudget(epsilon=1.0, delta=1e-6)


@given(count=st.integers(1, 300))
def test_equal_shares_fit_exactly(count):
    gate = GaussianFilter(BUDGET)
    share = gate.share(count)
    for _ in range(count):
        gate.spend(share)
    assert not gate.admits(share)
    assert gate.epsilon_spent <= BUDGET.epsilon
    with pytest.raises(BudgetExhaustedError, match="nothing was computed or spent"):
        gate.spend(share)
    assert gate.num_releases == count


def test_what_is_left_fits_and_a_hair_more_does_not():
    gate = GaussianFilter(BUDGET, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    assert gate.epsilon_spent == 0.0
    gate.spend(0.1)
    assert not gate.admits(gate.mu_left * (1 + 1e-12))
    gate.spend(gate.mu_left)
    assert gate.mu_spent == pytest.approx(gdp_mu(BUDGET))


def test_a_copy_cannot_spend_it_again():
    gate = GaussianFilter(BUDGET)
    with pytest.raises(TypeError, match="GaussianFilter"):
        copy.copy(gate)
    assert copy.deepcopy(gate) is gate


def test_threads_cannot_spend_the_same_budget():
    gate = GaussianFilter(BUDGET)
    share, admitted = gate.share(50), []

    def ask():
        for _ in range(40):
            try:
                gate.spend(share)
                admitted.append(1)
            except BudgetExhaustedError:
                return

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(admitted) == 50


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), None])
def test_a_price_that_is_no_number_is_refused(bad):
    gate = GaussianFilter(BUDGET)
    with pytest.raises(InvalidInputError):
        gate.spend(bad)
    assert gate.num_releases == 0


def likelihood_ratios(rng, *, limit, num, cheat=1.0):
    """Log likelihood ratios of an analyst who spends more after answers that look like a hit."""
    left, total = np.full(num, limit**2), np.zeros(num)
    last = np.zeros(num)
    for _ in range(6):
        price = np.minimum(left, np.where(last > 0, 0.5, 0.1) * limit**2)
        shift = np.sqrt(price)
        last = shift + rng.standard_normal(num)  # under the neighbour that the ratio favours
        total += shift * last - price / 2
        left = left - price / cheat
    return total


def test_an_adaptive_analyst_learns_no_more_than_the_budget():
    """P(ratio > ε) under one neighbour minus e^ε times that under the other is the hockey-stick divergence.

    False-alarm rate 1e-6; an analyst whose filter charged half of each price would be seen.
    """
    rng = np.random.default_rng(3)
    num, limit, eps = 400_000, 1.5, 1.0
    bound = stats.norm.cdf(limit / 2 - eps / limit) - np.exp(eps) * stats.norm.cdf(-limit / 2 - eps / limit)

    def divergence(cheat):
        ratios = likelihood_ratios(rng, limit=limit, num=num, cheat=cheat)
        return np.maximum(0.0, 1.0 - np.exp(eps - ratios))

    honest, cheating = divergence(1.0), divergence(2.0)
    tolerance = stats.norm.isf(1e-6) * honest.std() / np.sqrt(num)
    assert honest.mean() <= bound + tolerance
    assert cheating.mean() > bound + 3 * tolerance


@pytest.mark.parametrize("bad", [-0.1, 1.0, float("nan"), None, True])
def test_a_share_for_finite_precision_that_leaves_nothing_is_refused(bad):
    with pytest.raises(InvalidInputError, match="finite_precision_share"):
        GaussianFilter(BUDGET, finite_precision_share=bad)


def test_distances_are_paid_from_what_was_set_apart_and_from_nothing_else():
    gate = GaussianFilter(BUDGET, finite_precision_share=0.01)
    assert gate.mu == gdp_mu(PrivacyBudget(epsilon=1.0, delta=0.99e-6)) < GaussianFilter(BUDGET).mu
    whole = 0.01e-6 / (1 + np.e)
    gate.spend(0.01, distance=0.6 * whole)
    assert gate.admits(0.01, distance=0.39 * whole)
    assert not gate.admits(0.01, distance=0.41 * whole)
    with pytest.raises(BudgetExhaustedError, match="total variation"):
        gate.spend(0.01, distance=0.41 * whole)
    assert gate.num_releases == 1
    gate.spend(gate.mu_left)  # what was refused cost nothing
    assert gate.epsilon_spent <= BUDGET.epsilon
    assert not GaussianFilter(BUDGET).admits(0.01, distance=1e-30)
    with pytest.raises(BudgetExhaustedError, match="finite_precision_share"):
        GaussianFilter(BUDGET).spend(0.01, distance=1e-30)
    with pytest.raises(InvalidInputError, match="distance"):
        gate.admits(0.01, distance=float("nan"))
