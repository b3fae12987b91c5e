"""Noise of several parties. Fixed keys; each statistical test's false-alarm rate is 1e-4 over keys."""

import math

import numpy as np
import pytest
from scipy import stats

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget, Sensitivity
from dp_flash_attention.noise import SecretKey, TestKey
from dp_flash_attention.quantum.layered_noise import LayeredNoise

BUDGET = PrivacyBudget(epsilon=1.0, delta=1e-6)
ONE = Sensitivity(l2=1.0, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
LAWS = ["skellam", "discrete_gaussian"]
N, H, D = 6, 4, 4000
BOUND = stats.norm.isf(1e-4 / 2)


def parties(law, **changes):
    # 2^-7 keeps the tables small; the default grid is finer.
    settings = {"num_parties": N, "num_honest": H, "law": law, "grid": 2.0**-7}
    return LayeredNoise(**{**settings, **changes})


def messages(noise, plan, who, value=0.0):
    row = np.full(plan.dimension, value)
    return {p: noise.message(row, plan, key=TestKey(f"party {p}"), step=0) for p in who}


def score(values, stddev):
    return (np.mean((values / stddev) ** 2) - 1.0) / math.sqrt(2.0 / values.size)


@pytest.mark.parametrize("law", LAWS)
def test_any_h_honest_shares_make_the_whole_noise(law):
    noise = parties(law)
    plan = noise.plan(dimension=D, sensitivity=ONE, budget=BUDGET)
    whole = math.sqrt(H * float(plan.share_variance)) * plan.grid
    sent = messages(noise, plan, range(N))
    honest = sum(sent[p] for p in (1, 2, 4, 5)) * plan.grid
    assert abs(score(honest, whole)) < BOUND
    # σ/√n instead of σ/√h would leave too little once somebody cheats or leaves.
    assert score(honest * math.sqrt(H / N), whole) < -BOUND
    layer = plan.layer("x", H)
    assert layer.epsilon <= BUDGET.epsilon
    assert layer.noise_stddev == pytest.approx(whole)


@pytest.mark.parametrize("law", LAWS)
def test_shares_of_one_nth_would_break_the_budget(law):
    noise = parties(law)
    plan = noise.plan(dimension=D, sensitivity=ONE, budget=BUDGET)
    careless = plan.layer("x", H).epsilon
    import dataclasses
    from fractions import Fraction

    thinner = dataclasses.replace(plan, share_variance=plan.share_variance * Fraction(H, N))
    assert careless <= BUDGET.epsilon < thinner.layer("x", H).epsilon


@pytest.mark.parametrize("law", LAWS)
def test_dropouts_leave_the_planned_noise_or_more_and_it_is_reported(law):
    noise = parties(law)
    plan = noise.plan(dimension=D, sensitivity=ONE, budget=BUDGET)
    for who in (range(N), (0, 2, 3, 4, 5), (0, 1, 2, 3)):
        found = noise.combine(messages(noise, plan, who), plan, ONE, key_bits=256)
        assert abs(score(found.value, found.noise_stddev)) < BOUND
        assert found.noise_stddev == pytest.approx(
            math.sqrt(len(who) * float(plan.share_variance)) * plan.grid
        )
        assert found.epsilon == BUDGET.epsilon
    with pytest.raises(InvalidInputError, match="survivors"):
        noise.combine(messages(noise, plan, (0, 1, 2)), plan, ONE, key_bits=256)


@pytest.mark.parametrize("law", LAWS)
def test_layers_guard_against_different_failures_and_are_never_added(law):
    found = parties(law).release(np.zeros((N, 50)), ONE, BUDGET)
    collusion, outsider, alone = found.layers
    assert outsider.epsilon < collusion.epsilon <= BUDGET.epsilon < alone.epsilon
    assert found.epsilon == BUDGET.epsilon  # the claim is one layer's, not a sum or a minimum of several
    assert alone.noise_stddev < collusion.noise_stddev < outsider.noise_stddev
    assert found.quantum_security_bits == 128
    assert found.delta.total <= BUDGET.delta


@pytest.mark.parametrize("law", LAWS)
def test_the_sum_is_the_sum_and_rounding_of_a_row_is_accounted(law):
    keys = [TestKey(f"k{p}") for p in range(N)]
    rows = np.arange(N * 30.0).reshape(N, 30) / 7
    found = parties(law).release(rows, ONE, BUDGET, keys=keys)
    assert np.abs(found.value - rows.sum(0)).max() < 7 * found.noise_stddev
    assert found.quantum_security_bits == 0  # test keys
    half = 2.0**-8
    low, high = np.zeros((N, 30)), np.zeros((N, 30))
    low[2], high[2] = half - 1e-9, half + 1e-9
    moved = (
        parties(law).release(high, ONE, BUDGET, keys=keys).value
        - parties(law).release(low, ONE, BUDGET, keys=keys).value
    )
    plan = parties(law).plan(dimension=30, sensitivity=ONE, budget=BUDGET)
    assert np.linalg.norm(moved) == pytest.approx(2.0**-7 * math.sqrt(30))
    assert plan.grid_sensitivity * plan.grid == pytest.approx(1.0 + 2.0**-7 * math.sqrt(30), rel=1e-4)


def test_shares_below_the_closeness_bound_are_refused_and_skellam_is_offered():
    many = {"num_parties": 4000, "num_honest": 4000, "grid": 2.0**-2}
    with pytest.raises(InvalidInputError, match="closeness bound"):
        parties("discrete_gaussian", **many).plan(dimension=1, sensitivity=ONE, budget=BUDGET)
    with pytest.raises(InvalidInputError, match=r"1/64"):
        parties("skellam", **{**many, "grid": 2.0**-1}).plan(
            dimension=1, sensitivity=ONE, budget=PrivacyBudget(epsilon=9.0, delta=1e-6)
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_honest": 7}, "num_honest"),
        ({"num_honest": 0}, "num_honest"),
        ({"num_parties": 0}, "num_parties"),
        ({"law": "laplace"}, "law"),
    ],
)
def test_counts_and_laws_out_of_range_are_refused(change, said):
    with pytest.raises(InvalidInputError, match=said):
        LayeredNoise(**{"num_parties": N, "num_honest": H, **change})


