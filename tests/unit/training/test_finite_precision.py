"""Exact noise's grid: what rounding adds to the sensitivity and to δ, and what is refused."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dp_flash_attention.accounting import PoissonSampledGaussian, epsilon
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.training import PrivacyPlan
from dp_flash_attention.training import finite_precision as room
from dp_flash_attention.training import plan as plan_module
from dp_flash_attention.training.finite_precision import MIN_STDDEV
from dp_flash_attention.training.step_noise import round_to_steps

BUDGET: dict[str, Any] = {
    "epsilon": 2.0,
    "delta": 1e-6,
    "expected_batch_size": 64,
    "num_steps": 100,
    "l2_clip_norm": 0.7,
    "dataset_size": 6400,
}


def exact_plan(**changes: Any) -> PrivacyPlan:
    return PrivacyPlan.for_budget(**(BUDGET | {"noise": "exact", "num_parameters": 10**6} | changes))


# Neighbouring sums at their worst: every coordinate moves by an odd number of steps from half a step to half a step, and
# halves are rounded to even, so that each moves by one step more.
ODD, WORST_COUNT = 24577, 2**20
WORST: dict[str, Any] = {"l2_clip_norm": ODD * 2.0**-15, "num_parameters": WORST_COUNT}


def noise_covers_rounded_sums(plan: PrivacyPlan) -> bool:
    """Whether the accountant's multiplier times how far rounded neighbours are apart is at most the noise."""
    assert plan.finite_precision is not None
    grid = plan.finite_precision.grid
    first = torch.full((WORST_COUNT,), 0.5 * grid, dtype=torch.float64)
    second = first + ODD * grid
    assert float((second - first).norm()) == plan.l2_clip_norm
    moved = round_to_steps(second, grid) - round_to_steps(first, grid)
    assert float(moved.min()) == ODD + 1
    return plan.event.noise_multiplier * float(moved.norm()) <= plan.finite_precision.stddev


def test_the_accounted_multiplier_covers_rounding_at_its_worst() -> None:
    assert noise_covers_rounded_sums(exact_plan(**WORST))


def test_leaving_rounding_out_of_the_sensitivity_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = room.finite_precision

    def without(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        return None if found is None else replace(found, sensitivity_factor=1.0)

    monkeypatch.setattr(plan_module, "finite_precision", without)
    assert not noise_covers_rounded_sums(exact_plan(**WORST))


def test_epsilon_is_that_of_continuous_noise_within_finite_precision() -> None:
    ideal, exact = PrivacyPlan.for_budget(**BUDGET), exact_plan()
    precision = exact.finite_precision
    assert precision is not None
    # γ√P/C at this P; what finite precision takes from δ is too little to move the search.
    share = precision.sensitivity_factor - 1.0
    assert 1e-5 < share < 2e-4
    assert exact.noise_multiplier / ideal.noise_multiplier == pytest.approx(1.0 + share, rel=1e-9)
    same = PoissonSampledGaussian(
        sampling_prob=0.01, noise_multiplier=exact.noise_multiplier / (1.0 + share), num_steps=100
    )
    assert exact.accounted_epsilon == pytest.approx(epsilon(same, delta=1e-6), rel=1e-9)
    assert exact.accounted_epsilon >= epsilon(same, delta=1e-6)


def test_every_term_is_taken_from_delta() -> None:
    plan = exact_plan()
    precision = plan.finite_precision
    assert precision is not None
    assert precision.delta >= (1.0 + math.exp(2.0)) * (precision.distance + precision.advantage)
    assert plan.accounted_delta + precision.delta == pytest.approx(1e-6, rel=1e-12)
    assert plan.accounted_delta < plan.delta
    twice = exact_plan(num_steps=200).finite_precision
    assert twice is not None
    assert twice.distance == pytest.approx(2.0 * precision.distance)


@pytest.mark.parametrize("num_parameters", [1, 100, 10**6, 10**9, 10**11])
def test_the_grid_is_public_fine_and_a_power_of_two(num_parameters: int) -> None:
    precision = exact_plan(num_parameters=num_parameters).finite_precision
    assert precision is not None
    assert math.frexp(precision.grid)[0] == 0.5
    assert precision.sensitivity_factor <= 1.0 + 2.0**-10 + 1e-12
    assert precision.stddev >= MIN_STDDEV
    # The next wider power of two would break one of the two bounds.
    steps = 0.7 / (2.0 * precision.grid)
    assert steps <= 2.0**24 or math.sqrt(num_parameters) / steps > 2.0**-10


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_parameters": None}, "num_parameters"),
        ({"num_parameters": 0}, "num_parameters"),
        ({"num_parameters": 1.5}, "num_parameters"),
        ({"noise": "secure"}, "num_parameters"),
        ({"noise": "fast"}, "num_parameters"),
        ({"delta": 1e-18}, "delta"),
        ({"epsilon": 40.0}, "delta"),
        ({"epsilon": 5000.0}, "delta"),
        ({"l2_clip_norm": 1e-200}, "l2_clip_norm"),
    ],
)
def test_what_finite_precision_cannot_carry_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{named} is"):
        exact_plan(**changes)


def test_noise_too_narrow_for_its_grid_is_refused() -> None:
    plan = exact_plan()
    with pytest.raises(InvalidInputError, match=r"noise_multiplier .* grid is too coarse"):
        replace(plan, noise_multiplier=0.03)


def test_a_plan_comes_back_from_json_and_is_computed_again() -> None:
    plan = exact_plan()
    values = json.loads(json.dumps(plan.to_dict()))
    again = PrivacyPlan.from_dict(values)
    assert again == plan
    assert again.finite_precision == plan.finite_precision
    with pytest.raises(InvalidInputError, match="epsilon"):
        # So many coordinates need a wider grid, whose rounding this noise does not cover.
        PrivacyPlan.from_dict(values | {"num_parameters": 10**12})
    with pytest.raises(InvalidInputError, match="num_parameters"):
        PrivacyPlan.from_dict({name: value for name, value in values.items() if name != "num_parameters"})
