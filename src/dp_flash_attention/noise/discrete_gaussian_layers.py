"""Wide discrete Gaussians as sums of narrow ones, x_1 + k·(x_2 + k·(x_3 + …)), with a certified distance.

Let x ~ N_ℤ(0, s²) and y ~ N_ℤ(0, t²) be independent and z = x + k·y. With σ² = s² + k²t², c = kt²/σ² and
v = s²t²/σ², completing the square in y gives

    P(z) = exp(-z²/(2σ²)) · Σ_y exp(-(y - cz)²/(2v)) / (normalisers),

so z differs from N_ℤ(0, σ²) only by the factor θ(cz), θ(u) = Σ_y exp(-(y - u)²/(2v)). By Poisson summation
θ(u) is proportional to 1 + 2·Σ_{j≥1} q^(j²)·cos(2πju) with q = exp(-2π²v), hence lies within 1 ± 2r of its mean over
u, r = q/(1 - q) ≥ Σ q^(j²). Therefore (``convolution_distance``)

    total variation ≤ r/(1 - 2r)          (½·E|θ - Eθ|/Eθ ≤ ½·sqrt(E(θ - 1)²)/(1 - 2r))
    P(z)/P_ideal(z) within [(1 - 2r)/(1 + 2r), (1 + 2r)/(1 - 2r)] for every z.

The bound is at most π/2 above the distance itself (|cos| has mean 2/π). It is computed for every combination
and never assumed: at s = t = 6, k = 8 is 2^-15 away, k = 4 2^-60 and k = 2 2^-205.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from numbers import Rational
from typing import Final

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_int
from dp_flash_attention.noise.discrete_gaussian_table import (
    TABLE_BITS,
    DiscreteGaussianTable,
    build_table,
    certify_table,
    checked_variance,
)
from dp_flash_attention.noise.exp_bounds import PI_LOW, exp_minus

MAX_VARIANCE: Final = Fraction(2**96)
DEFAULT_MAX_DISTANCE: Final = Fraction(1, 2**100)
# A table of standard deviation 24 is scanned as fast as two layers are.
_MAX_DIRECT_VARIANCE: Final = Fraction(24 * 24)
# A layer costs what its scan does and a fixed part: per bit of σ and 8,192 samples, 22 µs at k = 4 and 23 µs at k = 8
# (one core of an AMD EPYC 9004), and k = 8 leaves gaps of σ that no layer of at most 24 fills.
_MULTIPLIER: Final = 4
_SCALE_BITS: Final = 640


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The sum x_1 + k·(x_2 + k·(x_3 + …)) of independent narrow discrete Gaussians.

    Attributes:
        variances: σ² of x_1, x_2, …, bottom first.
        multiplier: k.
    """

    variances: tuple[Fraction, ...]
    multiplier: int

    @property
    def variance(self) -> Fraction:
        """σ² of the law that the sum stands for, exactly."""
        return _suffix_variance(self, 0)


@dataclass(frozen=True, kw_only=True)
class GaussianCertificate:
    """How far the sampled law is from N_ℤ(0, variance); rigorous bounds, as exact rational numbers.

    Attributes:
        variance: σ² of the ideal law: exactly the one that was asked for.
        layers: How the samples are put together.
        table_distance: Upper bound of the part of the distance that the tables' rounding makes.
        convolution_distance: Upper bound of the part that adding layers makes.
        largest: The largest magnitude that can come out.
    """

    variance: Fraction
    layers: Layers
    table_distance: Fraction
    convolution_distance: Fraction
    largest: int

    @property
    def total_variation(self) -> Fraction:
        """Upper bound of the total variation distance of one sample; that of N samples is at most N times it."""
        return self.table_distance + self.convolution_distance


def convolution_distance(variance: Rational, multiplier: int, upper_variance: Rational) -> Fraction:
    """Returns an upper bound of the total variation between x + k·y and N_ℤ(0, variance + k²·upper_variance).

    Returns 1, which bounds every distance, where the theorem in the module's docstring says nothing.
    """
    lower, upper = Fraction(variance), Fraction(upper_variance)
    smooth = lower * upper / (lower + multiplier**2 * upper)
    q = Fraction(exp_minus(2 * PI_LOW**2 * smooth, _SCALE_BITS).high, 1 << _SCALE_BITS)
    # r/(1 - 2r) with r = q/(1 - q).
    return min(Fraction(1), q / (1 - 3 * q)) if 3 * q < 1 else Fraction(1)


