"""The sums of the attention kernels: clipped queries against a range of key/value rows.

With w_i = exp(scale·f_k,i·⟨q̄, k_i⟩ − S), a range adds Σ w_i to the weights and Σ round(w_i·f_v,i)·v_i to the sums.
"""

import triton
import triton.language as tl

from dp_flash_attention.attention.kernels.narrow import dot, rounded, weighted_sum
from dp_flash_attention.attention.kernels.row_factors import row_factors


@triton.jit
def clipped_queries(
    query, t, stride_qq, stride_qd, num_queries, query_norm, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Returns queries t of one head, [BLOCK_M, BLOCK_D], clipped and rounded to their dtype; zeros beyond the last."""
    d = tl.arange(0, BLOCK_D)
    queries = tl.load(
        query + t.to(tl.int64)[:, None] * stride_qq + d[None, :] * stride_qd,
        mask=(t < num_queries)[:, None] & (d < WIDTH)[None, :],
        other=0.0,
    )
    return rounded(queries.to(tl.float32) * row_factors(queries, query_norm)[:, None], queries.dtype)


@triton.jit
def row_weights(products, key_factor, seen, scale_log2, shift_log2):
    """Returns w = exp(scale·f_k·⟨q̄, k⟩ − S), float32; 0 where a row is not seen.

    Args:
        products: ⟨q̄, k⟩ of a tile of queries and rows, either way round.
        key_factor: f_k of the rows, and ``seen`` whether they are, of a shape that fits ``products``.
    """
    # A row that nobody sees has the exponent -inf, hence the weight 0: no product is spent on the mask.
    shift = tl.where(seen, -shift_log2, float("-inf"))
    # Where the factor is 0 the product may have overflowed, and infinity times zero is not zero.
    scores = tl.where(key_factor > 0.0, products * (key_factor * scale_log2), 0.0)
    return tl.exp2(scores + shift)


@triton.jit
def accumulate(
    sums,
    weights,
    query,
    query_index,
    rows,
    bounds,
    first,
    last,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    INLINE_FACTORS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds rows first … last-1 to the weighted sums [BLOCK_M, BLOCK_E] and the sums of weights [BLOCK_M]."""
    key, value, key_factors, value_factors, hidden, stride_kk, stride_kd, stride_vk, stride_ve, stride_nk = (
        rows
    )
    num_rows, key_norm, value_norm, scale_log2, shift_log2 = bounds
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    for start in tl.range(first, last, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        inside = row < num_rows
        far = row.to(tl.int64)[:, None]
        key_tile = tl.load(
            key + far * stride_kk + d[None, :] * stride_kd,
            mask=inside[:, None] & (d < WIDTH)[None, :],
            other=0.0,
        )
        value_tile = tl.load(
            value + far * stride_vk + e[None, :] * stride_ve, mask=inside[:, None], other=0.0
        )
        if INLINE_FACTORS:
            key_factor = row_factors(key_tile, key_norm)
            value_factor = row_factors(value_tile, value_norm)
        else:
            key_factor = tl.load(key_factors + row, mask=inside, other=0.0)
            value_factor = tl.load(value_factors + row, mask=inside, other=0.0)
        seen = inside
        if HAS_HIDDEN:
            seen = seen & (tl.load(hidden + row.to(tl.int64) * stride_nk, mask=inside, other=1) == 0)
        scores = dot(query, tl.trans(key_tile), tl.zeros([query.shape[0], BLOCK_N], tl.float32), PRECISION)
        weight = row_weights(scores, key_factor[None, :], seen[None, :], scale_log2, shift_log2)
        if DIAGONAL:
            weight = tl.where(row[None, :] <= query_index[:, None], weight, 0.0)
        weights += tl.sum(weight, axis=1)
        sums = weighted_sum(weight * value_factor[None, :], value_tile, sums, PRECISION)
    return sums, weights


@triton.jit
def accumulate_passes(
    sums,
    weights,
    query,
    query_index,
    rows,
    bounds,
    first,
    last,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PASS_ROWS: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    INLINE_FACTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Does what ``accumulate`` does in passes with sums of their own: fewer roundings touch a sum (interface.PASS_ROWS)."""
    for start in tl.range(first, last, PASS_ROWS):
        pass_sums, pass_weights = accumulate(
            tl.zeros([query.shape[0], BLOCK_E], tl.float32),
            tl.zeros([query.shape[0]], tl.float32),
            query,
            query_index,
            rows,
            bounds,
            start,
            tl.minimum(last, start + PASS_ROWS),
            WIDTH,
            BLOCK_D,
            BLOCK_E,
            BLOCK_N,
            HAS_HIDDEN,
            INLINE_FACTORS,
            False,
            PRECISION,
        )
        sums += pass_sums
        weights += pass_weights
    return sums, weights
