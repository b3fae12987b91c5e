"""One suite for every kind of noise that an attention call can be made with."""

import pytest
import torch

from dp_flash_attention.accounting import GaussianFilter, gdp_mu
from dp_flash_attention.attention import AttentionBounds, CallNoise, dp_flash_attention
from dp_flash_attention.core.errors import BudgetExhaustedError, NoiseReuseError
from dp_flash_attention.core.privacy import PrivacyBudget
from dp_flash_attention.noise import SecretKey, TestKey

BUDGET = PrivacyBudget(epsilon=1.0, delta=1e-6)
BOUNDS = AttentionBounds(query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=50)
KINDS = [
    ("secure", "aes-256-ctr"),
    ("secure", "chacha20"),
    ("fast", "aes-256-ctr"),
    ("exact", "aes-256-ctr"),
    ("exact", "chacha20"),
]
# Blocks of 320 numbers: two independent ones correlate by more than 0.35 with probability 1e-10.
HEADS, QUERIES, WIDTH, ALIKE = 3, 40, 8, 0.35


@pytest.fixture(params=KINDS, ids=lambda kind: ", ".join(kind))
def make(request):
    name, cipher = request.param
    return lambda key, **changes: CallNoise(key, name=name, cipher=cipher, **changes)


def call(source, **changes):
    """A call whose exact answer is zero, so that its output is noise over σ, [B·H, numbers]."""
    rows = (
        torch.ones(2, HEADS, QUERIES, WIDTH),
        torch.ones(2, HEADS, 50, WIDTH),
        torch.zeros(2, HEADS, 50, WIDTH),
    )
    output, release = dp_flash_attention(*rows, bounds=BOUNDS, noise=source, **{"budget": BUDGET, **changes})
    return (output / release.plan.stddev.unsqueeze(-1)).flatten(0, 1).flatten(1), release


def alike(blocks):
    return float((torch.corrcoef(blocks) - torch.eye(len(blocks))).abs().max())


def test_a_key_and_a_number_give_the_same_bytes_and_nothing_is_given_twice(make):
    key = TestKey("contract")
    source = make(key)
    first, second = call(source)[0], call(source)[0]
    others = [call(make(key, rank=1))[0], call(make(TestKey("another")))[0]]
    assert torch.equal(first, call(make(key))[0])
    assert torch.equal(second, call(make(key), call_id=1)[0])
    assert alike(torch.cat([first, second, *others])) < ALIKE
    assert alike(torch.cat([first, call(make(key))[0]])) > 0.99  # repeated noise would be seen


def test_noise_has_the_planned_scale(make):
    """False-alarm rate 1e-7: the deviation of 9,600 numbers is known to 0.0072; ten percent less is seen."""
    found = torch.cat([call(make(TestKey(f"scale {number}")))[0] for number in range(5)])
    assert abs(float(found.std()) - 1.0) < 5.4 * 0.0072
    assert abs(0.9 * float(found.std()) - 1.0) > 5.4 * 0.0072


def test_threads_change_nothing(make):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(call(make(TestKey("threads")))[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_release_states_all_that_it_rests_on(make):
    _, release = call(make(SecretKey.from_os()))
    assert release.epsilon(BUDGET.delta) <= BUDGET.epsilon
    assert release.delta(BUDGET.epsilon) <= BUDGET.delta
    assert release.mu <= gdp_mu(BUDGET)
    assert (release.distance > 0.0) is (release.noise == "exact")
    assert any("stands for real numbers" in line for line in release.assumptions) is (
        release.noise != "exact"
    )
    assert any("cipher" in line or "key search" in line for line in release.assumptions)
    assert not release.uses_test_key
    assert call(make(TestKey("public")))[1].uses_test_key


def test_a_budget_over_many_calls_is_kept_and_a_refusal_costs_nothing(make):
    source, gate = make(TestKey("filter")), GaussianFilter(BUDGET, finite_precision_share=0.01)
    part = gate.share(2)
    for _ in range(2):
        call(source, budget=None, mu=part, privacy_filter=gate)
    with pytest.raises(BudgetExhaustedError, match="nothing was computed or spent"):
        call(source, budget=None, mu=part, privacy_filter=gate)
    with pytest.raises(NoiseReuseError):
        call(source, call_id=1)
    assert source.next_call == gate.num_releases == 2
