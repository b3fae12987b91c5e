"""``‖gᵀx‖²_F`` by the symmetric gram form, tile by tile: no T×T buffer, half of the tiles.

For one example ``Σ_{t,s} ⟨x_t, x_s⟩⟨g_t, g_s⟩``. A program takes two strips of rows of one example, the i-th and the i-th from
the end, so that all programs have about the same number of tiles; a tile off the diagonal counts twice. It stores
one partial sum, once: nothing is accumulated in memory, so nothing has to be cleared before a call, no atomic
operation runs, and the result is the same bits every time. Scratch is B·T/128 numbers.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_flash_attention.attention.kernels.narrow import dot

# Not yet measured: what one warp group of sm_90 multiplies in 156 registers a thread (triton 3.7.1). Strips of 128 rows
# would read less and leave half of the SMs of an H100 without a program at T = 512.
BLOCK_ROWS: Final = 64
BLOCK_WIDTH: Final = 64
NUM_WARPS: Final = 4
NUM_STAGES: Final = 3


@triton.jit
def _gram_tile(
    matrix,
    stride_t,
    stride_d,
    first_row,
    second_row,
    num_rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Returns the products of rows first_row … with rows second_row …, float32 [BLOCK_ROWS, BLOCK_ROWS]."""
    first = first_row + tl.arange(0, BLOCK_ROWS)
    second = second_row + tl.arange(0, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_ROWS], tl.float32)
    for start in tl.range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        along = column[None, :] * stride_d
        a = tl.load(
            matrix + first.to(tl.int64)[:, None] * stride_t + along,
            mask=(first < num_rows)[:, None] & (column < width)[None, :],
            other=0.0,
        )
        b = tl.load(
            matrix + second.to(tl.int64)[:, None] * stride_t + along,
            mask=(second < num_rows)[:, None] & (column < width)[None, :],
            other=0.0,
        )
        total = dot(a, tl.trans(b), total, "ieee")
    return total


@triton.jit
def gram_norm_kernel(
    x,
    g,
    partial,
    stride_xb,
    stride_xt,
    stride_xd,
    stride_gb,
    stride_gt,
    stride_gp,
    num_rows,
    num_inputs,
    num_outputs,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Writes partial sums [B, pairs of strips], float32 and contiguous, for x [B, T, D] and g [B, T, P] by strides."""
    strips = tl.cdiv(num_rows, BLOCK_ROWS)
    pairs = (strips + 1) // 2
    example = (tl.program_id(0) // pairs).to(tl.int64)
    pair = tl.program_id(0) % pairs
    x += example * stride_xb
    g += example * stride_gb
    total = 0.0
    for side in tl.range(0, 2):
        strip = tl.where(side == 0, pair, strips - 1 - pair)
        # The middle strip of an odd number is its own partner, and counts once.
        last = tl.where((side == 1) & (strip == pair), strip, strips)
        for other in tl.range(strip, last):
            row, other_row = strip * BLOCK_ROWS, other * BLOCK_ROWS
            inputs = _gram_tile(
                x, stride_xt, stride_xd, row, other_row, num_rows, num_inputs, BLOCK_ROWS, BLOCK_WIDTH
            )
            outputs = _gram_tile(
                g, stride_gt, stride_gp, row, other_row, num_rows, num_outputs, BLOCK_ROWS, BLOCK_WIDTH
            )
            total += tl.where(other == strip, 1.0, 2.0) * tl.sum(tl.sum(inputs * outputs, axis=1), axis=0)
    tl.store(partial + tl.program_id(0), total)


def gram_norm(x_BTD: Tensor, g_BTP: Tensor) -> Tensor:
    """Returns ``‖gᵀx‖²_F`` for each example, float32 [B], by the symmetric gram form.

    Args:
        x_BTD: Inputs; float32, bfloat16 or float16, any strides.
        g_BTP: Output gradients, of the same dtype and device.
    """
    size, num_rows, num_inputs = x_BTD.shape
    pairs = triton.cdiv(triton.cdiv(num_rows, BLOCK_ROWS), 2)
    partial = torch.empty((size, pairs), dtype=torch.float32, device=x_BTD.device)
    if partial.numel():
        with torch.cuda.device_of(x_BTD):
            gram_norm_kernel[(size * pairs,)](
                x_BTD,
                g_BTP,
                partial,
                *x_BTD.stride(),
                *g_BTP.stride(),
                num_rows,
                num_inputs,
                g_BTP.shape[2],
                BLOCK_ROWS=BLOCK_ROWS,
                BLOCK_WIDTH=BLOCK_WIDTH,
                num_warps=NUM_WARPS,
                num_stages=NUM_STAGES,
            )
    return partial.sum(1)
