"""``Σ_v ‖Σ_{t: id_t = v} g_t‖²`` for each example, segment by segment: no V×D buffer, no buffer of summed rows.

Tokens are sorted by id first, so that equal ids lie side by side. A program takes one example and one block of columns and
walks its tokens in that order with one running row in registers: while the id stays it adds, and when it changes it
takes the row's square and starts anew. It stores one partial sum, once (see ``gram_norm.py``): nothing has to be cleared
before a call, no atomic operation runs, and the result is the same bits every time. Scratch is B·D/128 numbers and the order,
B·T.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

# Not yet measured.
BLOCK_WIDTH: Final = 128
NUM_WARPS: Final = 1


@triton.jit
def embedding_norm_kernel(
    ids,
    order,
    g,
    partial,
    stride_gb,
    stride_gt,
    stride_gd,
    num_rows,
    width,
    BLOCK_WIDTH: tl.constexpr,
):
    """Writes partial sums [B, column blocks] for sorted ids [B, T], their places [B, T] (contiguous) and g [B, T, D]."""
    across = tl.cdiv(width, BLOCK_WIDTH)
    example = (tl.program_id(0) // across).to(tl.int64)
    column = (tl.program_id(0) % across) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    ids += example * num_rows
    order += example * num_rows
    g += example * stride_gb + column * stride_gd
    inside = column < width
    row = tl.zeros([BLOCK_WIDTH], tl.float32)
    squares = tl.zeros([BLOCK_WIDTH], tl.float32)
    before = tl.load(ids)
    for t in tl.range(0, num_rows):
        now = tl.load(ids + t)
        place = tl.load(order + t)
        value = tl.load(g + place * stride_gt, mask=inside, other=0.0).to(tl.float32)
        # 1 while the id stays: NaN and infinity pass, as they are to be seen in the norm.
        stays = now == before
        squares += tl.where(stays, 0.0, row * row)
        row = tl.where(stays, row + value, value)
        before = now
    squares += row * row
    tl.store(partial + tl.program_id(0), tl.sum(squares, axis=0))


def embedding_norm(ids_BT: Tensor, g_BTD: Tensor) -> Tensor:
    """Returns the squared norm of an embedding table's gradient for each example, float32 [B].

    Args:
        ids_BT: Row numbers, int64; equal ids of one example add up before the norm is taken.
        g_BTD: Gradients of the looked-up rows; float32, bfloat16 or float16, any strides.
    """
    size, num_rows, width = g_BTD.shape
    across = triton.cdiv(width, BLOCK_WIDTH)
    partial = torch.empty((size, across), dtype=torch.float32, device=g_BTD.device)
    if num_rows == 0:
        return partial.zero_().sum(1)
    if partial.numel():
        sorted_ids_BT, order_BT = ids_BT.sort(dim=1, stable=True)
        with torch.cuda.device_of(g_BTD):
            embedding_norm_kernel[(size * across,)](
                sorted_ids_BT.contiguous(),
                order_BT.contiguous(),
                g_BTD,
                partial,
                *g_BTD.stride(),
                num_rows,
                width,
                BLOCK_WIDTH=BLOCK_WIDTH,
                num_warps=NUM_WARPS,
            )
    return partial.sum(1)
