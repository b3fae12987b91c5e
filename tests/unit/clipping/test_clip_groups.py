"""Partitions and their bounds: the squares of the bounds add up to C², whatever the groups."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dp_flash_attention.clipping import ClippedGradientAccumulator
from dp_flash_attention.clipping.clip_groups import ClipGroup, bounded_groups, checked_clipping, read_groups
from dp_flash_attention.core.errors import InvalidInputError


class Tied(nn.Module):
    """A root with a parameter of its own; embedding and head share one, the frozen map has none."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(1, 3))
        self.embedding = nn.Embedding(5, 3)
        self.body = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight


def test_there_is_one_group_for_each_module_and_tied_modules_are_one() -> None:
    found = bounded_groups(Tied(), l2_clip_norm=2.0, clipping="per_layer")
    assert {group.name: group.parameters for group in found.groups} == {
        "Tied": ("start",),
        "embedding": ("embedding.weight", "head.bias"),
        "body.0": ("body.0.weight", "body.0.bias"),
        "body.1": ("body.1.weight", "body.1.bias"),
    }
    assert found.l2_clip_norms == pytest.approx((1.0,) * 4)


def test_flat_is_one_group_of_everything_with_the_whole_bound() -> None:
    found = bounded_groups(Tied(), l2_clip_norm=2.0)
    assert found.l2_clip_norms == (2.0,)
    assert len(found.groups[0].parameters) == 7


@given(
    l2_clip_norm=st.floats(1e-3, 1e3),
    weights=st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4),
)
def test_squares_of_the_bounds_add_up_to_the_square_of_the_whole(
    l2_clip_norm: float, weights: list[float]
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    names = [name for name, _ in model.named_parameters()]
    groups = [
        ClipGroup(name=name, parameters=(name,), weight=weight)
        for name, weight in zip(names, weights, strict=True)
    ]
    found = bounded_groups(model, l2_clip_norm=l2_clip_norm, clipping="per_layer", groups=groups)
    assert math.hypot(*found.l2_clip_norms) == pytest.approx(l2_clip_norm, rel=1e-14)
    shares = [bound / weight for bound, weight in zip(found.l2_clip_norms, weights, strict=True)]
    assert shares == pytest.approx([shares[0]] * 4)
    accumulator = ClippedGradientAccumulator(
        model, l2_clip_norm=l2_clip_norm, clipping="per_layer", clip_groups=groups
    )
    assert accumulator.sensitivity.l2 == l2_clip_norm


def test_groups_come_back_from_json() -> None:
    groups = (ClipGroup(name="a", parameters=("x", "y"), weight=2.0),)
    assert read_groups(json.loads(json.dumps([asdict(group) for group in groups]))) == groups
    assert read_groups(None) is None


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([("0.weight",), ("0.bias",)], "in none"),
        ([("0.weight", "0.bias"), ("1.weight", "1.bias", "0.bias")], "each parameter in one group"),
        ([("0.weight", "0.bias"), ("1.weight", "1.bias", "2.bias")], "names of trainable parameters"),
    ],
)
def test_what_is_no_partition_is_refused(parts: list[tuple[str, ...]], said: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [ClipGroup(name=str(k), parameters=names) for k, names in enumerate(parts)]
    with pytest.raises(InvalidInputError, match=said):
        bounded_groups(model, l2_clip_norm=1.0, clipping="per_layer", groups=groups)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), "1"])
def test_a_weight_that_is_no_share_is_refused(weight: Any) -> None:
    with pytest.raises(InvalidInputError, match="weight of group 'a'"):
        ClipGroup(name="a", parameters=("x",), weight=weight)


@pytest.mark.parametrize("parameters", [(), "weight"])
def test_a_group_without_a_list_of_names_is_refused(parameters: Any) -> None:
    with pytest.raises(InvalidInputError, match="parameters of group 'a'"):
        ClipGroup(name="a", parameters=parameters)


def test_unknown_kinds_and_groups_for_flat_clipping_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="'flat' or 'per_layer'"):
        checked_clipping("per_row", None)
    with pytest.raises(InvalidInputError, match="left out with clipping 'flat'"):
        checked_clipping("flat", [ClipGroup(name="a", parameters=("x",))])
