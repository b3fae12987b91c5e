"""Attention of few queries over many rows: ranges of rows side by side, then one merge.

As weights are taken relative to the public S, the sums of two ranges simply add up: no maximum is compared and nothing is
rescaled. ``dp_attention_part_kernel`` writes the sums of one range, in float32; ``dp_attention_merge_kernel`` adds
the ranges in the order of the rows, divides, adds the noise, and writes the output once. Nothing depends on which program
is done first, so a call gives the same bytes every time.

A sum is touched by at most PASS_ROWS additions of rows, one for each pass of its range and one for each range. A range
is at least one pass, so the last two are at most twice the passes, which is what ``sensitivity.rounding_slack`` charges.
"""

import triton
import triton.language as tl

from dp_flash_attention.attention.kernels.accumulate import accumulate_passes, clipped_queries
from dp_flash_attention.attention.kernels.epilogue import finish

PART_SCALARS = ["query_norm", "key_norm", "value_norm", "scale_log2", "shift_log2"]
MERGE_SCALARS = ["shift_log2", "null_weight", "k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "step"]


@triton.jit(do_not_specialize=PART_SCALARS)
def dp_attention_part_kernel(
    query,
    key,
    value,
    part_sums,
    part_weights,
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
    num_outputs,
    num_splits,
    split_rows,
    query_norm,
    key_norm,
    value_norm,
    scale_log2,
    shift_log2,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PASS_ROWS: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    INLINE_FACTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes Σ round(w·f_v)·v and Σ w over one range of rows, for BLOCK_M queries of one head.

    Args:
        query: And key, value, factors, hidden: as in ``dp_attention_fwd_kernel``.
        part_sums: float32 [num_splits, num_outputs, BLOCK_E], contiguous; part_weights: [num_splits, num_outputs].
        num_outputs: B·H·Q.
        split_rows: Rows of a range, a multiple of PASS_ROWS; the last range may be shorter.
    """
    split = tl.program_id(0) % num_splits
    place = tl.program_id(0) // num_splits
    blocks = tl.cdiv(num_queries, BLOCK_M)
    head = (place // blocks).to(tl.int64)  # b·H + h
    b, h = head // num_heads, head % num_heads
    g = h // heads_per_group
    factors = (b * (num_heads // heads_per_group) + g) * num_rows
    t = (place % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    clipped = clipped_queries(
        query + b * stride_qb + h * stride_qh,
        t,
        stride_qq,
        stride_qd,
        num_queries,
        query_norm,
        WIDTH,
        BLOCK_D,
    )
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
    first = split * split_rows
    sums, weights = accumulate_passes(
        tl.zeros([BLOCK_M, BLOCK_E], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        clipped,
        t,
        rows,
        (num_rows, key_norm, value_norm, scale_log2, shift_log2),
        first,
        tl.minimum(num_rows, first + split_rows),
        WIDTH,
        BLOCK_D,
        BLOCK_E,
        BLOCK_N,
        PASS_ROWS,
        HAS_HIDDEN,
        INLINE_FACTORS,
        PRECISION,
    )
    inside = t < num_queries
    output = split.to(tl.int64) * num_outputs + head * num_queries + t
    tl.store(part_sums + output[:, None] * BLOCK_E + e[None, :], sums, mask=inside[:, None])
    tl.store(part_weights + output, weights, mask=inside)


@triton.jit(do_not_specialize=MERGE_SCALARS)
def dp_attention_merge_kernel(
    part_sums,
    part_weights,
    out,
    lse,
    stddev,
    stride_sb,
    stride_sh,
    stride_sq,
    num_heads,
    num_queries,
    num_outputs,
    num_splits,
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
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STORE_LSE: tl.constexpr,
    CIPHER: tl.constexpr,
):
    """Adds the ranges up in their order and ends as ``dp_attention_fwd_kernel`` does, with the same noise.

    Args:
        part_sums: And part_weights: as ``dp_attention_part_kernel`` wrote them; the rest as in the forward kernel.
    """
    blocks = tl.cdiv(num_queries, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    t = block * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    inside = t < num_queries
    sums = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    weights = tl.zeros([BLOCK_M], tl.float32)
    output = head * num_queries + t
    for _ in tl.range(0, num_splits):
        sums += tl.load(part_sums + output[:, None] * BLOCK_E + e[None, :], mask=inside[:, None], other=0.0)
        weights += tl.load(part_weights + output, mask=inside, other=0.0)
        output += num_outputs
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
