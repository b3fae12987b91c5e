"""Rounding to, and products of, narrow floating-point numbers: one meaning on a GPU and in the interpreter.

Triton's interpreter (3.6 to 3.7.1) cuts float32 off where a GPU rounds to the nearest bfloat16, and multiplies the bit
patterns of bfloat16 matrices. There, both are spelt out; on a GPU they are one instruction each.
"""

import triton
import triton.language as tl

# Fixed when the kernels are imported, as the choice of the interpreter is.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Returns float32 ``x`` in ``DTYPE``, rounded to the nearest, ties to even."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """Returns ``total + a·b`` with products of ``a``'s dtype and float32 sums."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def short(x):
    """Returns float32 ``x`` with the digits of float16 and the range of float32, rounded to the nearest, ties to even.

    TF32 has as many digits, so the tensor cores read the result as it is, and numbers of float16 too.
    """
    bits = x.to(tl.uint32, bitcast=True)
    bits += 0xFFF + ((bits >> 13) & 1)
    return (bits & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def weighted_sum(weights, rows, total, PRECISION: tl.constexpr):
    """Returns ``total + weights·rows`` for float32 weights, each of them rounded once, to the precision of ``rows``.

    float16 has no normal number below 2^-14, where weights may lie: beside rows of float16 they keep the range of
    float32, and the product is one of TF32, which is exact for both.
    """
    if rows.dtype == tl.float16:
        if _INTERPRETED:
            return tl.dot(short(weights), rows.to(tl.float32), total)
        else:
            return tl.dot(short(weights), rows.to(tl.float32), total, input_precision="tf32")
    else:
        return dot(rounded(weights, rows.dtype), rows, total, PRECISION)
