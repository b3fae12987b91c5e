"""Exact attention noise on paper: what rounding adds to each row's sensitivity and to δ, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dp_flash_attention.accounting import discrete_gaussian_delta, gdp_delta, gdp_epsilon, gdp_mu
from dp_flash_attention.attention import AttentionBounds, CallNoise, Contexts, plan_attention_release
from dp_flash_attention.attention import finite_precision as room
from dp_flash_attention.attention import planning as planning_module
from dp_flash_attention.attention.finite_precision import grid_noise
from dp_flash_attention.attention.grid_noising import add_on_grid_into
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget
from dp_flash_attention.noise import TestKey

BUDGET = PrivacyBudget(epsilon=1.0, delta=1e-6)


def bounds(**changes):
    given = {"query_norm": 1.0, "key_norm": 1.0, "value_norm": 1.0, "num_rows": 1000, **changes}
    return AttentionBounds(**given)


def exact_plan(**changes):
    given = {"bounds": bounds(), "num_queries": 5, "query_width": 16, "budget": BUDGET, "noise": "exact"}
    given |= changes
    return plan_attention_release(given.pop("bounds"), **given)


def grids_of(plan):
    return plan.stddev.double() / plan.precision.steps


def on_grid(plan, outputs):
    """Whole numbers that the real code rounds outputs to, [B, H, Q, E]: what it writes less the noise it adds."""
    source = CallNoise(TestKey("grid"), name="exact")
    stream = replace(source.claim(), steps=plan.precision.steps)
    found = torch.empty_like(outputs)
    add_on_grid_into(found, outputs, plan.stddev, stream)
    drawn = grid_noise(plan.precision.steps).draw(stream.key, outputs.numel(), step=0, stream=0)
    return torch.round(found / grids_of(plan).unsqueeze(-1)) - torch.from_numpy(drawn).view(outputs.shape)


def neighbouring_outputs(plan):
    """Rows Δ apart whose every coordinate goes from just above a half down to just above the next: one more step each.

    Halves go to even, so a number of steps and a half is moved off the half by an eighth.
    """
    grid, width = grids_of(plan).unsqueeze(-1), plan.value_width
    steps = torch.from_numpy(plan.sensitivity.copy())[:, None, :, None] / math.sqrt(width) / grid
    # As far apart as Δ allows: a whole number of steps and an eighth, so that rounding moves both ends outwards.
    apart = torch.floor(steps - 0.125) + 0.125
    first = (0.4375 * grid).expand(*plan.stddev.shape, width)
    return first.double().contiguous(), (first + apart * grid).contiguous()


def moved_over_noise(plan):
    """How far the whole call's rounded outputs move between the neighbours, over the noise: must be at most μ."""
    first, second = neighbouring_outputs(plan)
    apart = (on_grid(plan, second) - on_grid(plan, first)).square().sum(-1)  # over each row
    exact = ((second - first) / grids_of(plan).unsqueeze(-1)).square().sum(-1)
    allowed = torch.from_numpy(plan.sensitivity.copy())[:, None, :] / grids_of(plan)
    assert bool((exact.sqrt() <= allowed).all())  # they are neighbours
    return math.sqrt(float(apart.sum())) / plan.precision.steps


# Steps that are coarse beside the noise: rounding counts for 1 part in 2^10 at most, and here for nearly that.
COARSE = {"num_queries": 700, "query_width": 64, "num_heads": 2}


def test_the_noise_covers_rounded_outputs_at_their_worst():
    plan = exact_plan(**COARSE)
    found = moved_over_noise(plan)
    assert 0.9995 * plan.mu < found <= plan.mu


def test_leaving_rounding_out_of_the_sensitivity_is_noticed(monkeypatch):
    original = planning_module.plan_grid

    def without(**settings):
        return replace(original(**settings), rounding=0.0)

    monkeypatch.setattr(planning_module, "plan_grid", without)
    plan = exact_plan(**COARSE)
    assert moved_over_noise(plan) > plan.mu


@pytest.mark.parametrize("contexts", list(Contexts))
def test_every_row_head_and_call_has_the_mu_that_is_claimed(contexts):
    plan = exact_plan(
        bounds=bounds(num_rows=3, contexts=contexts),
        num_queries=4,
        num_heads=3,
        batch_size=2,
        is_causal=True,
        head_importance=[1.0, 5.0, 100.0],
    )
    assert 0.0 < plan.precision.rounding <= 2.0**-10 * min(plan.head_mus)
    # Δ/σ is what continuous noise would cost; γ·√E/σ is the same for every row, whatever its σ.
    shares = (
        torch.from_numpy(plan.sensitivity.copy())[:, None, :] / plan.stddev.double()
        + math.sqrt(16) / plan.precision.steps
    )
    entries = shares.square() if contexts is Contexts.SHARED else shares[:1].square()
    per_head = entries.sum(dim=(0, 2)).sqrt()
    assert (per_head.numpy() <= np.array(plan.head_mus)).all()
    assert per_head.numpy() == pytest.approx(plan.head_mus, rel=1e-4)
    assert math.sqrt(float(per_head.square().sum())) <= plan.mu <= gdp_mu(BUDGET)


