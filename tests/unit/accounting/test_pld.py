"""Corners of the certified bound; published figures and closed forms are in ``test_accountant.py``."""

from __future__ import annotations

import math

import pytest

from dp_flash_attention.accounting import GaussianRelease, PoissonSampledGaussian
from dp_flash_attention.accounting.pld import COARSE_GRID_POINTS, pld_delta, pld_epsilon
from dp_flash_attention.accounting.rdp import rdp_epsilon
from dp_flash_attention.core.privacy import NeighboringRelation


def sampled(**changes: object) -> PoissonSampledGaussian:
    values: dict[str, object] = {"sampling_prob": 0.01, "noise_multiplier": 1.0, "num_steps": 200}
    return PoissonSampledGaussian(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [1e-15, 1e-40, 1e-300])
def test_a_delta_below_the_rounding_error_still_has_a_sound_bound(delta: float) -> None:
    event = sampled()
    value = pld_epsilon((event,), delta)
    assert value >= pld_epsilon((event,), 1e-10)
    assert value >= 0.99 * rdp_epsilon((event,), 1e-10)
    assert math.isfinite(value)


def test_a_coarser_grid_is_looser_and_never_tighter() -> None:
    for event in (sampled(), sampled(sampling_prob=0.3, num_steps=5), sampled(noise_multiplier=0.5)):
        fine, coarse = (
            pld_epsilon((event,), 1e-6),
            pld_epsilon((event,), 1e-6, grid_points=COARSE_GRID_POINTS),
        )
        assert fine * (1 - 1e-6) <= coarse <= 1.05 * fine


def test_order_and_grouping_of_events_do_not_matter() -> None:
    first, second = sampled(num_steps=50), GaussianRelease(noise_multiplier=8.0)
    whole = pld_epsilon((first, second), 1e-6)
    assert pld_epsilon((second, first), 1e-6) == pytest.approx(whole, rel=1e-6)
    halves = (sampled(num_steps=25), sampled(num_steps=25), second)
    assert pld_epsilon(halves, 1e-6) == pytest.approx(whole, rel=1e-3)
    assert whole > max(pld_epsilon((first,), 1e-6), pld_epsilon((second,), 1e-6))


def test_delta_at_epsilon_is_the_inverse() -> None:
    event = sampled()
    value = pld_epsilon((event,), 1e-6)
    assert pld_delta((event,), value) == pytest.approx(1e-6, rel=1e-3)
    assert pld_delta((event,), value + 0.5) < 1e-6 < pld_delta((event,), value - 0.1)


def test_replacing_a_record_costs_more_than_adding_one() -> None:
    add = pld_epsilon((sampled(),), 1e-6)
    replace = pld_epsilon((sampled(neighboring_relation=NeighboringRelation.REPLACE_ONE),), 1e-6)
    assert add < replace
