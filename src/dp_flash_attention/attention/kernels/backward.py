"""The backward pass of the attention kernel, in two kernels that keep nothing of the forward pass.

Noise is added to the output, so its gradient is that of the exact part. With w_i as in ``forward.py``, Z = m·e^{−S} + Σ w_i,
p_i = w_i/Z, v̄_i = f_v,i·v_i and g the gradient with respect to the output,

    δ    = Σ_i p_i·⟨g, v̄_i⟩                    which is ⟨g, o⟩
    ds_i = p_i·(⟨g, v̄_i⟩ − δ)
    dq̄   = scale·Σ_i ds_i·f_k,i·k_i            one program for BLOCK_M queries of a head
    dk̄_i = scale·Σ_t ds_i·q̄,  dv̄_i = Σ_t p_i·g  one program for BLOCK_N rows of a key/value head, over all heads that read it

and from those the gradients of the rows before clipping (``row_factors.row_gradients``).

* o is an exact function of private rows, so it is not kept for δ, nor are the denominators: the first kernel walks the
  rows twice, for Z and δ and then for dq̄, and hands Z and δ to the second in scratch. That is two products of
  a tile more than if o had been kept.
* No atomic operation: every sum is one program's, in a fixed order, and the same every time.
* Rounding a query or a weight counts as the identity.
"""

import triton
import triton.language as tl

from dp_flash_attention.attention.kernels.accumulate import clipped_queries, row_weights
from dp_flash_attention.attention.kernels.narrow import dot, rounded, weighted_sum
from dp_flash_attention.attention.kernels.row_factors import row_gradients

SCALARS = ["query_norm", "key_norm", "value_norm", "scale", "scale_log2", "shift_log2", "null_weight"]


@triton.jit
def _row_tiles(
    rows,
    start,
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
):
    """Returns keys, values, their factors and whether they are seen, for rows start … of one head."""
    key, value, key_factors, value_factors, hidden, stride_kk, stride_kd, stride_vk, stride_ve, stride_nk = (
        rows
    )
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    row = start + tl.arange(0, BLOCK_N)
    seen = row < num_rows
    far = row.to(tl.int64)[:, None]
    keys = tl.load(
        key + far * stride_kk + d[None, :] * stride_kd, mask=seen[:, None] & (d < WIDTH)[None, :], other=0.0
    )
    values = tl.load(value + far * stride_vk + e[None, :] * stride_ve, mask=seen[:, None], other=0.0)
    key_factor = tl.load(key_factors + row, mask=seen, other=0.0)
    value_factor = tl.load(value_factors + row, mask=seen, other=0.0)
    if HAS_HIDDEN:
        seen = seen & (tl.load(hidden + row.to(tl.int64) * stride_nk, mask=seen, other=1) == 0)
    return keys, values, key_factor, value_factor, seen


