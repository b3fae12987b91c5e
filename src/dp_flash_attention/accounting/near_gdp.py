"""(ε, δ) of a mechanism that is near a μ-GDP one: what finite precision and a cipher's bits cost. Standard library only.

If a mechanism's outputs are, on every data set, within total variation η of those of a μ-GDP mechanism, then

    P(S) ≤ P̃(S) + η ≤ e^ε·P̃′(S) + δ_μ(ε) + η ≤ e^ε·P′(S) + δ_μ(ε) + (1 + e^ε)·η.
"""

from __future__ import annotations

import math

from dp_flash_attention.accounting.gdp import gdp_delta, gdp_epsilon
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget
from dp_flash_attention.core.validation import open_unit, positive_finite

_UPWARD = 1.0 + 1e-12
_LARGEST_EXPONENT = 700.0
_BISECTIONS = 60
_DISTANCE_REMEDY = "It is the total variation to the ideal mechanism; common values are below 1e-15."


def distance_delta(*, distance: float, epsilon: float) -> float:
    """Returns (1 + e^ε)·η, rounded up: what a distance of η adds to δ at ε.

    Args:
        distance: η >= 0.
        epsilon: ε >= 0.

    Raises:
        InvalidInputError: If a value lies outside its range.
    """
    eta = _non_negative("distance", distance, remedy=_DISTANCE_REMEDY)
    bound = _non_negative("epsilon", epsilon, remedy="Common values are 0.1 to 10.")
    if eta == 0.0:
        return 0.0
    return (1.0 + math.exp(bound)) * eta * _UPWARD if bound < _LARGEST_EXPONENT else math.inf


def near_gdp_delta(*, mu: float, distance: float, epsilon: float) -> float:
    """Returns δ at ``epsilon`` of a mechanism within ``distance`` of a μ-GDP one, rounded up.

    Guarantees:
        Neighbouring relation, unit, sensitivity: those that μ was derived for. Public: the arguments. Theorem and source: the
        module's docstring; ``gdp_delta``.

    Raises:
        InvalidInputError: If a value lies outside its range.

    Example:
        >>> near_gdp_delta(mu=1.0, distance=1e-9, epsilon=1.0) - gdp_delta(mu=1.0, epsilon=1.0) < 4e-9
        True
    """
    added = distance_delta(distance=distance, epsilon=epsilon)
    ideal = gdp_delta(mu=mu, epsilon=epsilon)
    return min(1.0, math.nextafter(ideal + added, math.inf)) if added > 0.0 else ideal


def near_gdp_epsilon(*, mu: float, distance: float, delta: float) -> float:
    """Returns an ε with ``near_gdp_delta(mu, distance, ε) <= delta``, the least up to rounding.

    Raises:
        InvalidInputError: If a value lies outside its range, or δ is so small that finite precision might cost half of it.

    Guarantees:
        That of ``near_gdp_delta``: the returned ε was checked with it.

    Example:
        >>> near_gdp_epsilon(mu=1.0, distance=0.0, delta=1e-5) == gdp_epsilon(mu=1.0, delta=1e-5)
        True
    """
    target = open_unit("delta", delta, remedy="Choose well below 1 / (number of records), such as 1e-6.")
    low = gdp_epsilon(mu=mu, delta=target)
    if near_gdp_delta(mu=mu, distance=distance, epsilon=low) <= target:
        return low
    high = gdp_epsilon(mu=mu, delta=target / 2.0)
    if near_gdp_delta(mu=mu, distance=distance, epsilon=high) > target:
        raise InvalidInputError(
            "delta",
            delta,
            bound=f"at least twice what finite precision costs, {distance_delta(distance=distance, epsilon=high):.3g}",
            remedy="Raise delta; so small a one is not certified for noise of finite precision.",
        )
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        fits = near_gdp_delta(mu=mu, distance=distance, epsilon=middle) <= target
        low, high = (low, middle) if fits else (middle, high)
    return high


def less_distance(budget: PrivacyBudget, *, distance: float, largest_share: float) -> PrivacyBudget:
    """Returns the budget that is left for the ideal mechanism: δ less (1 + e^ε)·η.

    Args:
        budget: (ε, δ).
        distance: η of everything the budget is for.
        largest_share: Largest share of δ that finite precision may take.

    Raises:
        InvalidInputError: If it would take more.
    """
    cost = distance_delta(distance=distance, epsilon=budget.epsilon)
    if cost > largest_share * budget.delta:
        raise InvalidInputError(
            "delta",
            budget.delta,
            bound=f"at least {cost / largest_share:.3g}, of which finite precision may take {largest_share:g} at "
            f"epsilon {budget.epsilon:g}",
            remedy="Raise delta, lower epsilon, or use noise 'secure'.",
        )
    if cost == 0.0:
        return budget
    # Rounded down by two units, so that the sum of both, rounded up, is at most the budget's δ.
    return PrivacyBudget(epsilon=budget.epsilon, delta=(budget.delta - cost) * (1.0 - 2.0**-51))


def _non_negative(name: str, value: object, *, remedy: str) -> float:
    # 0 in place of a number that is not one would hide a mistake.
    is_zero = isinstance(value, int | float) and not isinstance(value, bool) and value == 0
    return 0.0 if is_zero else positive_finite(name, value, remedy=remedy)
