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

from dp_flash_attention.attention.kernels.accumulate import accumulate, accumulate_passes, clipped_queries
from dp_flash_attention.attention.kernels.epilogue import finish

_NEVER_SPECIALISED = [
    *("query_norm", "key_norm", "value_norm", "scale_log2", "shift_log2", "null_weight"),
    *("k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "step"),
]


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

    query += b * stride_qb + h * stride_qh
    key += b * stride_kb + g * stride_kg
    value += b * stride_vb + g * stride_vg
    key_factors += (b * num_groups + g) * num_rows
    value_factors += (b * num_groups + g) * num_rows
    hidden += b * stride_nb

    clipped = clipped_queries(query, t, stride_qq, stride_qd, num_queries, query_norm, WIDTH, BLOCK_D)
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
        sums, weights = accumulate(
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
        sums, weights = accumulate(
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
        sums, weights = accumulate(
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
        sums, weights = accumulate_passes(
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
            PASS_ROWS,
            HAS_HIDDEN,
            INLINE_FACTORS,
            PRECISION,
        )
    finish(
        sums,
        weights,
        null_weight,
        shift_log2,
        out,
        lse,
        stddev,
        (stride_sb, stride_sh, stride_sq),
        head,
        num_heads,
        block,
        num_queries,
        (k0, k1, k2, k3, k4, k5, k6, k7),
        step,
        BLOCK_E,
        BLOCK_M,
        STORE_LSE,
        CIPHER,
    )
