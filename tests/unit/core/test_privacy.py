from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import (
    Guarantee,
    NeighboringRelation,
    PrivacyBudget,
    PrivacyUnit,
    Sensitivity,
)

ADD_OR_REMOVE = NeighboringRelation.ADD_OR_REMOVE_ONE


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0.0, 1e-6), (-1.0, 1e-6), (float("inf"), 1e-6), (1.0, 0.0), (1.0, 1.0)]
)
def test_a_budget_that_bounds_nothing_is_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(InvalidInputError):
        PrivacyBudget(epsilon=epsilon, delta=delta)


@pytest.mark.parametrize("l2", [0.0, -1.0, float("nan"), float("inf")])
def test_an_unbounded_quantity_has_no_sensitivity(l2: float) -> None:
    with pytest.raises(InvalidInputError, match="clipping"):
        Sensitivity(l2=l2, neighboring_relation=ADD_OR_REMOVE)


def test_sensitivities_under_different_relations_differ() -> None:
    replace = NeighboringRelation.REPLACE_ONE
    assert Sensitivity(l2=1.0, neighboring_relation=ADD_OR_REMOVE) != Sensitivity(
        l2=1.0, neighboring_relation=replace
    )


def test_statements_cannot_be_changed_and_are_json_values() -> None:
    guarantee = Guarantee(
        neighboring_relation=ADD_OR_REMOVE,
        privacy_unit=PrivacyUnit.EXAMPLE,
        sensitivity="L2 norm 1",
        public=("C",),
        theorem="Gaussian mechanism",
        source="Dwork & Roth 2014, Theorem A.1",
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        guarantee.sensitivity = "none"  # type: ignore[misc]
    assert (
        json.loads(json.dumps(dataclasses.asdict(guarantee)))["neighboring_relation"] == "add_or_remove_one"
    )


def test_what_is_computed_from_a_float32_is_not_rounded_like_one():
    exact = float(np.float32(0.1))
    assert Sensitivity(l2=np.float32(0.1), neighboring_relation=ADD_OR_REMOVE).l2 == exact
    budget = PrivacyBudget(epsilon=np.float32(0.1), delta=np.float32(0.1))
    values = (budget.epsilon, budget.delta, Sensitivity(l2=3, neighboring_relation=ADD_OR_REMOVE).l2)
    assert [type(value) for value in values] == [float, float, float]
