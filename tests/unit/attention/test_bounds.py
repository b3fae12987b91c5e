"""Promises out of range."""

import math

import pytest

from dp_flash_attention.attention import AttentionBounds
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation

REMOVAL = NeighboringRelation.ADD_OR_REMOVE_ONE


def bounds(**changes):
    given = {"query_norm": 2.0, "key_norm": 2.0, "value_norm": 1.5, "num_rows": 33, **changes}
    return AttentionBounds(**given)


@pytest.mark.parametrize("changes", [{"query_norm": 0.0}, {"key_norm": -1.0}, {"value_norm": math.inf}, {"value_norm": math.nan},
    {"num_rows": None}, {"num_rows": 0}, {"num_rows": ()}, {"max_rows_per_record": 0}, {"null_rows": -1.0},
    {"null_rows": math.nan}, {"contexts": "shared "}, {"rounding": "none"}, {"neighboring_relation": "replace_one"},
    {"neighboring_relation": REMOVAL}, {"neighboring_relation": REMOVAL, "num_rows": None}])  # fmt: skip
def test_bounds_out_of_range_are_refused(changes):
    with pytest.raises(InvalidInputError):
        bounds(**changes)
