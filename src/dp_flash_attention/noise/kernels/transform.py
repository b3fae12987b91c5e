"""Box and Muller in float32 as Triton device functions: the map of ``normals.py``, with its full tail.

The map from words to normals is the one that ``normals.py`` documents; only the rounding differs:

* ln U is taken as e·ln 2 + log1p(x), x = m - 1 + (low byte), with Cephes' polynomial, instead of NumPy's log
  plus a quotient. Next to U = 1 the sum m - 1 + low is exact, so this form is the more precise one there.
* A refined uniform (w·2^32 + v + 1/2)/2^64 is rounded to float32 before its logarithm, which is then at least 9
  in magnitude: an error of 2^-23 in ln U beside a unit in the last place of 2^-20.
* The sine and the placing of signs are the same operations in the same order.

Only additions, products, shifts and one square root: no approximate logarithm or sine of the hardware, whose
absolute error of 2^-22 next to U = 1 would be felt. A compiler may fuse a product and a sum.
"""

import triton
import triton.language as tl

from dp_flash_attention.noise.kernels.words import unit_words
from dp_flash_attention.noise.keystream import Domain
from dp_flash_attention.noise.normals import REFINE_BELOW

_REFINE_BELOW = tl.constexpr(REFINE_BELOW)
_FLOAT32 = tl.constexpr(int(Domain.FLOAT32))
_FLOAT32_REFINEMENT = tl.constexpr(int(Domain.FLOAT32_REFINEMENT))


@triton.jit
def _log(value, low, shift):
    """Returns ln((value + low)/2^shift) for value of at least 1/2, 0 <= low < 1, at most low = value·2^-11."""
    # m in [sqrt(1/2), sqrt(2)): 0x3F3504F3 is sqrt(1/2), so the arithmetic shift rounds to the nearer power.
    bits = value.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    inverse_power = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    x = (mantissa - 1.0) + low * inverse_power
    # Cephes logf (Moshier 1992): |error| about one unit in the last place.
    square = x * x
    y = x * 7.0376836292e-2 - 1.1514610310e-1
    y = y * x + 1.1676998740e-1
    y = y * x - 1.2420140846e-1
    y = y * x + 1.4249322787e-1
    y = y * x - 1.6668057665e-1
    y = y * x + 2.0000714765e-1
    y = y * x - 2.4999993993e-1
    y = y * x + 3.3333331174e-1
    y = y * x * square
    # ln 2 in two parts; the first has 9 bits, so its product with the exponent is exact.
    power = (exponent - shift).to(tl.float32)
    y = y + power * -2.12194440e-4
    y = y - 0.5 * square
    return (x + y) + power * 0.693359375


@triton.jit
def _sin(angle):
    phase = ((angle | 1) << 1).to(tl.int32, bitcast=True).to(tl.float32) * 3.6572951981346544e-10  # π/2^33
    square = phase * phase
    y = square * -1.9515295891e-4 + 8.3321608736e-3
    y = y * square - 1.6666654611e-1
    return y * square * phase + phase


@triton.jit
def box_muller(radius, angle, refinement, two_variance):
    """Returns the two normals of each pair of words, float32 of the words' shape.

    Args:
        radius: Radius words, uint32 of any shape.
        angle: Angle words, of the same shape.
        refinement: Refining words; those of pairs that need none are ignored.
        two_variance: Twice the variance, a float32 scalar.
    """
    # 24 bits are exact in float32; the low byte is added beside them.
    value = (radius >> 8).to(tl.float32)
    low = (radius & 255).to(tl.float32) * 0.00390625 + 0.001953125
    refined = radius.to(tl.float32) * 4294967296.0 + refinement.to(tl.float32) + 0.5
    small = radius < _REFINE_BELOW
    log_uniform = _log(tl.where(small, refined, value), tl.where(small, 0.0, low), tl.where(small, 64, 24))
    radius_squared = log_uniform * -two_variance
    smaller = _sin(angle) * tl.sqrt(radius_squared)
    larger = tl.sqrt(radius_squared - smaller * smaller)
    # The lowest bit is the larger one's sign, the top bit says which comes first.
    larger_bits = larger.to(tl.uint32, bitcast=True) | (angle << 31)
    larger = larger_bits.to(tl.float32, bitcast=True)
    swap = angle >= 0x80000000
    return tl.where(swap, larger, smaller), tl.where(swap, smaller, larger)


@triton.jit
def _anchored_lanes(anchor, LANES: tl.constexpr):
    """Returns 0..LANES-1 as uint64, in a register layout that later joins keep.

    Triton takes layouts from loads. Without one it moves the words through shared memory at each of the joins
    in ``words.py``: 90 barriers instead of 18 in the program for sm_90 (triton 3.7.1, two tiles, four warps).
    So each lane loads the same word and shifts it out by 32 bits: it cannot change a lane's number, whatever it
    is, and whoever writes to it meanwhile.
    """
    lane = tl.arange(0, LANES)
    word = tl.load(anchor + lane * 0).to(tl.uint32, bitcast=True)
    return lane.to(tl.uint64) + ((word >> 31) >> 1)


@triton.jit
def tile_normals(
    key,
    tile,
    stream,
    step,
    two_variance,
    anchor,
    CIPHER: tl.constexpr,
    TILES: tl.constexpr,
):
    """Returns the normals of ``TILES`` consecutive tiles in order, float32 [2048·TILES].

    The refining words are computed only if one of the tiles' radius words needs them: with probability 0.12
    for each tile.

    Args:
        key: Tuple of eight uint32 scalars, see ``words.py``.
        tile: Index of the first tile, uint64.
        stream: Number of the stream, uint32.
        step: Logical step, uint64.
        two_variance: Twice the variance, a float32 scalar.
        anchor: Pointer to a float32 number of any value, see ``_anchored_lanes``.
        CIPHER: ``"chacha20"`` or ``"philox4x64"``.
        TILES: Number of tiles, a power of two.
    """
    # A tile has 64 units of radius words, then 64 of angle words; its pairs have 64 units of refining words.
    lane = _anchored_lanes(anchor, 64 * TILES)
    pair_unit = tile * 64 + lane
    radius_unit = tile * 128 + (lane >> 6) * 128 + (lane & 63)
    radius = unit_words(key, radius_unit, stream, step, _FLOAT32, CIPHER)
    angle = unit_words(key, radius_unit + 64, stream, step, _FLOAT32, CIPHER)
    refinement = radius
    if tl.max((tl.ravel(radius) < _REFINE_BELOW).to(tl.int32), axis=0) > 0:
        refinement = unit_words(key, pair_unit, stream, step, _FLOAT32_REFINEMENT, CIPHER)
    first, second = box_muller(radius, angle, refinement, two_variance)
    both = tl.reshape(tl.join(first, second), [TILES, 1024, 2])
    return tl.reshape(tl.permute(both, [0, 2, 1]), [2048 * TILES])
