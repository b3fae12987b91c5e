"""Integers to normals by Box and Muller's transform, with the full tail.

With U uniform on (0, 1), r² = -2·ln U and an independent uniform direction, the two coordinates are
independent standard normals.

Resolution, float32 (a radius word w and an angle word a of 32 bits each):
    * Radius. U = (w + 1/2)/2^32. If w < ``REFINE_BELOW`` = 2^19, a second word v splits the cell: U =
      (w·2^32 + v + 1/2)/2^64. Where it is not split, neighbouring radii above 2 differ by less than one
      unit in the last place of float32 (at w = 2^19, r = 4.25: 4.5e-7 against 4.8e-7), and the largest r is
      sqrt(2·65·ln 2) = 9.49, reached with probability 2^-64. Nothing is clamped; a generator that clamps
      its uniform at 1e-7 never passes 5.68. Next to r = 0 the spacing of r² is 2^-31; the density of a
      coordinate, smoothed by the angle, then ripples by a relative 1e-5 on a scale of 2^-31/|z|, which
      float32 can represent only for |z| < 0.06 and which integrates to a total variation of about 1e-7.
    * ln U in float32 would lose w's low byte near U = 1, so it is taken as ln(h/2^24) + (l + 1/2)/(256·h)
      with w = 256·h + l, whose neglected square is below 2^-23 beside |ln U| > 9, and far below a unit in
      the last place elsewhere.
    * Direction. a's top bit says which coordinate is the larger one, its lowest bit is the sign of the
      larger one, and the 30 bits between are an odd signed multiple x of 2^-30: φ = x·π/4 in (-π/4, π/4),
      the angle to the larger one's axis. So the smaller coordinate is r·sin φ, with float32's relative
      precision down to 2^-30, and the larger sqrt(r² - (r·sin φ)²), which cancels nothing as sin² φ <= 1/2.
      Every sign has a bit of its own.
Resolution, float64: U has 64 bits, -ln U is taken from U below 1/2 and from 1 - U above, so r keeps its
relative precision at both ends; the largest r is again 9.49. The angle has 62 bits and two sign bits.

float32 uses only IEEE-exact operations and one logarithm (NumPy's, within 4 units in the last place), so
another machine or NumPy version may differ in the last bits; the integers never do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from dp_flash_attention.noise.keystream import TILE_PAIRS, Indices, Words32

REFINE_BELOW: Final = 1 << 19

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Words64 = npt.NDArray[np.uint64]
Refine = Callable[[Indices], Words32]

_REFINE_BELOW_UNIFORM: Final = np.float32(REFINE_BELOW / 2**32)
# Cephes sinf (Moshier 1992): |error| < 1 unit in the last place on [-π/4, π/4].
_SIN_3: Final = np.float32(-1.6666654611e-1)
_SIN_5: Final = np.float32(8.3321608736e-3)
_SIN_7: Final = np.float32(-1.9515295891e-4)


class Float32Transform:
    """Box and Muller in float32, in place in its own scratch. Not shared between threads.

    Each line below is one pass over arrays that stay in the second-level cache; a temporary would cost more
    than the arithmetic, so every pass has an output.

    Args:
        max_tiles: Most tiles of one call.
    """

    def __init__(self, max_tiles: int) -> None:
        self._scratch = np.empty((5, max_tiles, TILE_PAIRS), dtype=np.float32)
        self._small = np.empty((max_tiles, TILE_PAIRS), dtype=np.bool_)

    def write(self, words: Words32, refine: Refine, two_variance: np.float32, out: Float32s) -> None:
        """Overwrites ``out`` with normals.

        Args:
            words: uint32 [tiles, 2, ``TILE_PAIRS``]: radius words, angle words.
            refine: Maps flat pair indices, counted from the first tile, to refining words.
            two_variance: Twice the variance of the result.
            out: float32 [tiles, 2, ``TILE_PAIRS``].
        """
        radius_squared, smaller, larger, spare, _ = self._scratch[:, : len(words)]
        self._log_uniform(words[:, 0], refine, radius_squared)
        np.multiply(radius_squared, -two_variance, out=radius_squared)
        self._sin(words[:, 1], smaller)
        np.sqrt(radius_squared, out=spare)
        np.multiply(smaller, spare, out=smaller)
        np.multiply(smaller, smaller, out=larger)
        np.subtract(radius_squared, larger, out=larger)
        np.sqrt(larger, out=larger)
        signed = np.int32
        self._place(words[:, 1].view(signed), smaller.view(signed), larger.view(signed), out.view(signed))

    def _log_uniform(self, words: Words32, refine: Refine, out: Float32s) -> None:
        _, high, low, _, integers = self._scratch[:, : len(words)]
        bits = integers.view(np.uint32)
        np.right_shift(words, np.uint32(8), out=bits)
        np.copyto(high, bits.view(np.int32), casting="unsafe")
        np.multiply(high, np.float32(2.0**-24), out=high)
        np.bitwise_and(words, np.uint32(255), out=bits)
        np.copyto(low, bits.view(np.int32), casting="unsafe")
        np.multiply(low, np.float32(2.0**-32), out=low)
        np.add(low, np.float32(2.0**-33), out=low)
        # h = 0 divides by zero here; those entries are all refined below.
        with np.errstate(divide="ignore", invalid="ignore"):
            np.divide(low, high, out=low)
            np.log(high, out=out)
            np.add(out, low, out=out)
        small = self._small[: len(words)]
        np.less(high, _REFINE_BELOW_UNIFORM, out=small)
        pairs = np.flatnonzero(small)
        if len(pairs):
            radius = words[pairs // TILE_PAIRS, pairs % TILE_PAIRS].astype(np.float64)
            # At most 52 significant bits: exact.
            refined = (radius * 2.0**32 + refine(pairs) + 0.5) * 2.0**-64
            out.reshape(-1)[pairs] = np.log(refined)

    def _sin(self, words: Words32, out: Float32s) -> None:
        _, _, phase, square, integers = self._scratch[:, : len(words)]
        bits = integers.view(np.uint32)
        # The lowest bit is the other coordinate's sign: 1 in its place makes x odd, so that -x is as likely
        # as x.
        np.bitwise_or(words, np.uint32(1), out=bits)
        np.left_shift(bits, np.uint32(1), out=bits)
        np.copyto(phase, bits.view(np.int32), casting="unsafe")
        np.multiply(phase, np.float32(math.pi / 2**33), out=phase)
        np.multiply(phase, phase, out=square)
        np.multiply(square, _SIN_7, out=out)
        np.add(out, _SIN_5, out=out)
        np.multiply(out, square, out=out)
        np.add(out, _SIN_3, out=out)
        np.multiply(out, square, out=out)
        np.multiply(out, phase, out=out)
        np.add(out, phase, out=out)

    def _place(
        self,
        words: npt.NDArray[np.int32],
        smaller: npt.NDArray[np.int32],
        larger: npt.NDArray[np.int32],
        out: npt.NDArray[np.int32],
    ) -> None:
        """Gives the larger coordinate its sign and swaps the two where the top bit says so, as integers."""
        swap, bits = (self._scratch[index, : len(words)].view(np.int32) for index in (3, 4))
        np.left_shift(words, np.int32(31), out=bits)
        np.bitwise_or(larger, bits, out=larger)
        np.right_shift(words, np.int32(31), out=swap)
        np.bitwise_xor(smaller, larger, out=bits)
        np.bitwise_and(swap, bits, out=swap)
        np.bitwise_xor(smaller, swap, out=out[:, 0])
        np.bitwise_xor(larger, swap, out=out[:, 1])


def normals_float64(words: Words64, stddev: float) -> Float64s:
    """Returns normals for whole tiles of words.

    Args:
        words: uint64 [tiles, 2, ``TILE_PAIRS``]: radius words, angle words.
        stddev: Standard deviation of the result.

    Returns:
        float64 [tiles, 2, ``TILE_PAIRS``].
    """
    radius_words, angle = np.ascontiguousarray(words[:, 0]), np.ascontiguousarray(words[:, 1])
    uniform = (radius_words.astype(np.float64) + 0.5) * 2.0**-64
    complement = ((~radius_words).astype(np.float64) + 0.5) * 2.0**-64
    # The unused branch may see 1.0, whose log1p(-1) is infinite.
    with np.errstate(divide="ignore"):
        log_uniform = np.where(uniform < 0.5, np.log(uniform), np.log1p(-complement))
    radius = np.sqrt(-2.0 * log_uniform) * stddev
    quarter = angle & np.uint64(2**62 - 1)
    result = np.empty(words.shape, dtype=np.float64)
    # The cosine is the sine of the complement, an exact integer step, so both are precise next to zero.
    for position, bits in enumerate((quarter, quarter ^ np.uint64(2**62 - 1))):
        magnitude = np.sin((bits.astype(np.float64) + 0.5) * (math.pi / 2**63)) * radius
        sign = (angle << np.uint64(position)) & np.uint64(1 << 63)
        result[:, position] = (magnitude.view(np.uint64) | sign).view(np.float64)
    return result
