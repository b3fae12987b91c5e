"""Lattices with a rational basis: Gram–Schmidt, rounding to the nearest plane, and Klein's sampler. No floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Rational, Real
from typing import Any

import numpy as np

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.quantum.rational_sampler import RationalCoins, centred_discrete_gaussian

MAX_DIMENSION = 64

RationalVector = tuple[Fraction, ...]


@dataclass(frozen=True, kw_only=True)
class Lattice:
    """All whole combinations of the rows of ``basis``. Build one with ``lattice_from_rows``.

    Attributes:
        basis: Rows b_1, …, b_d, rational, of full rank.
        orthogonal: Gram–Schmidt vectors b̃_i, not normalised.
        squared_norms: ‖b̃_i‖², all above 0.
    """

    basis: tuple[RationalVector, ...]
    orthogonal: tuple[RationalVector, ...]
    squared_norms: tuple[Fraction, ...]

    @property
    def dimension(self) -> int:
        """Number of rows and of columns."""
        return len(self.basis)

    @property
    def gram_schmidt_norms(self) -> tuple[float, ...]:
        """‖b̃_i‖, rounded up."""
        return tuple(math.nextafter(math.sqrt(float(norm)), math.inf) for norm in self.squared_norms)

    @property
    def rounding_bound(self) -> float:
        """√Σ‖b̃_i‖²: how much further apart rounding can move two vectors."""
        return math.sqrt(math.fsum(norm**2 for norm in self.gram_schmidt_norms)) * (1.0 + 1e-14)

    def nearest_plane(self, target: RationalVector) -> tuple[int, ...]:
        """Returns the coefficients of the lattice point whose cell of Gram–Schmidt boxes holds ``target``.

        The remainder is Σ f_i·b̃_i with |f_i| ≤ 1/2, so rounding moves a vector by at most half of
        ``rounding_bound``. Source: Babai 1986.
        """
        return self._descend(target, lambda i, centre: round(centre))

    def klein(self, centre: RationalVector, variance: Fraction, coins: RationalCoins) -> tuple[int, ...]:
        """Returns the coefficients of a lattice point of Klein's law around ``centre``.

        Each coefficient, from the last to the first, is a discrete Gaussian of variance σ²/‖b̃_i‖² around what the
        later ones leave to it. How far that is from exp(−‖x−centre‖²/2σ²) is
        ``accounting.lattice_gaussian.lattice_distance``. Source: Klein 2000; Gentry, Peikert & Vaikuntanathan 2008,
        section 4.2.
        """
        return self._descend(
            centre,
            lambda i, middle: centred_discrete_gaussian(
                coins, variance=variance / self.squared_norms[i], centre=middle
            ),
        )

    def point(self, coefficients: Sequence[int]) -> RationalVector:
        """Returns Σ coefficients_i·b_i, exactly."""
        return tuple(
            sum((z * row[j] for z, row in zip(coefficients, self.basis, strict=True)), Fraction(0))
            for j in range(self.dimension)
        )

    def _descend(self, target: RationalVector, choose: Any) -> tuple[int, ...]:
        rest = list(target)
        chosen = [0] * self.dimension
        for i in range(self.dimension - 1, -1, -1):
            along = sum((a * b for a, b in zip(rest, self.orthogonal[i], strict=True)), Fraction(0))
            z = choose(i, along / self.squared_norms[i])
            chosen[i] = z
            rest = [a - z * b for a, b in zip(rest, self.basis[i], strict=True)]
        return tuple(chosen)


def lattice_from_rows(rows: object) -> Lattice:
    """Returns the lattice spanned by ``rows``, each number taken as the exact rational it is.

    Args:
        rows: A square matrix: nested sequences or a NumPy array of whole, rational or float numbers.

    Raises:
        InvalidInputError: If it is not square, holds something else, is larger than 64, or has not full rank.
    """
    remedy = "Pass d linearly independent rows of d numbers."
    listed = rows.tolist() if isinstance(rows, np.ndarray) else rows
    if not isinstance(listed, list | tuple) or not 0 < len(listed) <= MAX_DIMENSION:
        raise InvalidInputError("basis", type(rows).__name__, bound="a square matrix up to 64", remedy=remedy)
    basis = []
    for row in listed:
        if not isinstance(row, list | tuple) or len(row) != len(listed):
            raise InvalidInputError("basis", "not square", bound="a square matrix", remedy=remedy)
        basis.append(tuple(_rational(entry) for entry in row))
    orthogonal: list[RationalVector] = []
    norms: list[Fraction] = []
    for row in basis:
        vector = list(row)
        for other, norm in zip(orthogonal, norms, strict=True):
            share = sum((a * b for a, b in zip(row, other, strict=True)), Fraction(0)) / norm
            vector = [a - share * b for a, b in zip(vector, other, strict=True)]
        squared = sum((a * a for a in vector), Fraction(0))
        if squared == 0:
            raise InvalidInputError("basis", "of lower rank", bound="of full rank", remedy=remedy)
        orthogonal.append(tuple(vector))
        norms.append(squared)
    return Lattice(basis=tuple(basis), orthogonal=tuple(orthogonal), squared_norms=tuple(norms))


def _rational(entry: object) -> Fraction:
    usable = isinstance(entry, Rational | Real) and not isinstance(entry, bool)
    if not usable or (isinstance(entry, float) and not math.isfinite(entry)):
        raise InvalidInputError(
            "basis entry", entry, bound="a finite number", remedy="Use whole numbers or fractions."
        )
    assert isinstance(entry, int | float | Fraction)
    return Fraction(entry)
