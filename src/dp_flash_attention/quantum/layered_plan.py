"""How much noise each of several parties adds, and what is left when some of them fail. Public numbers alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from dp_flash_attention.accounting import (
    discrete_gaussian_sigma,
    skellam_epsilon,
    skellam_variance,
    summed_discrete_gaussian_delta,
    summed_discrete_gaussian_rho,
)
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget
from dp_flash_attention.quantum.exact_noise import ExactNoise, noise_for, skellam_noise_for
from dp_flash_attention.quantum.grid import checked_grid, default_grid, sensitivity_on_grid
from dp_flash_attention.quantum.interface import DeltaParts, Layer
from dp_flash_attention.quantum.values import MAX_MAGNITUDE

NoiseLaw = Literal["skellam", "discrete_gaussian"]
_VARIANCE_BITS = 16
# So that the parts of δ, added in floating point, never exceed the budget.
_HEADROOM = 1.0 - 1e-12
# 128-bit tables of up to 10^6 entries are within 2^-107 of their law.
_MAX_DISTANCE = 2.0**-100
# More noise than this only to make a bound hold means that the grid was chosen badly.
_MAX_CLOSENESS_PRICE = 1.1


@dataclass(frozen=True, kw_only=True)
class LayeredPlan:
    """What each party adds. Public; every party computes the same.

    Attributes:
        law: Of each party's noise.
        num_parties: n.
        num_honest: h, how many honest survivors the budget needs.
        dimension: d.
        grid: γ, in the value's unit.
        l2_sensitivity: Of the sum, in its own unit.
        grid_sensitivity: Of the sum of rounded rows, in units of the grid.
        share_variance: Of each party's noise in units of the grid squared: the whole over h, not over n.
        budget: What h honest survivors guarantee.
        delta: δ by origin, for h honest survivors.
        rho: ρ for h honest survivors; None for Skellam, whose theorem covers whole orders only.
    """

    law: NoiseLaw
    num_parties: int
    num_honest: int
    dimension: int
    grid: float
    l2_sensitivity: float
    grid_sensitivity: float
    share_variance: Fraction
    budget: PrivacyBudget
    delta: DeltaParts
    rho: float | None

    def layer(self, fails: str, num_shares: int) -> Layer:
        """Returns what ``num_shares`` shares of noise guarantee when the rest is known to the attacker."""
        finite = self.delta.sampler + self.delta.generator
        epsilon = _epsilon(
            self.law,
            float(self.share_variance),
            num_shares,
            self.grid_sensitivity,
            self.dimension,
            self.budget.delta - finite,
        )
        return Layer(
            fails=fails,
            epsilon=epsilon,
            delta=self.budget.delta,
            noise_stddev=math.sqrt(num_shares * float(self.share_variance)) * self.grid,
        )


@lru_cache(maxsize=64)
def plan_layered(
    *,
    law: NoiseLaw,
    num_parties: int,
    num_honest: int,
    dimension: int,
    l2_sensitivity: float,
    budget: PrivacyBudget,
    grid: float | None,
    advantage: float,
) -> LayeredPlan:
    """Returns the plan with the least noise for which any ``num_honest`` honest shares meet the budget.

    Raises:
        InvalidInputError: If the grid is too coarse for the sensitivity or for the closeness bound of summed discrete
            Gaussians, too fine for the tables, or no noise can meet the budget.
    """
    gamma = default_grid(l2_sensitivity, dimension, whole=False) if grid is None else grid
    gamma = checked_grid(gamma, l2_sensitivity, dimension, whole=False)
    moved = sensitivity_on_grid(l2_sensitivity, gamma, dimension, whole=False)
    factor = 1.0 + math.exp(budget.epsilon)
    reserved = factor * num_honest * (dimension * _MAX_DISTANCE + advantage)
    if reserved >= 0.5 * budget.delta:
        raise InvalidInputError(
            "delta", budget.delta, bound=f"above {2 * reserved:.3g}", remedy="Raise delta or lower epsilon."
        )
    ideal = PrivacyBudget(epsilon=budget.epsilon, delta=(budget.delta - reserved) * _HEADROOM)
    total = _least_variance(law, ideal, moved, dimension, num_honest)
    share = _rounded_up(total / num_honest)
    if 20.0 * math.sqrt(share) * num_parties > MAX_MAGNITUDE:
        raise InvalidInputError(
            "grid",
            gamma,
            bound=f"wide enough that the noise of {num_parties} parties fits 2^52 steps",
            remedy="Use a wider grid.",
        )
    sampler = dimension * num_honest * share_noise(law, share).total_variation
    return LayeredPlan(
        law=law,
        num_parties=num_parties,
        num_honest=num_honest,
        dimension=dimension,
        grid=gamma,
        l2_sensitivity=l2_sensitivity,
        grid_sensitivity=moved,
        share_variance=share,
        budget=budget,
        delta=DeltaParts(
            ideal=ideal.delta, sampler=factor * sampler, generator=factor * num_honest * advantage
        ),
        rho=_rho(law, float(share), num_honest, moved, dimension),
    )


def _least_variance(law: NoiseLaw, ideal: PrivacyBudget, moved: float, dimension: int, shares: int) -> float:
    if law == "skellam":
        return skellam_variance(budget=ideal, l2_sensitivity=max(moved, 1.0), dimension=dimension)

    def fits(variance: float) -> bool:
        sigma = math.sqrt(variance / shares)
        if sigma < 0.5:
            return False  # there the closeness bound says nothing
        found = summed_discrete_gaussian_delta(
            epsilon=ideal.epsilon,
            sigma=sigma,
            num_summands=shares,
            l2_sensitivity=moved,
            dimension=dimension,
        )
        return found <= ideal.delta

    variance = _edge(fits, moved * moved)
    one = discrete_gaussian_sigma(budget=ideal, l2_sensitivity=max(moved, 1.0), dimension=dimension) ** 2
    if variance > _MAX_CLOSENESS_PRICE * one:
        raise InvalidInputError(
            "grid",
            f"one share of sigma {math.sqrt(one / shares):.3g} steps",
            bound=f"so fine that the closeness bound of {shares} summed shares costs at most "
            f"{_MAX_CLOSENESS_PRICE - 1:.0%} more variance; here it would cost {variance / one - 1:.0%}",
            remedy="Use a finer grid, or law='skellam', which sums exactly.",
        )
    return variance


def _epsilon(law: NoiseLaw, share: float, shares: int, moved: float, dimension: int, delta: float) -> float:
    if law == "skellam":
        return skellam_epsilon(
            delta=delta, variance=shares * share, l2_sensitivity=max(moved, 1.0), dimension=dimension
        )

    def fits(epsilon: float) -> bool:
        found = summed_discrete_gaussian_delta(
            epsilon=epsilon,
            sigma=math.sqrt(share),
            num_summands=shares,
            l2_sensitivity=moved,
            dimension=dimension,
        )
        return found <= delta

    return _edge(fits, 1.0) if fits(600.0) else math.inf


def _edge(fits: Callable[[float], bool], start: float) -> float:
    """The least argument (to one millionth) that fits; fitting must not end as it grows."""
    safe = start
    while not fits(safe):
        safe *= 2.0
    unsafe = safe / 2.0
    while fits(unsafe) and unsafe > 1e-6 * start:
        safe, unsafe = unsafe, unsafe / 2.0
    while safe - unsafe > 1e-6 * safe:
        middle = 0.5 * (safe + unsafe)
        safe, unsafe = (middle, unsafe) if fits(middle) else (safe, middle)
    return safe


def _rho(law: NoiseLaw, share: float, shares: int, moved: float, dimension: int) -> float | None:
    if law == "discrete_gaussian":
        return summed_discrete_gaussian_rho(
            sigma=math.sqrt(share), num_summands=shares, l2_sensitivity=max(moved, 1.0), dimension=dimension
        )
    return None


def share_noise(law: NoiseLaw, variance: Fraction) -> ExactNoise:
    """Returns what one party's share is drawn from.

    Raises:
        InvalidInputError: If the variance is out of range.
    """
    noise = skellam_noise_for(variance) if law == "skellam" else noise_for(variance)
    assert noise.total_variation <= _MAX_DISTANCE, "both kinds of tables are finer than what plans reserve"
    return noise


def _rounded_up(variance: float) -> Fraction:
    """Returns a short rational number of at least ``variance``, and at most 2^−15 of it more."""
    scale = Fraction(2) ** (_VARIANCE_BITS - math.floor(math.log2(variance)))
    return Fraction(math.ceil(Fraction(variance) * scale)) / scale
