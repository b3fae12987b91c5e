"""The discrete Gaussian on a lattice, P(x) ∝ exp(−‖x‖²/2σ²), x ∈ L: cost of a shift, and distance of Klein's sampler.

Both rest on one fact. Let b̃_i be the Gram–Schmidt vectors of a basis of L. Summing over the last coefficient first,
then the one before it, and so on (Gentry, Peikert & Vaikuntanathan 2008, Lemmas 3.1 and 4.3), the normaliser of
every shifted copy L − c is

    Σ_{x ∈ L−c} exp(−‖x‖²/2σ²) = Π_i (σ√2π/‖b̃_i‖)·(1 ± e_i),    e_i = 2Σ_{k≥1} exp(−2π²σ²k²/‖b̃_i‖²).

Two laws whose densities differ only by such normalisers are within ½(Π(1+e_i)/(1−e_i) − 1) in total variation: the
ideal law and Klein's sampler (normalisers of the single coordinates), and the ideal law and a Gaussian of variance
σ²−r² that is rounded to the lattice at random with parameter r (normalisers at r; see ``discrete_gaussian``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dp_flash_attention.accounting.discrete_gaussian import (
    concentrated_delta,
    gaussian_delta,
    smoothing_error,
)
from dp_flash_attention.core.privacy import PrivacyBudget
from dp_flash_attention.core.validation import positive_finite, positive_int

_SENSITIVITY_REMEDY = "Bound the vector first, for example by clipping."
_SIGMA_REMEDY = "It is the noise's parameter, in the lattice's own unit."
# Smoothing parameters over the longest Gram–Schmidt vector: from e = 1e-8 to 1e-77.
_SMOOTHING_RATIOS = tuple(1.0 + 0.125 * k for k in range(17))
_RELATIVE_TOLERANCE = 1e-6


def lattice_distance(*, sigma: float, gram_schmidt_norms: Sequence[float], copies: int = 1) -> float:
    """Returns an upper bound of ½(Π(1+e_i)/(1−e_i) − 1), the total variation of Klein's sampler from the ideal law.

    Args:
        sigma: σ.
        gram_schmidt_norms: ‖b̃_i‖ of the basis.
        copies: Number of independent vectors that are sampled.

    Returns:
        At most 1, which is what it is where the bound says nothing.

    Raises:
        InvalidInputError: If a value lies outside its range.
    """
    sigma = positive_finite("sigma", sigma, remedy=_SIGMA_REMEDY)
    logarithm = 0.0
    for norm in gram_schmidt_norms:
        e = smoothing_error(
            sigma / positive_finite("gram_schmidt_norm", norm, remedy="Use a basis of full rank.")
        )
        if e >= 0.5:
            return 1.0
        logarithm += 2.0 * math.atanh(e)
    logarithm *= positive_int("copies", copies, remedy="Count the vectors.")
    return min(1.0, 0.5 * math.expm1(min(logarithm, 2.0)) * (1.0 + 1e-10))


def lattice_gaussian_delta(
    *,
    epsilon: float,
    sigma: float,
    l2_sensitivity: float,
    gram_schmidt_norms: Sequence[float],
    copies: int = 1,
) -> float:
    """Returns a certified upper bound of δ at ``epsilon`` for lattice vectors that move by ``l2_sensitivity``.

    Raises:
        InvalidInputError: If a value lies outside its range.

    Guarantees:
        * Neighbouring relation and unit: those that ``l2_sensitivity`` was derived for. Public: every argument.
        * Sensitivity: ``l2_sensitivity`` between the lattice points of neighbours, in the lattice's unit.
        * Theorem: the lesser of (1) ρ = l2_sensitivity²/2σ² of zCDP, because Σ_{x∈L} exp(−‖x−c‖²/2σ²) is largest at
          c = 0 and the Rényi divergence of a shift by w is therefore at most α‖w‖²/2σ², as on ℤ; and (2) a Gaussian of
          variance σ²−r² followed by random rounding to the lattice.
        * Source: Canonne, Kamath & Steinke 2020, Theorem 4; Micciancio & Regev 2007, Lemma 2.9; Peikert 2010.
    """
    sensitivity = positive_finite("l2_sensitivity", l2_sensitivity, remedy=_SENSITIVITY_REMEDY)
    ratio = sensitivity / positive_finite("sigma", sigma, remedy=_SIGMA_REMEDY)
    best = concentrated_delta(epsilon=epsilon, rho=0.5 * ratio * ratio)
    longest = max(gram_schmidt_norms)
    for smoothing_ratio in _SMOOTHING_RATIOS:
        r = smoothing_ratio * longest
        if r >= sigma:
            break
        distance = lattice_distance(sigma=r, gram_schmidt_norms=gram_schmidt_norms, copies=copies)
        gauss = gaussian_delta(epsilon=epsilon, mu=sensitivity / math.sqrt(sigma * sigma - r * r))
        best = min(best, gauss + (1.0 + math.exp(min(epsilon, 700.0))) * distance)
    return best


def lattice_gaussian_sigma(
    *, budget: PrivacyBudget, l2_sensitivity: float, gram_schmidt_norms: Sequence[float], copies: int = 1
) -> float:
    """Returns the least σ (to one millionth) whose certified δ at the budget's ε is at most its δ.

    Raises:
        InvalidInputError: If a value lies outside its range.
    """

    def fits(sigma: float) -> bool:
        found = lattice_gaussian_delta(
            epsilon=budget.epsilon,
            sigma=sigma,
            l2_sensitivity=l2_sensitivity,
            gram_schmidt_norms=gram_schmidt_norms,
            copies=copies,
        )
        return found <= budget.delta

    safe = positive_finite("l2_sensitivity", l2_sensitivity, remedy=_SENSITIVITY_REMEDY)
    while not fits(safe):
        safe *= 2.0
    unsafe = safe / 2.0
    while fits(unsafe) and unsafe > 1e-3 * l2_sensitivity:
        safe, unsafe = unsafe, unsafe / 2.0
    while safe - unsafe > _RELATIVE_TOLERANCE * safe:
        middle = 0.5 * (safe + unsafe)
        safe, unsafe = (middle, unsafe) if fits(middle) else (safe, middle)
    return safe
