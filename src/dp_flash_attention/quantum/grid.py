"""The public grid: rounding to it, and what rounding does to the sensitivity.

Rounding to the nearest multiple of γ moves each coordinate by at most γ/2. Two neighbouring values x, x' are therefore
rounded to vectors that differ by at most ‖x − x'‖ + γ√d, and that is attained: d coordinates that all lie just below and
just above a half move by γ each. In units of the grid the sensitivity is Δ/γ + √d.

γ is a power of two, so that division and multiplication by it are exact in floating point.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_finite
from dp_flash_attention.quantum.values import MAX_MAGNITUDE, Integers, Vector

# Share of the sensitivity that rounding may add when nobody chose a grid: 1.6 % more noise at the most. A grid
# half as wide costs half a layer of the sampler.
DEFAULT_ROUNDING_SHARE = 1.0 / 64.0
_GRID_REMEDY = "Use 2.0**-k, or leave grid at None."
# Relative rounding of the few operations below.
_ROUNDING = 1e-14


def default_grid(l2_sensitivity: float, dimension: int, *, whole: bool) -> float:
    """Returns the widest power of two that adds at most 1/64 to the sensitivity; 1 for whole numbers."""
    if whole:
        return 1.0
    return math.ldexp(
        1.0, math.floor(math.log2(l2_sensitivity * DEFAULT_ROUNDING_SHARE / math.sqrt(dimension)))
    )


def checked_grid(grid: object, l2_sensitivity: float, dimension: int, *, whole: bool) -> float:
    """Returns ``grid`` if it is a power of two that does not drown the sensitivity.

    Raises:
        InvalidInputError: If it is none, or rounding would add more to the sensitivity than there is.
    """
    number = positive_finite("grid", grid, remedy=_GRID_REMEDY)
    if math.frexp(number)[0] != 0.5 or not 2.0**-500 < number < 2.0**500:
        raise InvalidInputError("grid", grid, bound="a power of two (exact in floats)", remedy=_GRID_REMEDY)
    added = 0.0 if lies_on_grid(number, whole=whole) else number * math.sqrt(dimension)
    if added > l2_sensitivity:
        raise InvalidInputError(
            "grid",
            grid,
            bound=f"at most {l2_sensitivity / math.sqrt(dimension):.3g}, where rounding {dimension} coordinates adds "
            f"as much as the sensitivity {l2_sensitivity:.6g}",
            remedy="Use a finer grid, or leave grid at None.",
        )
    return number


def lies_on_grid(grid: float, *, whole: bool) -> bool:
    """Whether every value of that type is a multiple of ``grid`` already, so that rounding does nothing."""
    return whole and grid <= 1.0


def sensitivity_on_grid(l2_sensitivity: float, grid: float, dimension: int, *, whole: bool) -> float:
    """Returns the L2 sensitivity of the rounded value in units of the grid, rounded up."""
    added = 0.0 if lies_on_grid(grid, whole=whole) else math.sqrt(dimension)
    bound = (l2_sensitivity / grid + added) * (1.0 + _ROUNDING)
    # Whole-numbered vectors have whole squared distances. Beyond 2^52 the floor is no smaller.
    squared = Fraction(bound) ** 2
    root = math.isqrt(squared.numerator // squared.denominator * 2**64)  # √(⌊bound²⌋)·2^32, rounded down
    return min(bound, (root + 1) / 2**32 * (1.0 + _ROUNDING))


def round_to_grid(vector: Vector, grid: float) -> Integers:
    """Returns the nearest multiples of ``grid``, as int64 counts of it.

    Raises:
        InvalidInputError: If a coordinate is more than 2^52 grid units large.
    """
    # torch works with several threads here; it rounds halves to even, as NumPy does.
    scaled = torch.from_numpy(vector) / grid
    low, high = torch.aminmax(scaled)
    if not max(-float(low), float(high)) <= MAX_MAGNITUDE:
        raise InvalidInputError(
            "value",
            "not shown",
            bound=f"at most 2^52 steps of the grid {grid!r} large",
            remedy="Widen the grid.",
        )
    rounded: Integers = scaled.round_().to(torch.int64).numpy()
    return rounded