def test_messages_that_do_not_fit_are_refused():
    noise = parties("skellam")
    plan = noise.plan(dimension=3, sensitivity=ONE, budget=BUDGET)
    good = messages(noise, plan, range(4))
    for bad in ({**good, 9: good[0]}, {**good, 4: good[0][:2]}, {**good, 4: good[0].astype(float)}):
        with pytest.raises(InvalidInputError):
            noise.combine(bad, plan, ONE, key_bits=256)
    with pytest.raises(InvalidInputError, match="row"):
        noise.message(np.zeros(4), plan, key=TestKey("x"), step=0)
    with pytest.raises(InvalidInputError, match="6 rows"):
        noise.release(np.zeros((5, 3)), ONE, BUDGET)
    with pytest.raises(InvalidInputError, match="keys"):
        noise.release(np.zeros((6, 3)), ONE, BUDGET, keys=[TestKey("x")])


def test_the_same_keys_make_other_noise_in_the_next_release():
    """Equal noise under two values would show their difference exactly."""
    keys = [SecretKey.from_os() for _ in range(N)]
    zeros, ones = np.zeros((N, 8)), np.ones((N, 8))
    first = parties("skellam").release(zeros, ONE, BUDGET, keys=keys).value
    second = parties("skellam").release(ones, ONE, BUDGET, keys=keys).value
    assert len(set((second - first).tolist())) > 1


def test_equal_keys_are_refused():
    """n equal shares add up to n times one share: the sum shows the value modulo n."""
    keys = [TestKey("one")] * N
    with pytest.raises(InvalidInputError, match="all different"):
        parties("skellam").release(np.zeros((N, 3)), ONE, BUDGET, keys=keys)


def test_nobody_claims_a_strength_for_keys_that_others_hold():
    noise = LayeredNoise(num_parties=3, num_honest=2)
    plan = noise.plan(dimension=1, sensitivity=ONE, budget=PrivacyBudget(epsilon=1.0, delta=1e-6))
    with pytest.raises(TypeError, match="key_bits"):
        noise.combine(messages(noise, plan, (0, 1, 2)), plan, ONE)
    assert noise.combine(messages(noise, plan, (0, 1, 2)), plan, ONE, key_bits=0).quantum_security_bits == 0


def test_the_strength_that_parties_state_is_their_word_and_said_to_be_assumed():
    noise = parties("skellam")
    plan = noise.plan(dimension=D, sensitivity=ONE, budget=BUDGET)
    found = noise.combine(messages(noise, plan, range(N)), plan, ONE, key_bits=256)
    assert any(
        line.startswith("assumed, on the caller's word: 256 bits of the weakest") for line in found.assumed
    )


def test_keys_weaker_than_delta_counts_on_release_nothing():
    """δ holds the chance of finding a key of 256 bits. With 128 it is 2^128 times as much, which no δ here covers."""
    noise = LayeredNoise(num_parties=3, num_honest=2)
    plan = noise.plan(dimension=4, sensitivity=ONE, budget=PrivacyBudget(epsilon=1.0, delta=1e-6))
    sent = messages(noise, plan, (0, 1, 2))
    for bits in (1, 128, 255):
        with pytest.raises(InvalidInputError, match="delta counts on"):
            noise.combine(sent, plan, ONE, key_bits=bits)
    assert noise.combine(sent, plan, ONE, key_bits=512).quantum_security_bits == 128


@pytest.mark.parametrize("law", LAWS)
def test_wide_shares_have_the_planned_scale_too(law):
    """The default grid of many numbers: shares of 10^5 steps and more."""
    noise = parties(law, grid=2.0**-17)
    plan = noise.plan(dimension=20_000, sensitivity=ONE, budget=BUDGET)
    assert plan.share_variance > 2**28
    honest = sum(messages(noise, plan, range(H)).values()) * plan.grid
    whole = plan.layer("x", H).noise_stddev
    assert abs(score(honest, whole)) < BOUND
    assert score(0.9 * honest, whole) < -BOUND
    assert 0 < plan.delta.sampler < 1e-25


def test_a_grid_whose_noise_leaves_the_range_is_refused():
    with pytest.raises(InvalidInputError, match="grid"):
        parties("skellam", grid=2.0**-48).plan(dimension=1, sensitivity=ONE, budget=BUDGET)


def test_a_sum_of_many_pieces_is_the_sum(rng):
    noise = parties("skellam", grid=2.0**-12)
    plan = noise.plan(dimension=140_001, sensitivity=ONE, budget=BUDGET)
    sent = {party: rng.integers(-(2**40), 2**40, plan.dimension) for party in range(N)}
    found = noise.combine(sent, plan, ONE, key_bits=256).value
    assert np.array_equal(found, sum(sent.values()) * plan.grid)
