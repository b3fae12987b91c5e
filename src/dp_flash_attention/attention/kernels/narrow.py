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
