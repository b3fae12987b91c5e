"""What scales a row down to its bound: a device function, and the kernel that runs it ahead of the attention.

A clipped row is ``x·min(1, R/‖x‖)``. For queries the product is formed, in the attention kernel's prologue. For keys
and values it is not: the factor f_k of a key goes into the score, and the factor f_v of a value into the weight.
That costs one product for each score instead of one for each number of each tile, leaves the tiles where the
asynchronous copy put them, and needs no clipped copy of keys and values.

A row longer than 2^40 bounds gets the factor 0: it counts as a zero row, so that no product overflows.
"""

import triton
import triton.language as tl

_SMALLEST_FACTOR = tl.constexpr(2.0**-40)


@triton.jit
def row_factors(x, norm):
    """Returns min(1, norm/‖x‖) for each row, float32, by correctly rounded root and quotient; 0 if below 2^-40.

    Args:
        x: [rows, width] of any floating dtype, zeros where there is no number.
        norm: R, a float32 scalar.
    """
    wide = x.to(tl.float32)
    length = tl.sqrt_rn(tl.sum(wide * wide, axis=1))
    # With the larger of the two below, a short row's factor is exactly 1 and nothing is divided by zero.
    factor = tl.div_rn(norm, tl.maximum(length, norm))
    return tl.where(factor < _SMALLEST_FACTOR, 0.0, factor)


@triton.jit
def row_gradients(grad, x, norm):
    """Returns the gradient with respect to x, where ``grad`` is that with respect to the clipped rows; float32.

    With u = x/‖x‖ it is f·(g − ⟨g, u⟩u) for a row of norm R or more, and g for a shorter one. A row of norm R is at a kink,
    where both are right; it counts as clipped, as in ``attention.rows.clip_rows``. A row that counts as zero has the
    gradient 0.

    Args:
        grad: float32 [rows, width], zeros where x has no number.
        x: [rows, width] of any floating dtype, zeros where there is no number.
        norm: R, a float32 scalar.
    """
    wide = x.to(tl.float32)
    length = tl.sqrt_rn(tl.sum(wide * wide, axis=1))
    factor = row_factors(x, norm)
    unit = wide * (factor / norm)[:, None]
    along = tl.where(length >= norm, tl.sum(grad * unit, axis=1), 0.0)
    return factor[:, None] * (grad - along[:, None] * unit)


@triton.jit
def row_factors_kernel(
    x,
    out,
    stride_b,
    stride_g,
    stride_k,
    stride_d,
    num_groups,
    num_rows,
    norm,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Writes the factor of each row of x [B, G, K, WIDTH] to out [B, G, K], float32 and contiguous.

    One program for each block of rows of each (b, g).
    """
    blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK_ROWS
    row = start + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    x += (matrix // num_groups) * stride_b + (matrix % num_groups) * stride_g
    inside = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    tile = tl.load(
        x + row.to(tl.int64)[:, None] * stride_k + column[None, :] * stride_d, mask=inside, other=0.0
    )
    tl.store(out + matrix * num_rows + row, row_factors(tile, norm), mask=row < num_rows)
