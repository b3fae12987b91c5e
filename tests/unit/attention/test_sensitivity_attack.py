"""An attacker climbs the gradient over neighbouring contexts: the sensitivity is reached, and never exceeded.

The attacker chooses everything: public queries, all rows, the changed record. Its objective is the mechanism itself
(rows are clipped, heads share rows), in float64, and its score is the joint sqrt(Σ ‖o − o'‖²/Δ²) over queries and heads,
which is what μ is computed from; 1 means the whole sensitivity.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from dp_flash_attention.attention.bounds import AttentionBounds
from dp_flash_attention.attention.planning import plan_attention_release
from dp_flash_attention.attention.rows import clip_rows
from dp_flash_attention.core.privacy import NeighboringRelation

RESTARTS = 32
STEPS = 300
KEY, QUERY, VALUE, SCALE = 1.5, 1.25, 2.0, 0.4
S = KEY * QUERY * SCALE
REACHED, EXCEEDED = 0.99, 1.0 + 1e-9


@dataclass(frozen=True)
class World:
    """What the attacker may choose freely: rows of both contexts, of which the record's differ."""

    num_queries: int = 1
    heads: int = 1
    groups: int = 1
    rest: int = 6
    own: int = 1
    null_rows: float = 0.0
    causal: bool = False
    removes: bool = False


def attention(query, key, value, world, *, hidden=0):
    """[R, H, Q, D], [R, G, K, D], [R, G, K, E] to [R, H, Q, E]; the first ``hidden`` rows are not seen."""
    group = world.heads // world.groups
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = SCALE * query @ key.mT
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if world.causal:
        seen = seen.tril()
    seen = seen.clone()
    seen[:, :hidden] = False
    weights = torch.exp(scores) * seen
    return weights @ value / (weights.sum(-1, keepdim=True) + world.null_rows).clamp_min(1e-300)


def climb(world, sensitivity, *, clip_value=clip_rows, steps=STEPS):
    """Returns the largest sqrt(Σ ‖o − o'‖²/Δ²)/sqrt(number of outputs) that gradient ascent finds."""
    width = 3

    def free(heads, rows):
        return torch.randn(RESTARTS, heads, rows, width, dtype=torch.float64).mul_(3.0).requires_grad_()

    query = free(world.heads, world.num_queries)
    rest_key, rest_value = free(world.groups, world.rest), free(world.groups, world.rest)
    own = [free(world.groups, world.own) for _ in range(4)]
    optimizer = torch.optim.Adam([query, rest_key, rest_value, *own], lr=0.1)
    delta = torch.tensor(sensitivity)[None, None, :, None]
    best = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1.0 - step / steps) + 1e-3
        key = [clip_rows(torch.cat([rows, rest_key], 2), KEY) for rows in own[:2]]
        value = [clip_value(torch.cat([rows, rest_value], 2), VALUE) for rows in own[2:]]
        asked = clip_rows(query, QUERY)
        first = attention(asked, key[0], value[0], world)
        if world.removes:
            second = attention(asked, key[0], value[0], world, hidden=world.own)
        else:
            second = attention(asked, key[1], value[1], world)
        share = ((first - second) / delta).square().sum((1, 2, 3)) / (world.heads * world.num_queries)
        best = max(best, float(share.detach().max().sqrt()))
        optimizer.zero_grad()
        (-share.sum()).backward()
        optimizer.step()
    return best


def planned(world, *, num_rows=None, record_rows=None, null_rows=None, causal=None):
    relation = NeighboringRelation.ADD_OR_REMOVE_ONE if world.removes else NeighboringRelation.REPLACE_ONE
    bounds = AttentionBounds(
        query_norm=QUERY,
        key_norm=KEY,
        value_norm=VALUE,
        num_rows=None if world.removes else (num_rows or world.rest + world.own),
        max_rows_per_record=record_rows or world.own,
        null_rows=world.null_rows if null_rows is None else null_rows,
        neighboring_relation=relation,
        rounding=None,
    )
    plan = plan_attention_release(
        bounds,
        num_queries=world.num_queries,
        query_width=3,
        num_heads=world.heads,
        scale=SCALE,
        is_causal=world.causal if causal is None else causal,
        mu=1.0,
    )
    return plan.sensitivity[0]


WORLDS = {
    "replace one": World(),
    "replace one among many": World(rest=40),
    "replace the only row": World(rest=0),
    "replace one beside null rows": World(rest=3, null_rows=2.5),
    "replace a group": World(rest=6, own=3),
    "replace one, causal": World(rest=5, num_queries=6, causal=True),
    "replace a group, causal": World(rest=4, own=2, num_queries=6, causal=True),
    "replace one, grouped heads": World(heads=4, groups=2, rest=4, num_queries=2),
    "remove one of two": World(rest=1, null_rows=3.0, removes=True),
    "remove one of many": World(rest=6, null_rows=3.0, removes=True),
    "remove one, few null rows": World(rest=3, null_rows=0.3, removes=True),
    "remove a group": World(rest=3, own=2, null_rows=3.0, removes=True),
    "remove one, causal": World(rest=3, num_queries=4, null_rows=3.0, removes=True, causal=True),
    "remove one, grouped heads": World(heads=2, groups=1, rest=2, num_queries=2, null_rows=3.0, removes=True),
}


def attack(world, sensitivity, **how):
    """The best of ``climb``; where the number of rows is private, the attacker chooses that too."""
    if not world.removes:
        return climb(world, sensitivity, **how)
    return max(climb(replace(world, rest=rest), sensitivity, **how) for rest in {0, 1, 2, world.rest})


@pytest.mark.parametrize("name", WORLDS)
def test_the_sensitivity_is_reached_and_never_exceeded(name):
    world = WORLDS[name]
    assert REACHED <= attack(world, planned(world)) <= EXCEEDED


def unclipped(rows, threshold):
    return rows


@pytest.mark.parametrize(
    ("name", "assumed", "how"),
    [
        ("replace one", {}, {"clip_value": unclipped}),
        ("replace one", {"num_rows": 8}, {}),
        ("replace one among many", {"num_rows": 42}, {}),
        ("replace one beside null rows", {"null_rows": 3.5}, {}),
        ("replace a group", {"record_rows": 2}, {}),
        ("replace one, causal", {"causal": False}, {}),
        ("remove one of two", {"null_rows": 4.0}, {}),
        ("remove a group", {"record_rows": 1}, {}),
    ],
    ids=[
        "values are not clipped",
        "one row more is assumed",
        "one row more is assumed, among many",
        "one null row more is assumed",
        "a group is taken for smaller",
        "the causal mask is forgotten",
        "one null row more is assumed, under removal",
        "a group is taken for one row, under removal",
    ],
)
def test_the_attack_notices_what_is_wrong(name, assumed, how):
    world = WORLDS[name]
    assert attack(world, planned(world, **assumed), steps=150, **how) > 1.002
