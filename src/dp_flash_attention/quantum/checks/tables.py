"""Checks of exact noise: its tables, its tail and its layers, recomputed in decimal arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Final

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import (
    DiscreteGaussianGenerator,
    Layers,
    TestKey,
    certify_layers,
    certify_table,
)
from dp_flash_attention.quantum.decimal_law import (
    convolution_total_variation,
    largest_relative_error,
    log2,
    total_variation,
)
from dp_flash_attention.quantum.evidence import Evidence, NamedCheck

MAX_TABLE_LOG2: Final = -120.0
MAX_LAYER_LOG2: Final = -100.0
# A certificate is a bound, and no looser than the distance itself by more than this many bits.
_TABLE_SLACK: Final = 1e-6
# At 6σ to 9σ the ideal mass is 2^-26 to 2^-60 or so, and a unit of the table 2^-128.
_TAIL_LOG2: Final = -60.0
_CARELESS: Final = Layers(variances=(Fraction(36), Fraction(36)), multiplier=8)


def tables_checks(*, deep: bool = False) -> list[NamedCheck]:
    """Returns the checks of this subject.

    Args:
        deep: Whether to look at more standard deviations.
    """
    stddevs = [Fraction(4), Fraction(32), Fraction(5000)]
    if deep:
        stddevs += [Fraction(1, 2), Fraction(23), Fraction(10**6 + 1, 7), Fraction(2**40)]
    return [
        *((f"tables at σ = {stddev}", partial(check_stddev, stddev)) for stddev in stddevs),
        ("careless convolution is refused", careless_convolution),
    ]


def check_stddev(stddev: Fraction) -> Iterator[Evidence]:
    """Yields what ``check_generator`` does of the generator of ``stddev``."""
    yield from check_generator(DiscreteGaussianGenerator(TestKey("tables"), stddev=stddev))


def check_generator(generator: DiscreteGaussianGenerator) -> Iterator[Evidence]:
    """Yields the distance of each table, the shape of its tail, and the distance that adding layers makes."""
    label = f"σ² = {float(generator.variance):.6g}"
    tables = {table.variance: table for table in generator.tables}
    for variance, table in tables.items():
        name = f"{label}, table of σ² = {float(variance):.6g}"
        found = log2(total_variation(variance, table.masses, table.precision_bits))
        yield Evidence(
            name=f"{name}: distance",
            claim="The table's total variation to the discrete Gaussian is below 2^-120.",
            measured=f"2^{found:.2f}, {table.precision_bits}-bit masses",
            bound=f"2^{MAX_TABLE_LOG2:g}",
            holds=found <= MAX_TABLE_LOG2,
            basis="computed",
        )
        certified = math.log2(certify_table(table).total_variation)
        yield Evidence(
            name=f"{name}: certificate",
            claim="The certificate states the distance that other code, in decimal arithmetic, finds.",
            measured=f"certified 2^{certified:.4f}, found 2^{found:.4f}",
            bound=f"at most {_TABLE_SLACK:g} bits apart",
            holds=abs(certified - found) <= _TABLE_SLACK,
            basis="computed",
        )
        yield _tail(name, variance, table.masses, table.precision_bits)
    yield from _layers(label, generator)


def _tail(name: str, variance: Fraction, masses: tuple[int, ...], precision_bits: int) -> Evidence:
    stddev = math.sqrt(variance)
    first, last = math.ceil(6 * stddev), math.floor(9 * stddev)
    error = largest_relative_error(variance, masses, precision_bits, first=first, last=last)
    return Evidence(
        name=f"{name}: tail",
        claim="Every magnitude from 6σ to 9σ has its ideal probability; none is cut off.",
        measured=f"largest relative error 2^{log2(error):.1f}, largest magnitude {(len(masses) - 1) / stddev:.1f} σ",
        bound=f"2^{_TAIL_LOG2:g}",
        holds=error <= Decimal(2) ** int(_TAIL_LOG2),
        basis="computed",
    )


def _layers(label: str, generator: DiscreteGaussianGenerator) -> Iterator[Evidence]:
    """The topmost pair, summed term by term; it is the farthest one, for distance falls as the upper layer widens."""
    layers = generator.certificate.layers
    stated = generator.certificate.total_variation
    yield Evidence(
        name=f"{label}: certified distance",
        claim="The certified distance of one sample is below 2^-100.",
        measured=f"2^{math.log2(stated):.1f} over {len(layers.variances)} layers, k = {layers.multiplier}",
        bound=f"2^{MAX_LAYER_LOG2:g}",
        holds=math.log2(stated) <= MAX_LAYER_LOG2,
        basis="computed",
    )
    if len(layers.variances) == 1:
        return
    lower, upper = layers.variances[-2:]
    found = log2(convolution_total_variation(lower, layers.multiplier, upper))
    certified = math.log2(generator.certificate.convolution_distance)
    pairs = len(layers.variances) - 1
    yield Evidence(
        name=f"{label}: topmost convolution",
        claim="Adding the two topmost layers, summed term by term, stays below 2^-100.",
        measured=f"2^{found:.2f} at σ² = {float(lower):.4g} + {layers.multiplier}²·{float(upper):.4g}",
        bound=f"2^{MAX_LAYER_LOG2:g}",
        holds=found <= MAX_LAYER_LOG2,
        basis="computed",
    )
    yield Evidence(
        name=f"{label}: convolution's certificate",
        claim="The certificate of adding layers is a bound for the topmost pair's distance.",
        measured=f"certified 2^{certified:.2f} for {pairs} pairs, topmost found 2^{found:.2f}",
        bound="certified ≥ found",
        holds=certified >= found,
        basis="computed",
    )


def careless_convolution() -> Iterator[Evidence]:
    """Yields whether k = 8 on two layers of σ = 6 is found to be 2^-16 away, and refused."""
    found = log2(convolution_total_variation(Fraction(36), 8, Fraction(36)))
    try:
        certificate, _ = certify_layers(_CARELESS, max_distance=Fraction(1, 2**60))
        answer, refused = f"accepted at 2^{math.log2(certificate.total_variation):.1f}", False
    except InvalidInputError as error:
        answer, refused = f"refused: it is {error.value}", True
    yield Evidence(
        name="σ = 6, k = 8",
        claim="A combination that is too far from the law for the bound asked (2^-60) is refused.",
        measured=f"{answer}; summed term by term 2^{found:.2f}",
        bound="refused, and within a bit of the sum",
        holds=refused and round(found) == -16,
        basis="computed",
    )
