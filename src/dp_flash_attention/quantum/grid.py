"""The public grid: rounding to it, and what rounding does to the sensitivity.

Rounding to the nearest multiple of γ moves each coordinate by at most γ/2. Two neighbouring values x, x' are therefore
rounded to vectors that differ by at most ‖x − x'‖ + γ√d, and that is attained: d coordinates that all lie just below and
just above a half move by γ each. In units of the grid the sensitivity is Δ/γ + √d.

γ is a power of two, so that division and multiplication by it are exact in floating point. What is more than 2^52 steps
large saturates there, and NaN counts as 0: each coordinate by itself, so no two values end up further apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_finite
from dp_flash_attention.noise.chunk_threads import ChunkThreads
from dp_flash_attention.quantum.values import MAX_MAGNITUDE, Integers, Vector, write_bounded

# Share of the sensitivity that rounding may add when nobody chose a grid: 1.6 % more noise at the most. A grid
# half as wide costs half a layer of the sampler.
DEFAULT_ROUNDING_SHARE = 1.0 / 64.0
_GRID_REMEDY = "Use 2.0**-k, or leave grid at None."
_CHUNK = 1 << 15
_REACH = int(MAX_MAGNITUDE)
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
        raise InvalidInputError(
            "grid", grid, bound="a power of two from 2^-499 to 2^499", remedy=_GRID_REMEDY
        )
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
    """Returns the nearest multiples of ``grid``, halves to even, as int64 counts of it, saturated at ±2^52."""
    counts = np.empty(vector.shape, dtype=np.float64)
    write_steps(vector, counts, grid)
    return counts.astype(np.int64)


class OnGrid:
    """Where a stream of noise ends: writes (round(flat/grid) + noise)·grid, each piece while it is in the cache.

    Rounding is that of ``round_to_grid``; rounding to the result's dtype comes last. Pieces may come in any order and from
    several threads.

    Args:
        flat: float32, float64 or int64 [d].
        grid: A power of two.
        steps: Whether the result counts steps of the grid, int64, rather than being scaled back.

    Attributes:
        out: The result: of the dtype of ``flat``, but float64 for whole numbers off their own grid.
    """

    def __init__(self, flat: npt.NDArray[Any], grid: float, *, steps: bool = False) -> None:
        self._flat, self._grid, self._steps = flat, grid, steps
        self._whole = flat.dtype == np.int64 and grid == 1.0
        whole_result = steps or self._whole
        dtype = np.dtype(np.float64) if flat.dtype == np.int64 else flat.dtype
        self.out: npt.NDArray[Any] = np.empty(flat.shape, np.int64 if whole_result else dtype)

    def __call__(self, start: int, noise: npt.NDArray[Any]) -> None:
        """Writes what ``noise``, int32 or int64 and at most 2^52 in magnitude, makes of the numbers from ``start`` on."""
        scratch = np.empty(min(_CHUNK, len(noise)), dtype=np.float64)
        for first in range(0, len(noise), _CHUNK):
            part = noise[first : first + _CHUNK]
            self._write(scratch[: len(part)], start + first, part)

    def _write(self, numbers: Vector, start: int, noise: npt.NDArray[Any]) -> None:
        part, out = self._flat[start : start + len(noise)], self.out[start : start + len(noise)]
        if self._whole:
            np.clip(part, -_REACH, _REACH, out=out)
            out += noise
            return
        write_steps(part, numbers, self._grid)
        # Doubles hold sums of two whole numbers of at most 2^52 each.
        np.add(numbers, noise, out=numbers)
        if not self._steps:
            np.multiply(numbers, self._grid, out=numbers)
        with np.errstate(over="ignore"):  # float32 rounds to infinity, in silence
            np.copyto(out, numbers, casting="unsafe")


def write_steps(part: npt.NDArray[Any], out: Vector, grid: float) -> None:
    """Writes what ``round_to_grid`` makes of ``part``, as whole doubles; a zero may have either sign."""
    write_bounded(part, out, limit=MAX_MAGNITUDE, scale=1.0 / grid)
    np.rint(out, out=out)


def rounded_steps(
    flat: npt.NDArray[Any], grid: float, each: Callable[[int, Vector], None], *, piece: int
) -> Vector:
    """Returns what ``round_to_grid`` makes of ``flat``, as whole doubles with zeros positive, on torch's number of threads.

    Args:
        flat: float32, float64 or int64 [d].
        grid: A power of two.
        each: Called with the place and the numbers of every piece once it is written.
        piece: Numbers in a piece.
    """
    out = np.empty(flat.shape, dtype=np.float64)

    def write_piece(worker: None, start: int) -> None:
        stop = min(start + piece, len(out))
        for first in range(start, stop, _CHUNK):
            part = slice(first, min(first + _CHUNK, stop))
            write_steps(flat[part], out[part], grid)
            np.add(out[part], 0.0, out=out[part])  # −0 + 0 is 0
        each(start, out[start:stop])

    threads: ChunkThreads[None] = ChunkThreads(lambda: None, chunk=piece)
    threads.run(write_piece, len(flat), num_threads=torch.get_num_threads())
    return out