def plan_layers(variance: Rational, *, max_distance: Rational = DEFAULT_MAX_DISTANCE) -> Layers:
    """Returns layers whose variance is exactly ``variance`` and whose adding up costs at most ``max_distance``/2.

    Args:
        variance: σ², rational, between 1/64 and 2^96.
        max_distance: Bound of the total variation per sample.

    Raises:
        InvalidInputError: If an argument is out of range.
    """
    exact = checked_variance(variance, largest=MAX_VARIANCE)
    bound = _checked_distance(max_distance)
    if exact <= _MAX_DIRECT_VARIANCE:
        return Layers(variances=(exact,), multiplier=1)
    k = _MULTIPLIER
    for bottom in map(Fraction, range(k * k, int(_MAX_DIRECT_VARIANCE), k)):
        below: list[Fraction] = []
        rest = exact
        while rest > _MAX_DIRECT_VARIANCE:
            below.append(bottom)
            rest = (rest - bottom) / k**2
        layers = Layers(variances=(*below, rest), multiplier=k)
        if _layering_distance(layers) <= bound / 2:
            return layers
    raise InvalidInputError(
        "max_distance", log2_text(bound), bound="at least 2^-120", remedy="128-bit tables are no closer."
    )


def certify_layers(
    layers: Layers, *, max_distance: Rational = DEFAULT_MAX_DISTANCE
) -> tuple[GaussianCertificate, tuple[DiscreteGaussianTable, ...]]:
    """Builds the tables of ``layers``, bounds the distance of their sum, and returns both.

    Raises:
        InvalidInputError: If the combination is malformed, or its certified distance is above ``max_distance``.

    Guarantees:
        * Neighbouring relation, unit, sensitivity: the caller's. Public: the layers.
        * Theorem: the sum over layers of the tables' distances and of the layering distances bounds the total
          variation between the sampled law and N_ℤ(0, layers.variance). Replacing one table after the other by its
          ideal law, and one inner sum after the other (topmost first) by the ideal law of its variance, each step
          changes the whole sum by at most that step's own distance, because the rest is independent of it.
        * Source: Peikert 2010, "An Efficient and Parallel Gaussian Sampler for Lattices", theorem 3.1; Micciancio &
          Walter 2017, section 4; the explicit constant is derived in the module's docstring.
    """
    bound = _checked_distance(max_distance)
    if not layers.variances:
        raise InvalidInputError("layers", layers, bound="at least one variance", remedy="Use plan_layers.")
    positive_int("multiplier", layers.multiplier, remedy="Use plan_layers.")
    built = {variance: build_table(variance) for variance in dict.fromkeys(layers.variances)}
    tables = tuple(built[variance] for variance in layers.variances)
    distance = {variance: certify_table(table).total_variation for variance, table in built.items()}
    certificate = GaussianCertificate(
        variance=layers.variance,
        layers=layers,
        table_distance=sum((distance[variance] for variance in layers.variances), Fraction(0)),
        convolution_distance=_layering_distance(layers),
        largest=sum(layers.multiplier**i * (len(table.masses) - 1) for i, table in enumerate(tables)),
    )
    if certificate.total_variation > bound:
        raise InvalidInputError(
            f"the certified distance of layers {[str(v) for v in layers.variances]}, k = {layers.multiplier}",
            log2_text(certificate.total_variation),
            bound=f"at most {log2_text(bound)}",
            remedy=f"Use a smaller k or wider layers (plan_layers does; {TABLE_BITS}-bit tables end near 2^-120).",
        )
    return certificate, tables


def log2_text(value: Fraction) -> str:
    """Returns a positive fraction as a power of two rounded up to a tenth: ``"2^-125.0"``; and 0 as ``"0"``."""
    if value == 0:
        return "0"
    # value^10 <= 2^n exactly when value <= 2^(n/10).
    power = value**10
    n = power.numerator.bit_length() - power.denominator.bit_length()
    while power > Fraction(2) ** n:
        n += 1
    while power <= Fraction(2) ** (n - 1):
        n -= 1
    return f"2^{n / 10:.1f}"


def _suffix_variance(layers: Layers, start: int) -> Fraction:
    """σ² of the inner sum that begins with layer ``start``."""
    total = Fraction(0)
    for variance in reversed(layers.variances[start:]):
        total = variance + layers.multiplier**2 * total
    return total


def _layering_distance(layers: Layers) -> Fraction:
    return sum(
        (
            convolution_distance(layers.variances[i], layers.multiplier, _suffix_variance(layers, i + 1))
            for i in range(len(layers.variances) - 1)
        ),
        Fraction(0),
    )


def _checked_distance(max_distance: object) -> Fraction:
    exact = Fraction(max_distance) if isinstance(max_distance, Rational) else Fraction(0)
    if isinstance(max_distance, bool) or not 0 < exact < 1:
        raise InvalidInputError(
            "max_distance",
            max_distance,
            bound="a rational number strictly between 0 and 1",
            remedy="Use Fraction(1, 2**100).",
        )
    return exact
