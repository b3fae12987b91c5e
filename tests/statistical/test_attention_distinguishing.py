"""An observer who knows both contexts of the worst pair tells them apart no better than certified, and no worse.

Every context is asked the same question a million times in one call, whose budget is a million times one answer's: so
each answer alone has the certified μ, and there are as many independent answers from either world. Keys are fixed, so
nothing flickers. Bounds on error rates are Clopper & Pearson's at 1 − ALARM/2 each.
"""

import math

import pytest
import torch
from scipy import stats

from dp_flash_attention.accounting import gdp_mu
from dp_flash_attention.attention import AttentionBounds, CallNoise, dp_flash_attention
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget
from dp_flash_attention.noise import TestKey

NUM = 1_000_000
ALARM = 1e-6
"""False-alarm rate of each comparison over the choice of the key."""

R, S, ROWS, WIDTH = 1.0, 0.5, 6, 2
BUDGET = PrivacyBudget(epsilon=1.0, delta=1e-5)


def worst_pair(removes):
    """One query, and the context's rows before and after: the record first, at +S against a rest at −S."""
    direction = torch.tensor([1.0, 0.0])
    query = direction.clone()
    keys = torch.stack([direction, *[-direction] * (ROWS - 1)])
    values = torch.stack([direction, *[-direction] * (ROWS - 1)])
    if removes:
        return query, (keys[:2], values[:2]), (keys[1:2], values[1:2])
    return query, (keys, values), (keys, torch.cat([-values[:1], values[1:]]))


def observed(world, *, removes, label, kind, noise_factor=1.0):
    """Returns NUM outputs projected on the direction in which the worlds differ, float64."""
    query, *worlds = worst_pair(removes)
    keys, values = worlds[world]
    bounds = AttentionBounds(
        query_norm=1.0,
        key_norm=1.0,
        value_norm=R,
        num_rows=None if removes else ROWS,
        null_rows=1.0 if removes else 0.0,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE
        if removes
        else NeighboringRelation.REPLACE_ONE,
        rounding=None,
    )
    # A mechanism whose noise is too small by noise_factor is one that believes its μ to be as much larger.
    output, _ = dp_flash_attention(
        query.expand(1, 1, NUM, WIDTH),
        keys[None, None],
        values[None, None],
        bounds=bounds,
        noise=CallNoise(TestKey(label), name=kind),
        mu=math.sqrt(NUM) * gdp_mu(BUDGET) / noise_factor,
        scale=S,
    )
    return output[0, 0, :, 0].double()


def measured_mu(first, second, confidence=1.0 - ALARM):
    """A lower bound of μ from one threshold test, with simultaneous confidence: Φ⁻¹(1 − α⁺) − Φ⁻¹(β⁺)."""
    half = len(first) // 2
    threshold = (
        float(first[:half].mean() + second[:half].mean()) / 2
    )  # chosen on one half, judged on the other
    sign = 1.0 if first[:half].mean() > second[:half].mean() else -1.0
    false_positives = int((sign * (second[half:] - threshold) > 0).sum())
    misses = int((sign * (first[half:] - threshold) <= 0).sum())
    above = [
        stats.beta.ppf(1.0 - (1.0 - confidence) / 2, count + 1, half - count)
        for count in (false_positives, misses)
    ]
    return stats.norm.ppf(1.0 - above[0]) - stats.norm.ppf(above[1])


@pytest.mark.parametrize("kind", ["secure", "exact"])
@pytest.mark.parametrize("removes", [False, True], ids=["replace one", "remove one"])
def test_the_attack_stays_within_what_is_certified_and_sees_noise_that_is_too_small(removes, kind):
    # Exact noise costs a thousandth of μ, which goes to rounding: too little to be seen here.
    certified, settings = gdp_mu(BUDGET), {"removes": removes, "kind": kind}
    first, second = (observed(world, label=f"world {world}", **settings) for world in (0, 1))
    found = measured_mu(first, second)
    # An attack that found nothing would prove nothing: its confidence costs it 0.02, and the pair is the worst.
    assert 0.9 * certified < found <= certified
    bound = certified + stats.norm.isf(ALARM) * math.sqrt(2.0 / NUM)
    assert separation(first, second) <= bound
    weak = [observed(world, label=f"world {world}", noise_factor=0.9, **settings) for world in (0, 1)]
    assert measured_mu(*weak) > certified
    assert separation(*weak) > bound


def separation(first, second):
    """Estimate of μ: distance of the means over the standard deviation; its own deviation is sqrt(2/NUM) = 0.0014."""
    pooled = torch.cat([first - first.mean(), second - second.mean()]).std()
    return abs(float((first.mean() - second.mean()) / pooled))