@triton.jit
def _weights_and_products(
    clipped,
    grads,
    t,
    start,
    rows,
    num_rows,
    scale_log2,
    shift_log2,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Returns w and ⟨g, v̄⟩, [BLOCK_M, BLOCK_N], and the keys and their factors, for rows start … ."""
    keys, values, key_factor, value_factor, seen = _row_tiles(
        rows, start, num_rows, WIDTH, BLOCK_D, BLOCK_E, BLOCK_N, HAS_HIDDEN
    )
    zeros = tl.zeros([clipped.shape[0], BLOCK_N], tl.float32)
    products = dot(clipped, tl.trans(keys), zeros, PRECISION)
    weight = row_weights(products, key_factor[None, :], seen[None, :], scale_log2, shift_log2)
    if CAUSAL:
        weight = tl.where((start + tl.arange(0, BLOCK_N))[None, :] <= t[:, None], weight, 0.0)
    along = dot(grads, tl.trans(values), zeros, PRECISION)
    along = tl.where((value_factor > 0.0)[None, :], along * value_factor[None, :], 0.0)
    return weight, along, keys, key_factor


@triton.jit(do_not_specialize=SCALARS)
def dp_attention_bwd_query_kernel(
    query,
    key,
    value,
    grad_out,
    grad_query,
    clipped_out,
    inverses,
    deltas,
    key_factors,
    value_factors,
    hidden,
    stride_qb,
    stride_qh,
    stride_qq,
    stride_qd,
    stride_kb,
    stride_kg,
    stride_kk,
    stride_kd,
    stride_vb,
    stride_vg,
    stride_vk,
    stride_ve,
    stride_nb,
    stride_nk,
    num_heads,
    heads_per_group,
    num_queries,
    num_rows,
    query_norm,
    scale,
    scale_log2,
    shift_log2,
    null_weight,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    NEEDS_QUERY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes dq if NEEDS_QUERY, and the clipped queries, 1/Z and δ of every query, which the other kernel reads.

    Args:
        query: [B, H, Q, WIDTH], key, value, hidden, factors: as in ``dp_attention_fwd_kernel``.
        grad_out: g in the inputs' dtype, [B, H, Q, BLOCK_E], contiguous.
        grad_query: [B, H, Q, WIDTH], contiguous, like clipped_out, in the inputs' dtype.
        inverses: 1/Z, float32 [B, H, Q], contiguous, like deltas; 0 for a query that sees nothing.
    """
    blocks = tl.cdiv(num_queries, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)  # b·H + h
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest first
    b, h = head // num_heads, head % num_heads
    g = h // heads_per_group
    factors = (b * (num_heads // heads_per_group) + g) * num_rows
    t = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    inside = t < num_queries
    row = head * num_queries + t
    wide = inside[:, None] & (d < WIDTH)[None, :]

    query += b * stride_qb + h * stride_qh
    clipped = clipped_queries(query, t, stride_qq, stride_qd, num_queries, query_norm, WIDTH, BLOCK_D)
    tl.store(clipped_out + row[:, None] * WIDTH + d[None, :], clipped, mask=wide)
    grads = tl.load(grad_out + row[:, None] * BLOCK_E + e[None, :], mask=inside[:, None], other=0.0)
    rows = (
        key + b * stride_kb + g * stride_kg,
        value + b * stride_vb + g * stride_vg,
        key_factors + factors,
        value_factors + factors,
        hidden + b * stride_nb,
        stride_kk,
        stride_kd,
        stride_vk,
        stride_ve,
        stride_nk,
    )
    last = num_rows
    if CAUSAL:
        last = tl.minimum(num_rows, (block + 1) * BLOCK_M)

    weights = tl.zeros([BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, last, BLOCK_N):
        weight, along, _, _ = _weights_and_products(
            clipped,
            grads,
            t,
            start,
            rows,
            num_rows,
            scale_log2,
            shift_log2,
            WIDTH,
            BLOCK_D,
            BLOCK_E,
            BLOCK_N,
            CAUSAL,
            HAS_HIDDEN,
            PRECISION,
        )
        weights += tl.sum(weight, axis=1)
        delta += tl.sum(weight * along, axis=1)
    denominator = weights + null_weight
    inverse = tl.where(denominator > 0.0, 1.0 / tl.where(denominator > 0.0, denominator, 1.0), 0.0)
    delta *= inverse
    tl.store(inverses + row, inverse, mask=inside)
    tl.store(deltas + row, delta, mask=inside)

    if NEEDS_QUERY:
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in tl.range(0, last, BLOCK_N):
            weight, along, keys, key_factor = _weights_and_products(
                clipped,
                grads,
                t,
                start,
                rows,
                num_rows,
                scale_log2,
                shift_log2,
                WIDTH,
                BLOCK_D,
                BLOCK_E,
                BLOCK_N,
                CAUSAL,
                HAS_HIDDEN,
                PRECISION,
            )
            moved = weight * inverse[:, None] * (along - delta[:, None])
            total = weighted_sum(moved * key_factor[None, :], keys, total, PRECISION)
        given = tl.load(
            query + t.to(tl.int64)[:, None] * stride_qq + d[None, :] * stride_qd, mask=wide, other=0.0
        )
        result = row_gradients(total * scale, given, query_norm)
        target = grad_query + row[:, None] * WIDTH + d[None, :]
        tl.store(target, rounded(result, grad_query.dtype.element_ty), mask=wide)


@triton.jit(do_not_specialize=SCALARS)
def dp_attention_bwd_rows_kernel(
    key,
    value,
    grad_out,
    clipped,
    inverses,
    deltas,
    grad_key,
    grad_value,
    key_factors,
    value_factors,
    hidden,
    stride_kb,
    stride_kg,
    stride_kk,
    stride_kd,
    stride_vb,
    stride_vg,
    stride_vk,
    stride_ve,
    stride_nb,
    stride_nk,
    num_groups,
    heads_per_group,
    num_queries,
    num_rows,
    key_norm,
    value_norm,
    scale,
    scale_log2,
    shift_log2,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes dk and dv; clipped, inverses and deltas are what ``dp_attention_bwd_query_kernel`` wrote.

    Args:
        grad_key: [B, G, K, WIDTH], contiguous, and grad_value: [B, G, K, BLOCK_E], in the inputs' dtype.
    """
    blocks = tl.cdiv(num_rows, BLOCK_N)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)  # b·G + g
    start = (tl.program_id(0) % blocks) * BLOCK_N
    b, g = matrix // num_groups, matrix % num_groups
    row = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    rows = (
        key + b * stride_kb + g * stride_kg,
        value + b * stride_vb + g * stride_vg,
        key_factors + matrix * num_rows,
        value_factors + matrix * num_rows,
        hidden + b * stride_nb,
        stride_kk,
        stride_kd,
        stride_vk,
        stride_ve,
        stride_nk,
    )
    keys, values, key_factor, value_factor, seen = _row_tiles(
        rows, start, num_rows, WIDTH, BLOCK_D, BLOCK_E, BLOCK_N, HAS_HIDDEN
    )
    first = 0
    if CAUSAL:
        first = start // BLOCK_M * BLOCK_M
    key_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_sums = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for member in tl.range(0, heads_per_group):
        head = (matrix * heads_per_group + member) * num_queries
        for first_query in tl.range(first, num_queries, BLOCK_M):
            t = first_query + tl.arange(0, BLOCK_M)
            inside = t < num_queries
            place = head + t
            queries = tl.load(
                clipped + place[:, None] * WIDTH + d[None, :],
                mask=inside[:, None] & (d < WIDTH)[None, :],
                other=0.0,
            )
            grads = tl.load(grad_out + place[:, None] * BLOCK_E + e[None, :], mask=inside[:, None], other=0.0)
            # A query beyond the last has the inverse 0, hence no weight.
            inverse = tl.load(inverses + place, mask=inside, other=0.0)
            delta = tl.load(deltas + place, mask=inside, other=0.0)
            zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            products = dot(keys, tl.trans(queries), zeros, PRECISION)
            weight = row_weights(products, key_factor[:, None], seen[:, None], scale_log2, shift_log2)
            if CAUSAL:
                weight = tl.where(row[:, None] <= t[None, :], weight, 0.0)
            weight *= inverse[None, :]
            value_sums = weighted_sum(weight, grads, value_sums, PRECISION)
            along = dot(values, tl.trans(grads), zeros, PRECISION)
            along = tl.where((value_factor > 0.0)[:, None], along * value_factor[:, None], 0.0)
            key_sums = weighted_sum(weight * (along - delta[None, :]), queries, key_sums, PRECISION)

    inside = row < num_rows
    place = (matrix * num_rows + row)[:, None]
    result = row_gradients(key_sums * scale, keys, key_norm)
    tl.store(
        grad_key + place * WIDTH + d[None, :],
        rounded(result, grad_key.dtype.element_ty),
        mask=inside[:, None] & (d < WIDTH)[None, :],
    )
    result = row_gradients(value_sums, values, value_norm)
    tl.store(
        grad_value + place * BLOCK_E + e[None, :],
        rounded(result, grad_value.dtype.element_ty),
        mask=inside[:, None],
    )
