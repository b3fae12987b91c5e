"""Rounded Gaussians on the integers: round(s·Z), Z a standard normal, for wide s.

For whole k, k + round(s·Z) = round(k + s·Z): rounded noise on whole numbers is post-processing of continuous noise, so
whatever is proved of the Gaussian mechanism holds for it, in any number of dimensions and under sampling.

It is drawn as the discrete Gaussian of variance V = s² + 1/12, the variance that rounding to whole numbers adds. Their
distance, by Taylor's formula. Let φ be the density of N(0, s²), U uniform on [−1/2, 1/2] and W ~ N(0, 1/12). Then
P(round(sZ) = k) = E φ(k + U), and the density of N(0, V) at k is E φ(k + W). U and W share their first three moments; what is
left is the remainder of fourth order on each side,

    Σ_k |E φ(k+U) − E φ(k+W)| ≤ (E U⁴ + E W⁴)/24 · sup_x Σ_k |φ⁗(k+x)|,    E U⁴ + E W⁴ = 1/80 + 1/48 = 1/30.

Σ_k |f(k+x)| ≤ ∫|f| + ∫|f'| for any smooth f, since f at a point differs from f elsewhere in its cell by at most the cell's ∫|f'|.
With φ⁽ⁿ⁾(x) = ±s⁻ⁿ⁻¹·He_n(x/s)·φ₁(x/s) and E|He_n(Z)| ≤ √n! (Cauchy & Schwarz), the sum is at most √24/s⁴ + √120/s⁵. The total
variation is half of it, plus half of what normalisation over the integers changes, θ ≤ 3·exp(−2π²V) (Poisson summation):

    TV ≤ (√24 + √120/s) / (1440·s⁴) + 1.5·exp(−2π²V).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

import numpy as np
import numpy.typing as npt

from dp_flash_attention.core.validation import positive_finite
from dp_flash_attention.noise.discrete_gaussian import ExactCipher
from dp_flash_attention.noise.entropy import NoiseKey
from dp_flash_attention.noise.wide_discrete_gaussian import WideDiscreteGaussian

_REMEDY: Final = "Give the standard deviation in steps of the grid."
# What the floating-point operations below can lose.
_ROUNDING: Final = 1e-12


def rounded_gaussian_distance(stddev: float) -> float:
    """Returns a bound of the total variation between round(s·Z) and the discrete Gaussian of variance s² + 1/12.

    It falls with s. The proof is in the module's docstring; for wide s it is 7 times the truth.

    >>> rounded_gaussian_distance(2.0**20) < 3e-27
    True
    """
    s = positive_finite("stddev", stddev, remedy=_REMEDY)
    smooth = (math.sqrt(24.0) + math.sqrt(120.0) / s) / (1440.0 * s**4)
    normalisation = 1.5 * math.exp(-2.0 * math.pi**2 * (s * s + 1.0 / 12.0))
    return (smooth + normalisation) * (1.0 + _ROUNDING)


class RoundedGaussian:
    """Draws round(s'·Z) up to a certified distance, for some s' that is at least s and at most 1/s larger.

    Args:
        stddev: s in steps of the grid, from 64 to 2^45.

    Attributes:
        variance: V, of the discrete Gaussian that is drawn; whole, and V − 1/12 = s'² ≥ s².
        total_variation: Upper bound of the distance of one sample from round(s'·Z): that of the two ideal laws, and that
            of the sampler.
        largest: The largest magnitude that can come out.

    Raises:
        InvalidInputError: If ``stddev`` is out of range.

    Guarantees:
        * Neighbouring relation, unit, sensitivity: the caller's. Public: all attributes. Secret: keys.
        * Theorem: N samples are within N·``total_variation`` of N independent rounded Gaussians.
        * Source: the module's docstring; ``WideDiscreteGaussian``.
    """

    def __init__(self, stddev: float) -> None:
        s = positive_finite("stddev", stddev, remedy=_REMEDY)
        self.variance = Fraction(math.ceil(Fraction(s) ** 2 + Fraction(1, 12)))
        self._sampler = WideDiscreteGaussian(self.variance)
        self.largest = self._sampler.largest
        self.total_variation = rounded_gaussian_distance(s) + self._sampler.total_variation

    def draw(
        self,
        key: NoiseKey,
        num: int,
        *,
        step: int,
        stream: int,
        first: int = 0,
        cipher: ExactCipher = "aes-256-ctr",
    ) -> npt.NDArray[np.int64]:
        """Returns independent samples ``first`` … ``first + num − 1``, int64.

        A triple (key, step, stream) is for one release only; ``first`` is for making its samples part by part.

        Raises:
            InvalidInputError: If an argument is out of range.
            NoiseUnavailableError: If the cipher cannot be used.
        """
        return self._sampler.draw(key, num, step=step, stream=stream, first=first, cipher=cipher)
