"""The end of the attention kernels: the quotient, the noise, one store."""

import triton
import triton.language as tl

from dp_flash_attention.attention.kernels.narrow import rounded
from dp_flash_attention.noise.kernels.transform import tile_normals


@triton.jit
def finish(
    sums,
    weights,
    null_weight,
    shift_log2,
    out,
    lse,
    stddev,
    strides,
    head,
    num_heads,
    block,
    num_queries,
    words,
    step,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STORE_LSE: tl.constexpr,
    CIPHER: tl.constexpr,
):
    """Writes rows block·BLOCK_M … of a head: sums over weights, plus noise.

    Args:
        sums: float32 [BLOCK_M, BLOCK_E]; weights: float32 [BLOCK_M].
        strides: Of stddev [B, H, Q].
        head: b·H + h, the stream of its noise; num_heads: H.
        words: Tuple of the step's eight key words; step: the call.
    """
    t = block * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    denominator = weights + null_weight
    # A query that sees nothing has denominator 0 and sums 0; its output is 0.
    result = sums / tl.where(denominator > 0.0, denominator, 1.0)[:, None]
    inside = t < num_queries
    row = head * num_queries + t
    if CIPHER is not None:
        stride_sb, stride_sh, stride_sq = strides
        place = (head // num_heads) * stride_sb + (head % num_heads) * stride_sh + t.to(tl.int64) * stride_sq
        scale = tl.load(stddev + place, mask=inside, other=0.0)
        tiles: tl.constexpr = BLOCK_M * BLOCK_E // 2048
        # The interpreter ignores the annotations of the kernels' arguments; on a device these conversions do nothing.
        k0, k1, k2, k3, k4, k5, k6, k7 = words
        key = (
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
            key,
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
        logarithm = tl.log(tl.where(inside, denominator, 1.0)) + shift_log2 * 0.6931471805599453
        tl.store(lse + row, logarithm, mask=inside)
