"""How much discrete Gaussian noise a release needs, from public numbers alone: nothing is drawn or spent here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from dp_flash_attention.accounting import (
    discrete_gaussian_delta,
    discrete_gaussian_rho,
    discrete_gaussian_sigma,
)
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget
from dp_flash_attention.core.validation import positive_int
from dp_flash_attention.quantum.exact_noise import MAX_DISTANCE, noise_for
from dp_flash_attention.quantum.grid import checked_grid, default_grid, sensitivity_on_grid
from dp_flash_attention.quantum.interface import DeltaParts
from dp_flash_attention.quantum.values import MAX_MAGNITUDE

# σ² is rounded up to a multiple of 1/2^16 of itself, so that tables are built from short rational numbers.
_VARIANCE_BITS = 16
# So that the parts of δ, added in floating point, never exceed the budget.
_HEADROOM = 1.0 - 1e-12


@dataclass(frozen=True, kw_only=True)
class GaussianPlan:
    """One release's noise and its cost. Public.

    Attributes:
        dimension: Number of coordinates.
        whole: Whether the value's type holds whole numbers only.
        grid: γ, in the value's unit.
        l2_sensitivity: Of the value, in its own unit.
        grid_sensitivity: Of the rounded value, in units of the grid.
        variance: σ² of the discrete Gaussian, in units of the grid squared.
        epsilon: ε.
        delta: δ by origin.
        rho: ρ of zCDP of the ideal mechanism.
        distance: Total variation plus advantage between real and ideal noise.
    """

    dimension: int
    whole: bool
    grid: float
    l2_sensitivity: float
    grid_sensitivity: float
    variance: Fraction
    epsilon: float
    delta: DeltaParts
    rho: float
    distance: float

    @property
    def noise_stddev(self) -> float:
        """σ in the value's unit, which is never below the standard deviation of the discrete Gaussian."""
        return math.sqrt(float(self.variance)) * self.grid

    @property
    def reach(self) -> float:
        """Where numbers saturate, in the value's unit: 2^52 steps of the grid, and 2^52 for whole numbers."""
        return MAX_MAGNITUDE * (min(1.0, self.grid) if self.whole else self.grid)


@lru_cache(maxsize=64)
def plan_gaussian(
    *,
    dimension: int,
    whole: bool,
    l2_sensitivity: float,
    budget: PrivacyBudget,
    grid: float | None,
    advantage: float,
    layered: bool = False,
) -> GaussianPlan:
    """Returns the plan with the least noise that meets the budget, all terms together.

    Args:
        dimension: Number of coordinates.
        whole: Whether the value's type holds whole numbers only.
        l2_sensitivity: How far the value moves between neighbours, in its own unit.
        budget: (ε, δ) for ideal noise, sampler and generator together.
        grid: γ, a power of two; None for the default.
        advantage: Bound of what an observer gains from the bits being pseudo-random.
        layered: Whether the noise will be made of layers whatever its width (``exact_noise.makes_layers``).

    Raises:
        InvalidInputError: If the grid is too coarse or too fine, or no noise can meet the budget.
    """
    d = positive_int("dimension", dimension, remedy="Count the coordinates.")
    gamma = default_grid(l2_sensitivity, d, whole=whole) if grid is None else grid
    gamma = checked_grid(gamma, l2_sensitivity, d, whole=whole)
    moved = sensitivity_on_grid(l2_sensitivity, gamma, d, whole=whole)
    factor = 1.0 + math.exp(budget.epsilon)
    reserved = factor * (d * MAX_DISTANCE + advantage)
    if reserved >= 0.5 * budget.delta:
        raise InvalidInputError(
            "delta",
            budget.delta,
            bound=f"above {2 * reserved:.3g}, twice what finite precision of {d} coordinates costs at this epsilon",
            remedy="Raise delta, lower epsilon, or release fewer coordinates.",
        )
    ideal_budget = PrivacyBudget(epsilon=budget.epsilon, delta=(budget.delta - reserved) * _HEADROOM)
    variance = _rounded_up(
        discrete_gaussian_sigma(budget=ideal_budget, l2_sensitivity=max(moved, 1.0), dimension=d)
    )
    sigma = math.sqrt(float(variance)) * (1.0 - 1e-15)  # never above the true root
    # Nothing that comes out is larger than 18 σ.
    if 20.0 * sigma > MAX_MAGNITUDE:
        raise InvalidInputError(
            "grid", gamma, bound="wide enough that noise fits 2^52 steps", remedy="Use a wider grid."
        )
    noise = noise_for(variance, layered=layered)
    assert noise.largest <= MAX_MAGNITUDE, "tables end below 18 σ"
    sampler = d * noise.total_variation
    return GaussianPlan(
        dimension=d,
        whole=whole,
        grid=gamma,
        l2_sensitivity=l2_sensitivity,
        grid_sensitivity=moved,
        variance=variance,
        epsilon=budget.epsilon,
        delta=DeltaParts(
            ideal=discrete_gaussian_delta(
                epsilon=budget.epsilon, sigma=sigma, l2_sensitivity=moved, dimension=d
            ),
            sampler=factor * sampler,
            generator=factor * advantage,
        ),
        rho=discrete_gaussian_rho(sigma=sigma, l2_sensitivity=max(moved, 1.0)),
        distance=sampler + advantage,
    )


def _rounded_up(sigma: float) -> Fraction:
    """Returns a rational variance of at least σ², and at most 2^−15 of it more."""
    squared = Fraction(sigma) ** 2
    shift = _VARIANCE_BITS - math.floor(math.log2(squared))
    scale = Fraction(2) ** shift
    return Fraction(math.ceil(squared * scale)) / scale
