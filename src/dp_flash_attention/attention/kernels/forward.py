"""The attention kernel: clipping, scores, weights by a public shift, noise in the epilogue, one store.

Shapes as in ``attention.interface``. One program computes BLOCK_M queries of one head, and for each of them

    w_i = exp(scale·f_k,i·⟨q̄, k_i⟩ − S)                     float32, no running maximum: S is public
    o   = Σ_i round(w_i·f_v,i)·v_i / (m·e^{−S} + Σ_i w_i)   sums in float32
    y   = o + stddev·z                                      float32, then one store in the output's dtype

* The weight of a row depends on the query and that row alone (``Rounding.FIXED_SHIFT``), so no maximum is kept and
  nothing is rescaled.
* ``round(w·f_v)/w·v`` is the row that is averaged. One rounding to the inputs' dtype multiplies its norm by at most
  1 + u, as rounding a clipped row would, and ``RowNorms`` has room for just that. The denominator sums the weights
  themselves.
* z are numbers t·E + e of the head's stream. BLOCK_M rows are whole tiles of 2,048 numbers, so the program makes
  its own noise and nobody else's.
"""

import triton
import triton.language as tl

from dp_flash_attention.attention.kernels.narrow import dot, rounded
from dp_flash_attention.attention.kernels.row_factors import row_factors
from dp_flash_attention.noise.kernels.transform import tile_normals

