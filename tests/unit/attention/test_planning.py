"""A plan's noise is what its μ needs, row by row and head by head, and it is rounded upwards."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dp_flash_attention.accounting import gdp_epsilon
from dp_flash_attention.attention import AttentionBounds, Contexts, plan_attention_release
from dp_flash_attention.attention.sensitivity import replace_one_sensitivity
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget


def bounds(**changes):
    return AttentionBounds(
        **{"query_norm": 1.0, "key_norm": 1.0, "value_norm": 2.0, "num_rows": 50, **changes}
    )


def joint_mu(plan):
    """μ of the whole call from σ and Δ as they are, in double precision."""
    ratios = plan.sensitivity[:, None, :] / plan.stddev.numpy().astype(np.float64)
    ratios = np.broadcast_to(ratios, (plan.batch_size, plan.num_heads, plan.num_queries))
    per_entry = (ratios**2).sum(axis=(1, 2))
    shared = plan.bounds.contexts is Contexts.SHARED
    return math.sqrt(per_entry.sum() if shared else per_entry.max())


@given(
    mu=st.floats(0.01, 5.0),
    heads=st.integers(1, 5),
    batch=st.integers(1, 3),
    queries=st.integers(1, 70),
    causal=st.booleans(),
    disjoint=st.booleans(),
    lengths=st.booleans(),
)
def test_the_noise_pays_for_every_row_head_and_entry(mu, heads, batch, queries, causal, disjoint, lengths):
    made = bounds(
        contexts=Contexts.DISJOINT if disjoint else Contexts.SHARED,
        num_rows=tuple(50 - 7 * entry for entry in range(batch)) if lengths else 50,
    )
    plan = plan_attention_release(
        made, num_queries=queries, query_width=8, num_heads=heads, batch_size=batch, is_causal=causal, mu=mu,
        head_importance=[1.0 + head for head in range(heads)],
    )  # fmt: skip
    assert mu * (1 - 1e-5) < joint_mu(plan) <= mu
    assert math.hypot(*plan.head_mus) <= plan.mu == mu


def test_the_same_head_budget_without_composition_would_be_noticed():
    plan = plan_attention_release(bounds(), num_queries=3, query_width=8, num_heads=4, mu=1.0)
    # What one head's outputs cost alone, if the sum over heads were forgotten.
    assert joint_mu(plan) / 2 == pytest.approx(plan.head_mus[0], rel=1e-5)
    assert plan.head_mus[0] < 0.51 * plan.mu


def test_causal_rows_see_fewer_rows_and_get_more_noise():
    plan = plan_attention_release(
        bounds(rounding=None), num_queries=60, query_width=8, scale=0.5, mu=1.0, is_causal=True
    )
    assert np.all(np.diff(plan.sensitivity[0, :50]) < 0)
    assert np.all(plan.sensitivity[0, 49:] == plan.sensitivity[0, 49])
    for t in (0, 10, 49):
        assert plan.sensitivity[0, t] == replace_one_sensitivity(
            value_norm=2.0, score_bound=plan.score_bound, rest=t
        )


def test_under_removal_the_noise_knows_nothing_of_the_number_of_rows():
    made = bounds(num_rows=None, null_rows=9.0, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    plans = [
        plan_attention_release(made, num_queries=2, query_width=8, mu=1.0, num_key_rows=rows)
        for rows in (None, 10, 999)
    ]
    assert len({float(plan.stddev.max()) for plan in plans}) == 1
    causal = plan_attention_release(
        made, num_queries=5, query_width=8, mu=1.0, is_causal=True, num_key_rows=5
    )
    assert causal.sensitivity[0, 0] < causal.sensitivity[0, 1]


def test_signal_to_noise_is_what_it_says():
    plan = plan_attention_release(
        bounds(), num_queries=3, query_width=8, value_width=4, num_heads=2, batch_size=2, mu=1.0
    )
    ratio = plan.signal_to_noise()
    assert ratio.shape == (1, 2, 3)
    assert ratio[0, 0, 0] == pytest.approx(2.0 / (float(plan.stddev[0, 0, 0]) * 2.0))
    assert plan.signal_to_noise(1.0)[0, 0, 0] == pytest.approx(ratio[0, 0, 0] / 2)
    assert plan.epsilon(1e-6) == gdp_epsilon(mu=1.0, delta=1e-6)
    more = plan_attention_release(bounds(num_rows=5000), num_queries=3, query_width=8, value_width=4, mu=1.0)
    assert more.signal_to_noise().min() > 10 * ratio.min()


def test_one_head_may_have_the_whole_budget():
    budget = PrivacyBudget(epsilon=1.0, delta=1e-6)
    plan = plan_attention_release(
        bounds(), num_queries=1, query_width=8, budget=budget, head_epsilons=[1.0], num_heads=1
    )
    assert plan.epsilon(1e-6) <= 1.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_queries": 0}, "num_queries"),
        ({"num_heads": 2.5}, "num_heads"),
        ({"compute_dtype": torch.int32}, "compute_dtype"),
        ({"num_key_rows": 49}, "num_key_rows"),
        ({"head_importance": [1.0]}, "head_importance"),
        ({"head_importance": [1.0, 0.0]}, "head_importance"),
        ({"head_epsilons": [1.0, 1.0]}, "budget"),
        ({"head_importance": [1.0, 1.0], "head_epsilons": [1.0, 1.0]}, "head_importance"),
        ({"mu": None}, "budget"),
        ({"mu": math.inf}, "mu"),
        ({"bounds": bounds(num_rows=(50,)), "batch_size": 2}, "num_rows"),
        ({"scale": math.nan}, "scale"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, said):
    given = {"bounds": bounds(), "num_queries": 3, "query_width": 8, "num_heads": 2, "mu": 1.0, **changes}
    with pytest.raises(InvalidInputError, match=said):
        plan_attention_release(given.pop("bounds"), **given)


def test_head_budgets_compose():
    budget = PrivacyBudget(epsilon=2.0, delta=1e-6)
    epsilons = [0.2, 0.4, 0.6, 0.8]
    bounds = AttentionBounds(query_norm=2.0, key_norm=2.0, value_norm=1.5, num_rows=33)
    shape = {"num_queries": 6, "query_width": 8, "num_heads": 4, "batch_size": 2, "budget": budget}
    plan = plan_attention_release(bounds, head_epsilons=epsilons, **shape)
    assert [gdp_epsilon(mu=each, delta=1e-6) for each in plan.head_mus] == pytest.approx(epsilons, rel=1e-9)
    assert plan.mu == pytest.approx(math.hypot(*plan.head_mus))
    assert max(epsilons) < plan.epsilon(1e-6) < sum(epsilons)
    with pytest.raises(InvalidInputError, match="compose to"):
        plan_attention_release(bounds, head_epsilons=[1.2] * 4, **shape)
