"""The discrete Gaussians of several parties, summed: nearly one discrete Gaussian, with the distance accounted.

Everything is in units of the grid; released vectors are whole-numbered.
"""

from __future__ import annotations

import math

from dp_flash_attention.accounting.discrete_gaussian import concentrated_delta, discrete_gaussian_delta
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_finite, positive_int

_SENSITIVITY_REMEDY = "Bound the vector first; the bound is in units of the grid."


def summed_discrete_gaussian_tau(*, sigma: float, num_summands: int) -> float:
    """Returns τ, which bounds |log P(Z = x) / P(G = x)| at every integer x.

    Z is the sum of ``num_summands`` discrete Gaussians of parameter ``sigma`` each, G one of σ·√n.

    Raises:
        InvalidInputError: If ``sigma`` is below 1/2, where the theorem says nothing, or a value is out of range.

    Guarantees:
        Theorem: τ = 10·Σ_{k=1}^{n−1} exp(−2π²σ²·k/(k+1)).
        Source: Kairouz, Liu & Steinke 2021, section 3 (sums of discrete Gaussians).
    """
    sigma = positive_finite("sigma", sigma, remedy="It is one summand's parameter, in units of the grid.")
    count = positive_int("num_summands", num_summands, remedy="Count the parties whose noise is summed.")
    if sigma < 0.5:
        raise InvalidInputError(
            "sigma",
            sigma,
            bound="at least 0.5 grid units per party",
            remedy="Use a finer grid or more noise.",
        )
    return 10.0 * math.fsum(math.exp(-2.0 * (math.pi * sigma) ** 2 * k / (k + 1.0)) for k in range(1, count))


def summed_discrete_gaussian_rho(
    *, sigma: float, num_summands: int, l2_sensitivity: float, dimension: int
) -> float:
    """Returns ρ of zCDP of a vector with the summed noise of ``num_summands`` parties.

    ρ = ½·min{√(Δ₂²/nσ² + τd/2), Δ₂/(√n·σ) + τ√d}².

    Raises:
        InvalidInputError: If a value lies outside its range, or ``sigma`` is below 1/2.

    Guarantees:
        * Neighbouring relation and unit: those that ``l2_sensitivity`` was derived for. Public: every argument.
        * Sensitivity: ``l2_sensitivity`` in units of the grid.
        * Theorem and source: Kairouz, Liu & Steinke 2021, section 3 (privacy of the sum), without their rounding.
    """
    tau = summed_discrete_gaussian_tau(sigma=sigma, num_summands=num_summands)
    l2 = positive_finite("l2_sensitivity", l2_sensitivity, remedy=_SENSITIVITY_REMEDY)
    d = positive_int("dimension", dimension, remedy="Count the coordinates.")
    ratio = l2 / (math.sqrt(num_summands) * sigma)
    root = min(math.sqrt(ratio * ratio + 0.5 * tau * d), ratio + tau * math.sqrt(d))
    return 0.5 * root * root


def summed_discrete_gaussian_delta(
    *, epsilon: float, sigma: float, num_summands: int, l2_sensitivity: float, dimension: int
) -> float:
    """Returns an upper bound of δ at ``epsilon``: the lesser of two.

    One converts ρ. The other replaces the sum by a discrete Gaussian of parameter √n·σ, which is within total
    variation d·(e^τ − 1)/2 of it, and adds (1+e^ε) times that distance.

    Raises:
        InvalidInputError: If a value lies outside its range, or ``sigma`` is below 1/2.

    Guarantees:
        * Neighbouring relation and unit: those that ``l2_sensitivity`` was derived for. Public: every argument.
        * Sensitivity: ``l2_sensitivity`` in units of the grid.
        * Theorem: every point's probability differs by a factor within e^±τ, so Σ|P−G|/2 ≤ (e^τ−1)/2.
        * Source: Kairouz, Liu & Steinke 2021, section 3; Canonne, Kamath & Steinke 2020.
    """
    tau = summed_discrete_gaussian_tau(sigma=sigma, num_summands=num_summands)
    rho = summed_discrete_gaussian_rho(
        sigma=sigma, num_summands=num_summands, l2_sensitivity=l2_sensitivity, dimension=dimension
    )
    ideal = discrete_gaussian_delta(
        epsilon=epsilon,
        sigma=math.sqrt(num_summands) * sigma,
        l2_sensitivity=l2_sensitivity,
        dimension=dimension,
    )
    distance = dimension * 0.5 * math.expm1(min(tau, 700.0))
    return min(
        1.0,
        concentrated_delta(epsilon=epsilon, rho=rho),
        ideal + (1.0 + math.exp(min(epsilon, 700.0))) * distance,
    )
