"""Gaussian differential privacy in closed form: (ε, δ) of μ, and back. Standard library only.

A mechanism is μ-GDP if telling neighbours apart from its output is at least as hard as telling N(0, 1) from
N(μ, 1) (Dong, Roth & Su 2022). Gaussian noise of standard deviation σ on an L2 sensitivity Δ is exactly
Δ/σ-GDP, and k such releases are exactly sqrt(Σ μ_i²)-GDP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget
from dp_flash_attention.core.validation import open_unit, positive_finite

# math.erfc and math.exp are within a few units in the last place; the sum of both terms' errors is below this
# share of the larger one.
_RELATIVE_ERROR = 1e-14
_BISECTIONS = 200
_MU_REMEDY = "It is the sensitivity over the noise's standard deviation; common values lie between 0.1 and 3."


def gdp_delta(*, mu: float, epsilon: float) -> float:
    """Returns δ(ε) of a μ-GDP mechanism, rounded up.

    Args:
        mu: μ > 0.
        epsilon: ε >= 0.

    Raises:
        InvalidInputError: If a value lies outside its range.

    Guarantees:
        μ-GDP implies (ε, δ)-DP with δ = Φ(μ/2 − ε/μ) − e^ε·Φ(−μ/2 − ε/μ) for every ε >= 0, under whatever
        neighbours μ was derived for, and no smaller δ holds for the Gaussian mechanism: Balle & Wang 2018,
        Theorem 8; Dong, Roth & Su 2022, Corollary 2.13. The result exceeds that value by at most 1e-14 of
        Φ(μ/2 − ε/μ).

    Example:
        >>> round(gdp_delta(mu=1.0, epsilon=1.0), 4)
        0.1269
    """
    scale = positive_finite("mu", mu, remedy=_MU_REMEDY)
    if isinstance(epsilon, bool) or not math.isfinite(epsilon) or epsilon < 0.0:
        raise InvalidInputError(
            "epsilon", epsilon, bound="a finite number of at least 0", remedy="Common values are 0.1 to 10."
        )
    above = _upper_tail(epsilon / scale - scale / 2.0)
    below = _upper_tail(epsilon / scale + scale / 2.0)
    # Where e^ε overflows or the tail underflows, leaving the negative term out keeps an upper bound.
    product = math.exp(epsilon + math.log(below)) if below > 0.0 else 0.0
    # ε itself passes through exp: its rounding is ε units in the last place.
    error = _RELATIVE_ERROR * above + 3e-16 * epsilon * product
    return min(1.0, max(0.0, above - product) + error)


def gdp_epsilon(*, mu: float, delta: float) -> float:
    """Returns the smallest ε with ``gdp_delta(mu, ε) <= delta``, rounded up to double precision.

    Args:
        mu: μ > 0.
        delta: δ in (0, 1).

    Raises:
        InvalidInputError: If a value lies outside its range.

    Guarantees:
        That of ``gdp_delta``: the returned ε was checked with it, never interpolated.

    Example:
        >>> round(gdp_epsilon(mu=1.0, delta=1e-5), 3)
        4.377
    """
    scale = positive_finite("mu", mu, remedy=_MU_REMEDY)
    target = open_unit("delta", delta, remedy="Choose well below 1 / (number of records), such as 1e-6.")
    if gdp_delta(mu=scale, epsilon=0.0) <= target:
        return 0.0
    high = max(1.0, scale)
    while gdp_delta(mu=scale, epsilon=high) > target:
        high *= 2.0
    low = 0.0
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (low, middle) if gdp_delta(mu=scale, epsilon=middle) <= target else (middle, high)
    return high


def gdp_mu(budget: PrivacyBudget) -> float:
    """Returns the largest μ with ``gdp_epsilon(mu=μ, delta=δ) <= ε``, rounded down to double precision.

    Args:
        budget: (ε, δ).

    Guarantees:
        Every μ-GDP mechanism with this μ is (ε, δ)-DP: δ(ε) of the result was computed and compared.

    Example:
        >>> round(gdp_mu(PrivacyBudget(epsilon=1.0, delta=1e-6)), 4)
        0.2367
    """
    low, high = 0.0, 1.0
    while gdp_delta(mu=high, epsilon=budget.epsilon) <= budget.delta:
        low, high = high, 2.0 * high
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        fits = gdp_delta(mu=middle, epsilon=budget.epsilon) <= budget.delta
        low, high = (middle, high) if fits else (low, middle)
    if low == 0.0:
        raise InvalidInputError(
            "budget", budget, bound="reachable by some Gaussian noise", remedy="Raise epsilon or delta."
        )
    # δ(ε) is not monotone in its last digits: step down until the reverse question agrees too.
    step = 1e-15
    while gdp_epsilon(mu=low, delta=budget.delta) > budget.epsilon:
        low, step = low * (1.0 - step), 2.0 * step
    return low


def compose_gdp(mus: Iterable[float]) -> float:
    """Returns μ of several μ_i-GDP releases on the same data: sqrt(Σ μ_i²), rounded up.

    Guarantees:
        Dong, Roth & Su 2022, Corollary 3.3: exact for Gaussian mechanisms, and each may look at the
        outputs of those before it.

    Example:
        >>> compose_gdp([3.0, 4.0])
        5.0
    """
    squares = [Fraction(positive_finite("mu", mu, remedy=_MU_REMEDY)) ** 2 for mu in mus]
    return root(sum(squares, Fraction(0)), up=True)


def root(square: Fraction, *, up: bool) -> float:
    """Returns the square root of an exact number, rounded to the neighbouring float on the side asked for."""
    result = math.sqrt(square)
    if up:
        while Fraction(result) ** 2 < square:
            result = math.nextafter(result, math.inf)
    else:
        while Fraction(result) ** 2 > square:
            result = math.nextafter(result, 0.0)
    return result


def _upper_tail(x: float) -> float:
    return 0.5 * math.erfc(x / math.sqrt(2.0))
