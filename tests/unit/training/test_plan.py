from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest

from dp_flash_attention.clipping.clip_groups import ClipGroup
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation
from dp_flash_attention.training import PrivacyPlan

PLAN = PrivacyPlan(
    epsilon=60.0,
    delta=1e-3,
    sampling_prob=0.2,
    expected_batch_size=10.0,
    num_steps=5,
    l2_clip_norm=0.5,
    noise_multiplier=1.0,
    accountant="rdp",
)
BUDGET: dict[str, Any] = {
    "epsilon": 2.0,
    "delta": 1e-5,
    "expected_batch_size": 64,
    "num_steps": 10,
    "l2_clip_norm": 1.0,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", 0.0),
        ("epsilon", 1e-3),
        ("delta", 0.0),
        ("delta", 0.5),
        ("sampling_prob", 0.0),
        ("sampling_prob", 1.1),
        ("expected_batch_size", 0.0),
        ("num_steps", 0),
        ("num_steps", 2.0),
        ("num_steps", 10**6),
        ("l2_clip_norm", float("inf")),
        ("noise_multiplier", 0.0),
        ("noise_multiplier", 1e-2),
        ("noise", "none"),
        ("accountant", "guess"),
        ("dataset_size", 0),
        ("dataset_size", 10**6),
    ],
)
def test_a_plan_whose_claim_does_not_hold_does_not_exist(name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError):
        replace(PLAN, **{name: value})


def test_the_plan_states_what_noise_is_released() -> None:
    assert PLAN.release_stddev == pytest.approx(1.0 * 0.5 / 10.0)
    assert PLAN.sensitivity.l2 == 0.5
    assert PLAN.sensitivity.neighboring_relation is NeighboringRelation.ADD_OR_REMOVE_ONE


def test_epsilon_grows_with_the_steps_and_never_passes_the_claim() -> None:
    spent = [PLAN.epsilon_after(step) for step in range(6)]
    assert spent[0] == 0.0
    assert all(low < high for low, high in itertools.pairwise(spent))
    assert spent[-1] == PLAN.accounted_epsilon <= PLAN.epsilon
    for count in (-1, 6, 2.0):
        with pytest.raises(InvalidInputError, match="num_steps"):
            PLAN.epsilon_after(count)  # type: ignore[arg-type]


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_a_calibrated_plan_spends_nearly_all_and_not_more(accountant: Any) -> None:
    plan = PrivacyPlan.for_budget(**BUDGET, dataset_size=6400, accountant=accountant)
    assert plan.sampling_prob == 0.01
    assert 0.999 * 2.0 < plan.accounted_epsilon <= 2.0
    schedule = plan.epsilon_schedule()
    assert all(schedule(step) >= plan.epsilon_after(step) * (1 - 1e-12) for step in range(11))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "sampling_prob"),
        ({"dataset_size": 32}, "expected_batch_size"),
        ({"dataset_size": 200_000}, "delta"),
        ({"dataset_size": 6400, "delta": 1.5}, "delta"),
        ({"sampling_prob": 2.0}, "sampling_prob"),
        ({"dataset_size": 6400, "expected_batch_size": -1}, "expected_batch_size"),
    ],
)
def test_a_budget_that_does_not_fit_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{named} is"):
        PrivacyPlan.for_budget(**(BUDGET | changes))


def test_a_plan_comes_back_from_json_and_is_checked_again() -> None:
    values = json.loads(json.dumps(PLAN.to_dict()))
    assert PrivacyPlan.from_dict(values) == PLAN
    with pytest.raises(InvalidInputError, match="epsilon"):
        PrivacyPlan.from_dict(values | {"noise_multiplier": 0.3, "epsilon": 1.0})
    with pytest.raises(InvalidInputError, match="sigma"):
        PrivacyPlan.from_dict(values | {"sigma": 1.0})
    del values["delta"]
    with pytest.raises(InvalidInputError, match="delta"):
        PrivacyPlan.from_dict(values)


def test_the_source_names_the_accountant_that_was_used() -> None:
    assert "Mironov" in PLAN.guarantee.source
    assert "Koskela" in replace(PLAN, accountant="pld").guarantee.source


GROUPS = (ClipGroup(name="a", parameters=("w", "v"), weight=2.0), ClipGroup(name="b", parameters=("u",)))


def test_the_kind_of_clipping_is_part_of_the_plan_and_of_what_it_states() -> None:
    plan = replace(PLAN, clipping="per_layer", clip_groups=GROUPS)
    assert plan != PLAN
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["clipping"] == "per_layer"
    assert PrivacyPlan.from_dict(values) == plan
    assert (plan.sensitivity, plan.event, plan.release_stddev) == (
        PLAN.sensitivity,
        PLAN.event,
        PLAN.release_stddev,
    ), "the squares of the bounds add up to C²"
    assert "squares of the bounds" in plan.guarantee.sensitivity
    assert "squares of the bounds" not in PLAN.guarantee.sensitivity
    assert {"clipping", "clip_groups"} <= set(plan.guarantee.public)


def test_a_plan_of_before_there_were_kinds_is_flat() -> None:
    values = PLAN.to_dict()
    assert values.pop("clipping") == "flat"
    assert PrivacyPlan.from_dict(values) == PLAN


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"clipping": "per_row"}, "clipping"), ({"clip_groups": GROUPS}, "clip_groups")],
)
def test_an_unknown_kind_and_groups_for_flat_clipping_are_refused(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidInputError, match=f"^{named} is"):
        replace(PLAN, **changes)
    with pytest.raises(InvalidInputError, match=f"^{named} is"):
        PrivacyPlan.for_budget(**(BUDGET | {"sampling_prob": 0.01} | changes))
