"""Skellam noise, the difference of two Poisson numbers: it sums exactly, so several parties can add it together.

Everything is in units of the grid; released vectors are whole-numbered.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget
from dp_flash_attention.core.validation import open_unit, positive_finite, positive_int

# Whole orders only: the theorem is stated for them.
_ORDERS = (*range(2, 128), *range(128, 512, 8), *range(512, 2048, 64), *range(2048, 16_385, 1024))
_VARIANCE_REMEDY = "It is the summed noise's variance in units of the grid squared."
_SENSITIVITY_REMEDY = "Bound the vector first; the bound is in units of the grid."
_RELATIVE_TOLERANCE = 1e-6


def skellam_rdp(order: int, *, variance: float, l2_sensitivity: float, dimension: int) -> float:
    """Returns a bound of the Rényi divergence of whole order α ≥ 2 between shifted Skellam vectors.

    αΔ₂²/2μ + min{((2α−1)Δ₂² + 6Δ₁)/4μ², 3Δ₁/2μ}, with Δ₁ ≤ min(√d·Δ₂, Δ₂²) for whole-numbered vectors.

    Args:
        order: α.
        variance: μ, the variance of each coordinate's noise (a difference of two Poisson(μ/2)).
        l2_sensitivity: Δ₂.
        dimension: d.

    Raises:
        InvalidInputError: If a value lies outside its range.

    Guarantees:
        * Neighbouring relation and unit: those that ``l2_sensitivity`` was derived for. Public: every argument.
        * Sensitivity: ``l2_sensitivity`` in units of the grid.
        * Theorem and source: Agarwal, Kairouz & Liu 2021, Corollary 4.1 (scale 1).
    """
    order = positive_int("order", order, remedy="Use whole orders from 2.")
    if order < 2:
        raise InvalidInputError("order", order, bound="at least 2", remedy="Use whole orders from 2.")
    mu = positive_finite("variance", variance, remedy=_VARIANCE_REMEDY)
    l2 = positive_finite("l2_sensitivity", l2_sensitivity, remedy=_SENSITIVITY_REMEDY)
    l1 = min(math.sqrt(positive_int("dimension", dimension, remedy="Count the coordinates.")) * l2, l2 * l2)
    correction = min(((2 * order - 1) * l2 * l2 + 6.0 * l1) / (4.0 * mu * mu), 3.0 * l1 / (2.0 * mu))
    return order * l2 * l2 / (2.0 * mu) + correction


def skellam_epsilon(
    *, delta: float, variance: float, l2_sensitivity: float, dimension: int, releases: int = 1
) -> float:
    """Returns an upper bound of ε at ``delta`` for one or several Skellam releases.

    Conversion: Canonne, Kamath & Steinke 2020, Proposition 12. Arguments as ``skellam_rdp``.

    Raises:
        InvalidInputError: If a value lies outside its range.
    """
    delta = open_unit("delta", delta, remedy="Choose well below 1 / (number of records).")
    count = positive_int("releases", releases, remedy="Count the releases that are made.")
    best = math.inf
    for order in _ORDERS:
        rdp = skellam_rdp(order, variance=variance, l2_sensitivity=l2_sensitivity, dimension=dimension)
        best = min(best, count * rdp + math.log1p(-1.0 / order) - math.log(delta * order) / (order - 1))
    return max(0.0, best)


def skellam_variance(*, budget: PrivacyBudget, l2_sensitivity: float, dimension: int) -> float:
    """Returns the least variance (to one millionth) whose ε at the budget's δ is at most its ε.

    Raises:
        InvalidInputError: If a value lies outside its range.

    Guarantees:
        ``skellam_epsilon`` of the result was computed and found to be at most ``budget.epsilon``.
    """

    def fits(variance: float) -> bool:
        found = skellam_epsilon(
            delta=budget.delta, variance=variance, l2_sensitivity=l2_sensitivity, dimension=dimension
        )
        return found <= budget.epsilon

    return _least(
        fits, start=positive_finite("l2_sensitivity", l2_sensitivity, remedy=_SENSITIVITY_REMEDY) ** 2
    )


def _least(fits: Callable[[float], bool], *, start: float) -> float:
    safe = start
    while not fits(safe):
        safe *= 2.0
    unsafe = safe / 2.0
    while fits(unsafe) and unsafe > 1e-6 * start:
        safe, unsafe = unsafe, unsafe / 2.0
    while safe - unsafe > _RELATIVE_TOLERANCE * safe:
        middle = 0.5 * (safe + unsafe)
        safe, unsafe = (middle, unsafe) if fits(middle) else (safe, middle)
    return safe