_NEVER_SPECIALISED = [
    *("query_norm", "key_norm", "value_norm", "scale_log2", "shift_log2", "null_weight"),
    *("k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "step"),
]


@triton.jit
def _accumulate(
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
        # A row that nobody sees has the exponent -inf, hence the weight 0: no product is spent on the mask.
        shift = tl.where(seen, -shift_log2, float("-inf"))
        scores = dot(query, tl.trans(key_tile), tl.zeros([query.shape[0], BLOCK_N], tl.float32), PRECISION)
        # Where the factor is 0 the score may have overflowed, and infinity times zero is not zero.
        scores = tl.where((key_factor > 0.0)[None, :], scores * (key_factor * scale_log2)[None, :], 0.0)
        weight = tl.exp2(scores + shift[None, :])
        if DIAGONAL:
            weight = tl.where(row[None, :] <= query_index[:, None], weight, 0.0)
        weights += tl.sum(weight, axis=1)
        sums = dot(rounded(weight * value_factor[None, :], value_tile.dtype), value_tile, sums, PRECISION)
    return sums, weights


@triton.jit(do_not_specialize=_NEVER_SPECIALISED)
def dp_attention_fwd_kernel(
    query,
    key,
    value,
    out,
    lse,
    key_factors,
    value_factors,
    hidden,
    stddev,
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
    stride_sb,
    stride_sh,
    stride_sq,
    num_heads,
    heads_per_group,
    num_queries,
    num_rows,
    query_norm,
    key_norm,
    value_norm,
    scale_log2,
    shift_log2,
    null_weight,
    k0: tl.uint32,
    k1: tl.uint32,
    k2: tl.uint32,
    k3: tl.uint32,
    k4: tl.uint32,
    k5: tl.uint32,
    k6: tl.uint32,
    k7: tl.uint32,
    step: tl.uint64,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PASS_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    INLINE_FACTORS: tl.constexpr,
    STORE_LSE: tl.constexpr,
    CIPHER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the noisy output [B, H, Q, E], contiguous, and the logarithms of the denominators if asked.

    Args:
        query: [B, H, Q, WIDTH] by strides; key, value: [B, G, K, WIDTH or BLOCK_E] by strides.
        out: [B, H, Q, BLOCK_E], contiguous; lse: float32 [B, H, Q], contiguous, not read or written without STORE_LSE.
        key_factors: float32 [B, G, K], contiguous, like value_factors; not read with INLINE_FACTORS.
        hidden: One byte for each of [B, K], not 0 where a row is hidden; not read without HAS_HIDDEN.
        stddev: float32 [B, H, Q] by strides; any pointer without CIPHER.
        scale_log2: scale·log2(e); shift_log2: S·log2(e); null_weight: m·e^{−S}.
        k0: To k7, the step's key (``noise.kernels.words``); the stream is b·H + h.
        CIPHER: None for no noise.
    """
    blocks = tl.cdiv(num_queries, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)  # b·H + h
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest first
    b, h = head // num_heads, head % num_heads
    g = h // heads_per_group
    num_groups = num_heads // heads_per_group
    first_query = block * BLOCK_M
    t = first_query + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)

    query += b * stride_qb + h * stride_qh
    key += b * stride_kb + g * stride_kg
    value += b * stride_vb + g * stride_vg
    key_factors += (b * num_groups + g) * num_rows
    value_factors += (b * num_groups + g) * num_rows
    hidden += b * stride_nb

    queries = tl.load(
        query + t.to(tl.int64)[:, None] * stride_qq + d[None, :] * stride_qd,
        mask=(t < num_queries)[:, None] & (d < WIDTH)[None, :],
        other=0.0,
    )
    clipped = rounded(queries.to(tl.float32) * row_factors(queries, query_norm)[:, None], queries.dtype)

    sums = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    weights = tl.zeros([BLOCK_M], tl.float32)
    rows = (
        key,
        value,
        key_factors,
        value_factors,
        hidden,
        stride_kk,
        stride_kd,
        stride_vk,
        stride_ve,
        stride_nk,
    )
    bounds = (num_rows, key_norm, value_norm, scale_log2, shift_log2)
    if CAUSAL:
        last = tl.minimum(num_rows, first_query + BLOCK_M)
        diagonal = tl.minimum(last, first_query // BLOCK_N * BLOCK_N)
        sums, weights = _accumulate(
            sums,
            weights,
            clipped,
            t,
            rows,
            bounds,
            0,
            diagonal,
            WIDTH,
            BLOCK_D,
            BLOCK_E,
            BLOCK_N,
            HAS_HIDDEN,
            INLINE_FACTORS,
            False,
            PRECISION,
        )
        sums, weights = _accumulate(
            sums,
            weights,
            clipped,
            t,
            rows,
            bounds,
            diagonal,
            last,
            WIDTH,
            BLOCK_D,
            BLOCK_E,
            BLOCK_N,
            HAS_HIDDEN,
            INLINE_FACTORS,
            True,
            PRECISION,
        )
    elif PASS_ROWS is None:
        sums, weights = _accumulate(
            sums,
            weights,
            clipped,
            t,
            rows,
            bounds,
            0,
            num_rows,
            WIDTH,
            BLOCK_D,
            BLOCK_E,
            BLOCK_N,
            HAS_HIDDEN,
            INLINE_FACTORS,
            False,
            PRECISION,
        )
    else:
        # Long contexts in passes with sums of their own: fewer roundings touch a sum (interface.PASS_ROWS).
        for first in tl.range(0, num_rows, PASS_ROWS):
            pass_sums, pass_weights = _accumulate(
                tl.zeros([BLOCK_M, BLOCK_E], tl.float32),
                tl.zeros([BLOCK_M], tl.float32),
                clipped,
                t,
                rows,
                bounds,
                first,
                tl.minimum(num_rows, first + PASS_ROWS),
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

    denominator = weights + null_weight
    # A query that sees nothing has denominator 0 and sums 0; its output is 0.
    result = sums / tl.where(denominator > 0.0, denominator, 1.0)[:, None]
    inside = t < num_queries
    row = head * num_queries + t
    if CIPHER is not None:
        scale = tl.load(
            stddev + b * stride_sb + h * stride_sh + t.to(tl.int64) * stride_sq, mask=inside, other=0.0
        )
        tiles: tl.constexpr = BLOCK_M * BLOCK_E // 2048
        # The interpreter ignores the annotations of the arguments; on a device these conversions do nothing.
        words = (
            k0.to(tl.uint32),
            k1.to(tl.uint32),
            k2.to(tl.uint32),
            k3.to(tl.uint32),
            k4.to(tl.uint32),
            k5.to(tl.uint32),
            k6.to(tl.uint32),
            k7.to(tl.uint32),
        )
        normals = tile_normals(
            words,
            (block * tiles).to(tl.uint64),
            head.to(tl.uint32),
            step.to(tl.uint64),
            2.0,
            stddev,
            CIPHER,
            tiles,
        )
        result += scale[:, None] * tl.reshape(normals, [BLOCK_M, BLOCK_E])
    tl.store(
        out + row[:, None] * BLOCK_E + e[None, :], rounded(result, out.dtype.element_ty), mask=inside[:, None]
    )
    if STORE_LSE:
        tl.store(lse + row, tl.log(denominator) + shift_log2 * 0.6931471805599453, mask=inside)
