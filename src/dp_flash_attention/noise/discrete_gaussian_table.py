"""The table of the discrete Gaussian N_ℤ(0, σ²), and the certificate of how far it is from it.

The ideal law is P(k) = exp(-k²/(2σ²))/Σ_j exp(-j²/(2σ²)) on all integers, σ² any rational number. The table
holds the law of the *magnitude*, Q(0) = P(0) and Q(m) = 2·P(m), as integer masses that add up to
2^precision_bits; a sign bit of its own, independent of the magnitude, makes X out of |X|. Zero has no sign,
so X = 0 has the mass Q(0) = P(0) whatever the bit says, and X = ±m has Q(m)/2 = P(m): no rejection, no special
case, and the sampled law is symmetric exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from numbers import Rational
from typing import Final

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_int
from dp_flash_attention.noise.exp_bounds import GaussianWeights, gaussian_weights

TABLE_BITS: Final = 128
MIN_VARIANCE: Final = Fraction(1, 64)
MAX_TABLE_VARIANCE: Final = Fraction(64 * 64)
# Enclosures are this much finer than a table's unit, and weights are followed this much further down.
_EXTRA_BITS: Final = 128


@dataclass(frozen=True, kw_only=True)
class TableCertificate:
    """How far the sampled law is from the ideal one; rigorous bounds, as exact rational numbers.

    Attributes:
        variance: σ² of the ideal law.
        precision_bits: The masses are multiples of 2^-precision_bits.
        largest: The largest magnitude that can come out.
        total_variation: Upper bound of the total variation distance, ½·Σ_k |P̂(k) - P(k)|.
        total_variation_low: Lower bound of the same distance; the two differ in no digit that is ever shown.
        tail_mass: Upper bound of the ideal probability of a magnitude above ``largest``.
    """

    variance: Fraction
    precision_bits: int
    largest: int
    total_variation: Fraction
    total_variation_low: Fraction
    tail_mass: Fraction


@dataclass(frozen=True, kw_only=True)
class DiscreteGaussianTable:
    """Integer masses of the magnitudes 0, 1, 2 and so on.

    Attributes:
        variance: σ² of the law that they stand for.
        precision_bits: The masses add up to 2^precision_bits.
        masses: Mass of each magnitude; the last one is not 0.

    Raises:
        InvalidInputError: If the masses are no law.
    """

    variance: Fraction
    precision_bits: int
    masses: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.masses or min(self.masses) < 0 or self.masses[-1] == 0:
            raise InvalidInputError(
                "masses", self.masses, bound="non-negative, the last above 0", remedy="Use build_table."
            )
        if sum(self.masses) != 1 << self.precision_bits:
            raise InvalidInputError(
                "the sum of masses",
                sum(self.masses),
                bound=f"exactly 2^{self.precision_bits}",
                remedy="Use build_table.",
            )

    def probability(self, value: int) -> Fraction:
        """Returns the exact probability with which ``value`` is sampled."""
        magnitude = abs(value)
        if magnitude >= len(self.masses):
            return Fraction(0)
        signs = 1 if magnitude == 0 else 2
        return Fraction(self.masses[magnitude], signs << self.precision_bits)


def build_table(variance: Rational, *, precision_bits: int = TABLE_BITS) -> DiscreteGaussianTable:
    """Returns the table of N_ℤ(0, variance), each mass the nearest multiple of 2^-precision_bits.

    What rounding leaves over goes to magnitude 0. ``certify_table`` says how far the result is from the law; it
    does not trust this function.

    Args:
        variance: σ², between 1/64 and 4096. Wider laws are sums of narrow ones (``discrete_gaussian_layers``).
        precision_bits: 128 for use; less only to show what it costs.

    Raises:
        InvalidInputError: If an argument is out of range.
    """
    exact = checked_variance(variance, largest=MAX_TABLE_VARIANCE)
    bits = positive_int("precision_bits", precision_bits, remedy=f"Use {TABLE_BITS}.")
    weights = _weights(exact, bits)
    masses = []
    for magnitude in range(1, len(weights.weights)):
        law = weights.magnitude_law(magnitude)
        doubled = law.low + law.high >> (weights.bits - bits)  # twice the middle, in the table's unit
        masses.append(doubled + 1 >> 1)
    while masses and masses[-1] == 0:
        masses.pop()
    rest = (1 << bits) - sum(masses)
    return DiscreteGaussianTable(variance=exact, precision_bits=bits, masses=(rest, *masses))


def certify_table(table: DiscreteGaussianTable) -> TableCertificate:
    """Returns the certificate of ``table``, computed from its integers and from enclosures of the ideal law.

    Guarantees:
        * Neighbouring relation, unit, sensitivity: the caller's. Public: the table.
        * Theorem: with T = ``total_variation``, N independent samples are within N·T of N ideal ones, so a
          mechanism that is (ε, δ)-private with ideal discrete Gaussian noise is (ε, δ + (1 + e^ε)·N·T)-private
          with sampled noise and truly random bits.
        * Proof and source: total variation adds up over independent samples; then
          P̂_x(S) ≤ P_x(S) + NT ≤ e^ε·P_y(S) + δ + NT ≤ e^ε·(P̂_y(S) + NT) + δ + NT (Dwork & Roth 2014, lemma 3.17).
    """
    weights = _weights(table.variance, table.precision_bits)
    shift = weights.bits - table.precision_bits
    low = high = 0
    for magnitude in range(max(len(weights.weights), len(table.masses))):
        mass = table.masses[magnitude] << shift if magnitude < len(table.masses) else 0
        if magnitude < len(weights.weights):
            law = weights.magnitude_law(magnitude)
            high += max(mass - law.low, law.high - mass)
            low += max(mass - law.high, law.low - mass, 0)
        else:
            # Past the weights the ideal law is at most the tail, which is added once below.
            high += mass
    tail = weights.tail_law()
    high += tail
    beyond = sum(weights.magnitude_law(m).high for m in range(len(table.masses), len(weights.weights)))
    unit = 1 << weights.bits
    return TableCertificate(
        variance=table.variance,
        precision_bits=table.precision_bits,
        largest=len(table.masses) - 1,
        total_variation=Fraction(high, 2 * unit),
        total_variation_low=Fraction(low, 2 * unit),
        tail_mass=Fraction(beyond + tail, unit),
    )


def hockey_stick_to_ideal(table: DiscreteGaussianTable, ratio: Rational) -> Fraction:
    """Returns an upper bound of the hockey-stick divergence between the sampled and the ideal law.

    That is the larger of Σ_k max(0, P̂(k) - ratio·P(k)) and Σ_k max(0, P(k) - ratio·P̂(k)). At ratio 1 both are
    the total variation; whoever accounts uses ratio = e^ε.

    Raises:
        InvalidInputError: If ``ratio`` is below 1.
    """
    exact = _checked_ratio(ratio)
    weights = _weights(table.variance, table.precision_bits)
    shift = weights.bits - table.precision_bits
    over = under = Fraction(0)
    for magnitude in range(max(len(weights.weights), len(table.masses))):
        mass = table.masses[magnitude] << shift if magnitude < len(table.masses) else 0
        known = magnitude < len(weights.weights)
        law_low = weights.magnitude_law(magnitude).low if known else 0
        law_high = weights.magnitude_law(magnitude).high if known else 0
        over += max(Fraction(0), mass - exact * law_low)
        under += max(Fraction(0), law_high - exact * mass)
    return max(over, under + weights.tail_law()) / (1 << weights.bits)


def hockey_stick_of_shift(table: DiscreteGaussianTable, shift: int, ratio: Rational) -> Fraction:
    """Returns Σ_k max(0, P̂(k - shift) - ratio·P̂(k)), exactly: δ of one released integer at ratio = e^ε.

    It speaks of the sampled law itself, so no distance to an ideal one enters. By symmetry the divergence in the
    other direction is the same.

    Raises:
        InvalidInputError: If ``ratio`` is below 1.
    """
    exact = _checked_ratio(ratio)
    reach = len(table.masses) - 1 + abs(shift)
    return sum(
        (
            max(Fraction(0), table.probability(k - shift) - exact * table.probability(k))
            for k in range(-reach, reach + 1)
        ),
        Fraction(0),
    )


def checked_variance(variance: object, *, largest: Fraction) -> Fraction:
    """Returns ``variance`` as an exact fraction.

    Raises:
        InvalidInputError: If it is not rational or out of range.
    """
    bound = f"a rational number between {MIN_VARIANCE} and {largest}"
    if isinstance(variance, bool) or not isinstance(variance, Rational):
        raise InvalidInputError("variance", variance, bound=bound, remedy="Pass a Fraction or an int.")
    exact = Fraction(variance)
    if not MIN_VARIANCE <= exact <= largest:
        raise InvalidInputError(
            "variance", str(variance), bound=bound, remedy="Choose a grid that is finer or coarser."
        )
    return exact


def _weights(variance: Fraction, precision_bits: int) -> GaussianWeights:
    bits = precision_bits + _EXTRA_BITS
    return gaussian_weights(variance, bits + 64, negligible_bits=bits)


def _checked_ratio(ratio: object) -> Fraction:
    if isinstance(ratio, bool) or not isinstance(ratio, Rational) or ratio < 1:
        raise InvalidInputError(
            "ratio", ratio, bound="a rational number of at least 1", remedy="Round e^ε down to a Fraction."
        )
    return Fraction(ratio)
