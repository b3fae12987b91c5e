"""The discrete Gaussian on ℤ^d: what one release costs, from theorems and positive sums.

Everything is in units of the grid: the released vector is whole-numbered, moves by at most ``l2_sensitivity``
between neighbours, and each coordinate gets independent noise with P(x) ∝ exp(−x²/2σ²), x ∈ ℤ.

Three bounds of δ hold at the same time, and the least of them is the answer:

1. *exact*, one coordinate: Canonne, Kamath & Steinke 2020, Theorem 7.
2. *smoothing*, any dimension. Take y = v + N(0, σ²−r²) and then draw x from the discrete Gaussian on ℤ with
   centre y and parameter r. The second step ignores the data. Its result has P(x) ∝ exp(−(x−v)²/2σ²)/ρ(y) up to the
   normaliser ρ_r(ℤ−y), which is r√2π·(1 ± e) with e = 2Σ_{k≥1} exp(−2π²r²k²) whatever y is (Poisson summation).
   So each coordinate is within total variation e/(1−e) of the discrete Gaussian with centre v, and

       δ ≤ δ_Gauss(ε; l2_sensitivity / √(σ²−r²)) + (1+e^ε)·d·e/(1−e).

   (The convolution of Peikert 2010, Theorem 3.1, with its constants; r = 2 has e = 1e-34.)
3. *concentrated*, any dimension and any σ: ρ = l2_sensitivity²/2σ² of zCDP (Canonne et al. 2020, Theorem 14),
   converted by their Proposition 12.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget
from dp_flash_attention.core.validation import open_unit, positive_finite, positive_int

# Above this the exact sum would have more than 10^5 terms, and smoothing is within 1e-7 of it.
_EXACT_SIGMA = 2_000.0
_SMOOTHING_PARAMETERS = tuple(0.5 + 0.125 * k for k in range(29))
# Every quantity below is a sum of positive doubles or a difference of two: this share of the larger one covers
# the rounding of at most 10^5 terms of relative error 4e-16 each.
_ROUNDING = 1e-10
_SIGMA_REMEDY = "It is the noise's parameter in units of the grid."
_SENSITIVITY_REMEDY = "Bound the vector first; the bound is in units of the grid."
_RELATIVE_TOLERANCE = 1e-6


def smoothing_error(parameter: float) -> float:
    """Returns an upper bound of e = 2·Σ_{k≥1} exp(−2π²r²k²), the ripple of the discrete Gaussian's normaliser.

    Args:
        parameter: r, in units of the grid.

    Raises:
        InvalidInputError: If ``parameter`` is not a finite number above 0.
    """
    parameter = positive_finite("parameter", parameter, remedy=_SIGMA_REMEDY)
    first = math.exp(-2.0 * (math.pi * parameter) ** 2)
    # Later terms have exponents 4, 9, 16, … times as large: a geometric series in first³ bounds them.
    return 2.0 * first / -math.expm1(-6.0 * (math.pi * parameter) ** 2) * (1.0 + _ROUNDING)


def gaussian_delta(*, epsilon: float, mu: float) -> float:
    """Returns an upper bound of δ of one Gaussian release of sensitivity over noise ``mu``.

    Source: Balle & Wang 2018, Theorem 8, with its rounding charged.
    """
    from scipy.special import log_ndtr

    high = float(log_ndtr(mu / 2.0 - epsilon / mu))
    low = epsilon + float(log_ndtr(-mu / 2.0 - epsilon / mu))
    # e^high·(1 − e^(low−high)); the logarithms are good to 1e-14 of themselves.
    share = -math.expm1(min(0.0, low - high)) + 1e-14 * (2.0 + abs(high) + abs(low))
    return min(1.0, math.exp(high) * share * (1.0 + _ROUNDING))


def discrete_gaussian_rho(*, sigma: float, l2_sensitivity: float) -> float:
    """Returns ρ of zero-concentrated DP, l2_sensitivity²/(2σ²), for vectors of any dimension.

    Raises:
        InvalidInputError: If a value lies outside its range.

    Guarantees:
        Theorem: Canonne, Kamath & Steinke 2020, Theorem 14. ρ of several releases add up.
    """
    sensitivity = positive_finite("l2_sensitivity", l2_sensitivity, remedy=_SENSITIVITY_REMEDY)
    ratio = sensitivity / positive_finite("sigma", sigma, remedy=_SIGMA_REMEDY)
    return 0.5 * ratio * ratio


def concentrated_delta(*, epsilon: float, rho: float) -> float:
    """Returns an upper bound of δ at ``epsilon`` of a ρ-zCDP mechanism.

    Source: Canonne, Kamath & Steinke 2020, Proposition 12: any order α > 1 gives a bound; the best is searched.
    """
    epsilon = _checked_epsilon(epsilon)
    rho = positive_finite("rho", rho, remedy="It is the zCDP parameter of what was released.")

    def log_delta(log_order_less_one: float) -> float:
        excess = math.exp(log_order_less_one)
        order = 1.0 + excess
        return excess * (order * rho - epsilon) + order * math.log1p(-1.0 / order) - math.log(excess)

    low, high = math.log(1e-6), math.log(max(10.0, 4.0 * (epsilon + 40.0) / rho))
    value = _minimum(log_delta, low, high)
    return min(1.0, math.exp(min(0.0, value)) * (1.0 + _ROUNDING))


def discrete_gaussian_delta(
    *, epsilon: float, sigma: float, l2_sensitivity: float, dimension: int = 1
) -> float:
    """Returns a certified upper bound of δ at ``epsilon`` for one release.

    Args:
        epsilon: ε ≥ 0.
        sigma: The noise's parameter σ, in units of the grid.
        l2_sensitivity: Largest L2 distance between the whole-numbered vectors of two neighbours.
        dimension: Number of coordinates d.

    Raises:
        InvalidInputError: If a value lies outside its range.

    Guarantees:
        * Neighbouring relation and unit: those that ``l2_sensitivity`` was derived for.
        * Sensitivity: ``l2_sensitivity``, in units of the grid. Public: every argument.
        * Theorem: the least of the three bounds of this module.
        * Source: Canonne, Kamath & Steinke 2020; Peikert 2010; Balle & Wang 2018.

    Example:
        >>> discrete_gaussian_delta(epsilon=1.0, sigma=4.0, l2_sensitivity=1.0) < 1e-4
        True
    """
    epsilon = _checked_epsilon(epsilon)
    sigma = positive_finite("sigma", sigma, remedy=_SIGMA_REMEDY)
    sensitivity = positive_finite("l2_sensitivity", l2_sensitivity, remedy=_SENSITIVITY_REMEDY)
    dimension = positive_int("dimension", dimension, remedy="Count the coordinates.")
    if sensitivity < 1.0:
        return 0.0  # whole-numbered vectors that are less than 1 apart are equal
    bounds = [
        concentrated_delta(
            epsilon=epsilon, rho=discrete_gaussian_rho(sigma=sigma, l2_sensitivity=sensitivity)
        )
    ]
    if dimension == 1 and sigma <= _EXACT_SIGMA:
        bounds.append(_exact_delta(epsilon, sigma, math.floor(sensitivity)))
    bounds.append(_smoothing_delta(epsilon, sigma, sensitivity, dimension))
    return min(bounds)


def discrete_gaussian_epsilon(
    *, delta: float, sigma: float, l2_sensitivity: float, dimension: int = 1
) -> float:
    """Returns a certified upper bound of ε at ``delta`` for one release; arguments as ``discrete_gaussian_delta``.

    Raises:
        InvalidInputError: If a value lies outside its range, or no ε up to 1e6 suffices.
    """
    delta = open_unit("delta", delta, remedy="Choose well below 1 / (number of records).")

    def delta_at(epsilon: float) -> float:
        return discrete_gaussian_delta(
            epsilon=epsilon, sigma=sigma, l2_sensitivity=l2_sensitivity, dimension=dimension
        )

    if delta_at(0.0) <= delta:
        return 0.0
    high = 1.0
    while delta_at(high) > delta:
        high *= 2.0
        if high > 1e6:
            raise InvalidInputError(
                "delta", delta, bound="reachable with this much noise", remedy="Raise sigma or delta."
            )
    return _safe_edge(lambda epsilon: delta_at(epsilon) <= delta, unsafe=0.0, safe=high)


def discrete_gaussian_sigma(*, budget: PrivacyBudget, l2_sensitivity: float, dimension: int = 1) -> float:
    """Returns the least σ (to one millionth) whose certified δ at the budget's ε is at most its δ.

    Raises:
        InvalidInputError: If a value lies outside its range.

    Guarantees:
        ``discrete_gaussian_delta`` of the result was computed and found to be at most ``budget.delta``.

    Example:
        >>> budget = PrivacyBudget(epsilon=1.0, delta=1e-6)
        >>> 4.2 < discrete_gaussian_sigma(budget=budget, l2_sensitivity=1.0) < 4.3
        True
    """
    sensitivity = positive_finite("l2_sensitivity", l2_sensitivity, remedy=_SENSITIVITY_REMEDY)

    def fits(sigma: float) -> bool:
        found = discrete_gaussian_delta(
            epsilon=budget.epsilon, sigma=sigma, l2_sensitivity=sensitivity, dimension=dimension
        )
        return found <= budget.delta

    safe = sensitivity
    while not fits(safe):
        safe *= 2.0
    unsafe = safe / 2.0
    while fits(unsafe) and unsafe > 1e-3 * sensitivity:
        safe, unsafe = unsafe, unsafe / 2.0
    return _safe_edge(fits, unsafe=unsafe, safe=safe)


def _exact_delta(epsilon: float, sigma: float, shift: int) -> float:
    """Pr[Y > εσ²/Δ − Δ/2] − e^ε·Pr[Y > εσ²/Δ + Δ/2]; the noise is log-concave, so the largest shift is the worst."""
    threshold = math.floor(epsilon * sigma * sigma / shift - shift / 2.0) + 1
    first, second = _upper_tail(threshold, sigma), _upper_tail(threshold + shift, sigma)
    return min(1.0, max(0.0, first - math.exp(min(epsilon, 700.0)) * second) + _ROUNDING * first)


def _upper_tail(start: int, sigma: float) -> float:
    """Pr[Y ≥ start] of the discrete Gaussian, to 1e-12 of itself."""
    import numpy as np

    reach = math.ceil(40.0 * sigma) + 2
    mass = np.exp(-0.5 * (np.arange(0, reach) / sigma) ** 2)
    total = float(2.0 * mass.sum() - 1.0)
    if start <= 0:
        return 1.0 - (_upper_tail(1 - start, sigma) if start > -reach else 0.0)
    first = math.exp(-0.5 * (start / sigma) ** 2)
    # Relative to its first term, so that a far tail does not underflow before it is scaled.
    steps = np.arange(0, reach)
    rest = np.exp(-(steps * (2.0 * start + steps)) / (2.0 * sigma * sigma)).sum()
    return first * float(rest) / total


def _smoothing_delta(epsilon: float, sigma: float, sensitivity: float, dimension: int) -> float:
    best = 1.0
    for parameter in _SMOOTHING_PARAMETERS:
        if parameter >= sigma:
            break
        ripple = smoothing_error(parameter)
        if ripple >= 0.5:
            continue
        mu = sensitivity / math.sqrt(sigma * sigma - parameter * parameter)
        distance = dimension * ripple / (1.0 - ripple)
        best = min(
            best, gaussian_delta(epsilon=epsilon, mu=mu) + (1.0 + math.exp(min(epsilon, 700.0))) * distance
        )
    return best


def _minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Golden-section search; any point it visits is a valid bound, so an inexact minimum is only looser."""
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = function(a), function(b)
    for _ in range(80):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = function(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = function(b)
    return min(at_a, at_b)


def _safe_edge(fits: Callable[[float], bool], *, unsafe: float, safe: float) -> float:
    """Bisects towards the edge and returns a point that was checked."""
    while abs(safe - unsafe) > _RELATIVE_TOLERANCE * abs(safe):
        middle = 0.5 * (safe + unsafe)
        if fits(middle):
            safe = middle
        else:
            unsafe = middle
    return safe


def _checked_epsilon(epsilon: object) -> float:
    if isinstance(epsilon, int | float) and not isinstance(epsilon, bool) and epsilon == 0:
        return 0.0
    return positive_finite("epsilon", epsilon, remedy="Common values lie between 0.1 and 10.")
