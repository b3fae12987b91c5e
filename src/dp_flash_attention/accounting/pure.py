"""Pure ε-DP: the discrete Laplace mechanism and basic composition, in plain arithmetic.

A run spends a sliver of its ε on the number of its records (which add/remove makes private) and the
rest on training. Basic composition adds the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget
from dp_flash_attention.core.validation import open_unit, positive_finite

_SCALE_REMEDY = "The scale is l1_sensitivity / epsilon."


@dataclass(frozen=True, kw_only=True)
class BudgetSplit:
    """One (ε, δ) budget in two parts that compose to no more than it.

    Attributes:
        epsilon_count: Pure ε of the release of the record count.
        training: What is left for training; its δ is the whole δ.
    """

    epsilon_count: float
    training: PrivacyBudget

    @property
    def total(self) -> PrivacyBudget:
        """The budget that both parts add up to."""
        return PrivacyBudget(epsilon=self.epsilon_count + self.training.epsilon, delta=self.training.delta)


def split_budget(*, epsilon: float, delta: float, count_fraction: float = 0.01) -> BudgetSplit:
    """Splits (ε, δ) into a pure ε for the record count and the rest for training.

    Args:
        epsilon: The total ε.
        delta: The total δ; the count's mechanism is pure and needs none of it.
        count_fraction: Share of ε for the count, in (0, 1).

    Returns:
        A split whose parts, added in floating point, do not exceed ``epsilon``.

    Raises:
        InvalidInputError: If a value lies outside its range.

    Guarantees:
        If the count is released with ``epsilon_count``-DP and training, which may depend on the released
        count, is ``training``-DP for every value of it, the pair is (ε, δ)-DP. Theorem: basic (adaptive)
        composition, Dwork & Roth 2014, Theorem B.1.

    Example:
        >>> split = split_budget(epsilon=1.0, delta=1e-6)
        >>> split.epsilon_count, split.training.epsilon
        (0.01, 0.99)
    """
    budget = PrivacyBudget(epsilon=epsilon, delta=delta)
    fraction = open_unit("count_fraction", count_fraction, remedy="0.01 gives the count 1 % of epsilon.")
    epsilon_count = budget.epsilon * fraction
    rest = budget.epsilon - epsilon_count
    while epsilon_count + rest > budget.epsilon:  # one unit in the last place at most
        rest = math.nextafter(rest, 0.0)
    return BudgetSplit(epsilon_count=epsilon_count, training=PrivacyBudget(epsilon=rest, delta=budget.delta))


def basic_composition(parts: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Adds the (ε, δ) pairs of mechanisms run on the same data, each of which may see the earlier outputs.

    Args:
        parts: Pairs with ε ≥ 0 and 0 ≤ δ < 1.

    Returns:
        (Σ ε, Σ δ), rounded up by at most one unit in the last place.

    Raises:
        InvalidInputError: If a pair lies outside its range.

    Guarantees:
        Theorem: basic adaptive composition, Dwork & Roth 2014, Theorem B.1.

    Example:
        >>> basic_composition([(0.25, 0.0), (0.75, 1e-6)]) == (1.0, 1e-6)
        True
    """
    pairs = tuple(parts)
    for epsilon, delta in pairs:
        if not (math.isfinite(epsilon) and epsilon >= 0.0 and 0.0 <= delta < 1.0):
            raise InvalidInputError(
                "parts",
                (epsilon, delta),
                bound="pairs with a finite epsilon of at least 0 and a delta in [0, 1)",
                remedy="Check the mechanism's own guarantee.",
            )
    return _sum_up([epsilon for epsilon, _ in pairs]), _sum_up([delta for _, delta in pairs])


def discrete_laplace_epsilon(*, scale: float, l1_sensitivity: int = 1) -> float:
    """Returns the pure ε of adding discrete Laplace noise of ``scale`` to an integer.

    The noise takes k ∈ ℤ with probability proportional to exp(−|k| / scale).

    Args:
        scale: The noise's scale, in units of the integer.
        l1_sensitivity: How far the integer moves between neighbours; 1 for a count.

    Raises:
        InvalidInputError: If a value lies outside its range.

    Guarantees:
        ε = l1_sensitivity / scale, δ = 0. Theorem: the geometric mechanism, Ghosh, Roughgarden &
        Sundararajan 2009, section 2; Canonne, Kamath & Steinke 2020, section 5.

    Example:
        >>> discrete_laplace_epsilon(scale=100.0)
        0.01
    """
    return _sensitivity(l1_sensitivity) / positive_finite("scale", scale, remedy=_SCALE_REMEDY)


def discrete_laplace_scale(*, epsilon: float, l1_sensitivity: int = 1) -> float:
    """Returns the scale of discrete Laplace noise that makes an integer release ε-DP.

    Raises:
        InvalidInputError: If a value lies outside its range.

    Guarantees:
        ``discrete_laplace_epsilon(scale=result, l1_sensitivity=…) <= epsilon``, in floating point too.

    Example:
        >>> discrete_laplace_scale(epsilon=0.01)
        100.0
    """
    bound = positive_finite("epsilon", epsilon, remedy="Common values lie between 0.001 and 1.")
    sensitivity = _sensitivity(l1_sensitivity)
    scale = sensitivity / bound
    while sensitivity / scale > bound:
        scale = math.nextafter(scale, math.inf)
    return scale


def _sensitivity(l1_sensitivity: int) -> float:
    return positive_finite("l1_sensitivity", l1_sensitivity, remedy="A count of records has sensitivity 1.")


def _sum_up(values: list[float]) -> float:
    # fsum rounds the exact sum to nearest; one step up turns that into an upper bound unless it was exact.
    total = math.fsum(values)
    return math.nextafter(total, math.inf) if math.fsum([*values, -total]) > 0.0 else total