def test_the_grid_is_public_and_one_number_of_steps_serves_all_rows():
    causal = exact_plan(bounds=bounds(num_rows=4), is_causal=True, num_heads=2, head_importance=[1.0, 9.0])
    assert len(set(causal.stddev.flatten().tolist())) > 4
    assert math.frexp(causal.precision.steps)[0] == 0.5
    assert causal.precision.steps >= 2**20
    # A power of two below, rounding would count for more, or the two laws would be too far apart.
    half = exact_plan(**COARSE).precision
    assert half.steps > 2**20
    assert 2.0 * half.rounding > 2.0**-10 * min(exact_plan(**COARSE).head_mus) / math.sqrt(700)


def test_noise_is_that_of_normals_plus_what_finite_precision_costs():
    exact, real = exact_plan(), exact_plan(noise="secure")
    ratio = (exact.stddev / real.stddev).double()
    assert bool((ratio >= 1.0).all())
    assert float(ratio.max()) < 1.0 + 2.0**-9
    assert exact.epsilon(1e-6) <= 1.0
    assert exact.epsilon(1e-6) == pytest.approx(1.0, rel=1e-6)
    assert real.precision is None
    assert real.distance == 0.0


def test_every_term_is_taken_from_delta():
    plan = exact_plan()
    precision, numbers = plan.precision, 5 * 16
    one = grid_noise(precision.steps).total_variation
    assert precision.distance >= numbers * one
    assert precision.advantage >= 2.0**-126  # a key search of 2^64 sequential steps
    assert plan.distance >= precision.distance + precision.advantage
    ideal = gdp_mu(PrivacyBudget(epsilon=1.0, delta=1e-6 - (1 + math.e) * plan.distance))
    assert plan.mu <= ideal


def test_a_sampler_further_from_its_law_costs_more(monkeypatch):
    monkeypatch.setattr(room, "_LARGEST_DISTANCE", 1e-12)
    plan = exact_plan()
    assert plan.distance >= 80 * 1e-12
    delta = gdp_delta(mu=plan.mu, epsilon=1.0)
    assert 1e-6 * (1 - 1e-9) <= delta + (1 + math.e) * 80e-12 <= 1e-6
    assert plan.epsilon(1e-6) > gdp_epsilon(mu=plan.mu, delta=1e-6) * (1 + 1e-7)
    monkeypatch.setattr(room, "_LARGEST_DISTANCE", 1e-10)
    with pytest.raises(InvalidInputError, match=r"delta.*finite precision"):
        exact_plan()


def test_epsilon_is_that_of_the_discrete_gaussian():
    """One number: the integers have a discrete Gaussian law, whose δ the accountant computes by theorems of its own."""
    plan = exact_plan(num_queries=1, value_width=1)
    steps = plan.precision.steps
    sensitivity = float(plan.sensitivity[0, 0] / grids_of(plan)[0, 0, 0]) + 1.0 + 2.0**-6
    sigma = math.sqrt(grid_noise(steps).variance)
    theirs = discrete_gaussian_delta(epsilon=1.0, sigma=sigma, l2_sensitivity=sensitivity)
    assert theirs <= 1e-6
    # In units of the noise one step is 1e-6, so that flooring the sensitivity moves δ by less than 1e-4 of it.
    assert theirs == pytest.approx(1e-6, rel=1e-4)


def test_epsilon_is_that_of_dp_accounting():
    """The published accountant of discrete Gaussians, on a grid that it can still sum: its steps are 1/64 of the noise."""
    dp_accounting = pytest.importorskip("dp_accounting.pld.privacy_loss_mechanism")
    mu = gdp_mu(PrivacyBudget(epsilon=1.0, delta=1e-4))
    for steps in (64, 256):
        sensitivity = math.floor(mu * steps)
        theirs = dp_accounting.DiscreteGaussianPrivacyLoss(float(steps), sensitivity=sensitivity)
        ours = gdp_delta(mu=sensitivity / steps, epsilon=1.0)
        assert theirs.get_delta_for_epsilon(1.0) == pytest.approx(ours, rel=2.0 / steps)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"budget": PrivacyBudget(epsilon=1.0, delta=1e-24)}, "delta"),
        ({"budget": PrivacyBudget(epsilon=60.0, delta=1e-6)}, "delta"),
        ({"budget": None, "mu": 1e-10}, "mu of an output row"),
        (
            {"bounds": bounds(num_rows=10**12, rounding=None), "budget": None, "mu": 1.0},
            "value_norm over the noise",
        ),
    ],
    ids=["delta", "epsilon", "mu", "range"],
)
def test_what_finite_precision_cannot_carry_is_named(changes, named):
    with pytest.raises(InvalidInputError, match=f"^{named} is"):
        exact_plan(**changes)
    exact_plan(**changes | {"noise": "secure"})
