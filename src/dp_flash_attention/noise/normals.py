"""Integers to standard normals by Box and Muller's transform, with the full tail.

A pair of normals is r·sin(φ) and r·cos(φ) with independent signs, where r² = -2·ln U, U uniform on (0, 1) and φ
uniform on (0, π/2).

Resolution, float32 (radius word w: 32 bits, angle word a: 32 bits):
    * U = (w + 1/2)/2^32, computed in float64 and therefore exact. If w < ``REFINE_BELOW`` = 2^19, a second word v refines the
      cell: U = (w·2^32 + v + 1/2)/2^64 (at most 52 significant bits: exact in float64 too). Neighbouring radii
      outside the refined part differ by less than one unit in the last place of float32 for every r > 2 (at w = 2^19,
      r = 4.25: spacing 4.5e-7, unit 4.8e-7); inside it by less still. The largest r is sqrt(2·65·ln 2) = 9.49, reached with probability 2^-64;
      nothing is clamped. A generator whose uniform is clamped at 1e-7 stops at 5.68.
    * Near r = 0 the spacing of r² is 2^-31. The two numbers stay smooth there because the angle is.
    * a: its top two bits are the two signs, so a sign is never derived from a magnitude. The other 30 bits b give
      φ = (b + 1/2)·π/2^31. cos φ is computed as sin(π/2 - φ) from the complement of b, an exact integer step: both factors keep
      float32's relative precision next to zero.
Resolution, float64: U has 64 bits and is evaluated as -ln(U) below 1/2 and as -log1p(-(1-U)) above, so r keeps its relative
precision at both ends; the largest r is again 9.49. The angle has 62 bits and two sign bits.

Element functions (log, sin, sqrt) are torch's: within 1 unit in the last place or so, and not the same on all
processors. The integers are the same everywhere; the normals are the same bytes on one machine and one torch version.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from dp_flash_attention.noise.keystream import TILE_PAIRS, Indices, Words32

REFINE_BELOW = 1 << 19

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Words64 = npt.NDArray[np.uint64]
Refine = Callable[[Indices], Words32]


def uniforms_float32(radius_words: Words32, refine: Refine) -> Float64s:
    """Returns U in (0, 1), exactly, for float32 normals.

    Args:
        radius_words: uint32, any shape, C order.
        refine: Maps flat indices into ``radius_words`` to the refining words there.
    """
    uniforms = np.multiply(radius_words, 2.0**-32, dtype=np.float64)
    uniforms += 2.0**-33
    small = np.flatnonzero(radius_words.reshape(-1) < REFINE_BELOW)
    if len(small):
        words = radius_words.reshape(-1)[small].astype(np.float64)
        uniforms.reshape(-1)[small] = words * 2.0**-32 + (refine(small).astype(np.float64) + 0.5) * 2.0**-64
    return uniforms


def _in_place(function: Callable[..., torch.Tensor], values: npt.NDArray[np.float32] | Float64s) -> None:
    tensor = torch.from_numpy(values)
    function(tensor, out=tensor)


def normals_float32(words: Words32, refine: Refine, stddev: np.float32) -> Float32s:
    """Returns normals for whole tiles of words (layout in ``keystream.py``).

    Args:
        words: uint32 [tiles, 2, ``TILE_PAIRS``]: radius words, angle words.
        refine: Maps flat pair indices, counted from the first tile, to refining words.
        stddev: Standard deviation of the result.

    Returns:
        float32 [tiles, 2, ``TILE_PAIRS``].
    """
    uniforms = uniforms_float32(np.ascontiguousarray(words[:, 0, :]), refine)
    _in_place(torch.log, uniforms)
    uniforms *= -2.0
    radius = uniforms.astype(np.float32)
    _in_place(torch.sqrt, radius)
    radius *= stddev
    angle = np.ascontiguousarray(words[:, 1, :])
    quarter = angle & np.uint32(0x3FFFFFFF)
    result = np.empty((len(words), 2, TILE_PAIRS), dtype=np.float32)
    for position, (sign, bits) in enumerate(((angle, quarter), (angle << np.uint32(1), quarter ^ np.uint32(0x3FFFFFFF)))):
        phase = bits.view(np.int32).astype(np.float32)
        phase += np.float32(0.5)
        phase *= np.float32(math.pi / 2**31)
        _in_place(torch.sin, phase)
        phase *= radius
        np.bitwise_xor(phase.view(np.uint32), sign & np.uint32(0x80000000), out=phase.view(np.uint32))
        result[:, position, :] = phase
    return result


def normals_float64(words: Words64, stddev: float) -> Float64s:
    """Returns normals for whole tiles of words.

    Args:
        words: uint64 [tiles, 2, ``TILE_PAIRS``]: radius words, angle words.
        stddev: Standard deviation of the result.

    Returns:
        float64 [tiles, 2, ``TILE_PAIRS``].
    """
    radius_words, angle = np.ascontiguousarray(words[:, 0, :]), np.ascontiguousarray(words[:, 1, :])
    low = (radius_words.astype(np.float64) + 0.5) * 2.0**-64
    high = ((~radius_words).astype(np.float64) + 0.5) * 2.0**-64
    log_low = torch.log(torch.from_numpy(low))
    log_high = torch.log1p(torch.from_numpy(-high))
    radius = torch.where(torch.from_numpy(low < 0.5), log_low, log_high).mul_(-2.0).sqrt_().mul_(stddev).numpy()
    quarter = angle & np.uint64(2**62 - 1)
    result = np.empty((len(words), 2, TILE_PAIRS), dtype=np.float64)
    for position, (sign, bits) in enumerate(((angle, quarter), (angle << np.uint64(1), quarter ^ np.uint64(2**62 - 1)))):
        phase = (bits.astype(np.float64) + 0.5) * (math.pi / 2**63)
        _in_place(torch.sin, phase)
        phase *= radius
        np.bitwise_xor(phase.view(np.uint64), sign & np.uint64(1 << 63), out=phase.view(np.uint64))
        result[:, position, :] = phase
    return result
