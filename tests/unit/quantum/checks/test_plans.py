"""The checks of planned noise hold, and fail for plans that add too little."""

import pytest

from dp_flash_attention.quantum import gaussian_plan, layered_plan
from dp_flash_attention.quantum.checks import plans
from dp_flash_attention.quantum.evidence import run_checks


@pytest.fixture(autouse=True)
def no_plan_is_kept():
    for planned in (gaussian_plan.plan_gaussian, layered_plan.plan_layered):
        planned.cache_clear()
    yield
    for planned in (gaussian_plan.plan_gaussian, layered_plan.plan_layered):
        planned.cache_clear()


def test_they_hold():
    assert all(result.holds for result in run_checks(plans.plans_checks()))


def test_five_percent_less_noise_is_found(monkeypatch):
    sigma = gaussian_plan.discrete_gaussian_sigma
    monkeypatch.setattr(gaussian_plan, "discrete_gaussian_sigma", lambda **given: 0.95 * sigma(**given))
    assert not any(row.holds for row in plans.gaussian_plans())


def test_rounding_left_out_is_found(monkeypatch):
    monkeypatch.setattr(gaussian_plan, "sensitivity_on_grid", lambda l2, grid, d, *, whole: l2 / grid)
    assert [row.holds for row in plans.gaussian_plans()] == [True, True, False] * 2


def test_shares_of_all_parties_instead_of_the_honest_ones_are_found(monkeypatch):
    rounded_up = layered_plan._rounded_up
    monkeypatch.setattr(layered_plan, "_rounded_up", lambda variance: rounded_up(variance * 3 / 5))
    assert not any(row.holds for row in plans.layered_plans())


def test_a_skellam_bound_of_another_variance_is_found(monkeypatch):
    """The ε of a plan's layers comes from the same function as the plan, and could not see it."""
    variance = layered_plan.skellam_variance
    monkeypatch.setattr(layered_plan, "skellam_variance", lambda **given: variance(**given) / 2)
    assert [row.holds for row in plans.layered_plans()] == [False, True] * 2
