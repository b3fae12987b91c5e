"""``Σ_{t,s} g_s[id_t] ⟨e_t, h_s⟩`` for each example, tile by tile: what an embedding and a head tied to it add to each other.

A program takes a strip of one example's tokens and walks the head's rows. For each tile it forms the products
⟨e_t, h_s⟩ in registers, gathers the logits' gradients at the strip's own ids beside them, and adds up the products of
the two. It stores one partial sum, once (see ``gram_norm.py``): nothing has to be cleared before a call, no atomic
operation runs, and the result is the same bits every time. Nothing of size T×S or V×D is written; scratch is B·T/64
numbers.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_flash_attention.attention.kernels.narrow import dot

# Not yet measured: what one warp group of sm_90 multiplies, as in ``gram_norm.py``.
BLOCK_ROWS: Final = 64
NUM_STAGES: Final = 3


def width_and_warps(e_dtype: torch.dtype, h_dtype: torch.dtype) -> tuple[int, int]:
    """Returns the columns of a tile and a program's warps.

    float32 is multiplied by the ordinary units, which hold their factors in registers: with 64 columns and 4 warps, 5,480
    bytes of a thread spill for float32 by bfloat16, with these none (sm_90, triton 3.7.1).
    """
    narrow = e_dtype is h_dtype and e_dtype.itemsize == 2
    return (64, 4) if narrow else (32, 8)


@triton.jit
def tied_cross_kernel(
    ids,
    e,
    h,
    g,
    partial,
    stride_eb,
    stride_et,
    stride_ed,
    stride_hb,
    stride_hs,
    stride_hd,
    stride_gb,
    stride_gs,
    stride_gv,
    num_tokens,
    num_rows,
    width,
    MIXED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Writes partial sums [B, strips] for ids [B, T] (contiguous), e [B, T, D], h [B, S, D] and g [B, S, V] by strides.

    ``MIXED`` widens tiles of e and h to float32 first, where autocast left them in different dtypes.
    """
    strips = tl.cdiv(num_tokens, BLOCK_ROWS)
    example = (tl.program_id(0) // strips).to(tl.int64)
    token = (tl.program_id(0) % strips) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_token = (token < num_tokens)[:, None]
    number = tl.load(ids + example * num_tokens + token, mask=token < num_tokens, other=0).to(tl.int64)
    e += example * stride_eb + token.to(tl.int64)[:, None] * stride_et
    h += example * stride_hb
    g += example * stride_gb + number[:, None] * stride_gv
    total = tl.zeros([BLOCK_ROWS, BLOCK_ROWS], tl.float32)
    for start in tl.range(0, num_rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        is_row = (row < num_rows)[None, :]
        far = row.to(tl.int64)[None, :]
        scores = tl.zeros([BLOCK_ROWS, BLOCK_ROWS], tl.float32)
        for first in tl.range(0, width, BLOCK_WIDTH):
            column = first + tl.arange(0, BLOCK_WIDTH)
            inside = column < width
            a = tl.load(e + column[None, :] * stride_ed, mask=is_token & inside[None, :], other=0.0)
            b = tl.load(
                h + far * stride_hs + column[:, None] * stride_hd, mask=inside[:, None] & is_row, other=0.0
            )
            if MIXED:
                a, b = a.to(tl.float32), b.to(tl.float32)
            scores = dot(a, b, scores, "ieee")
        picked = tl.load(g + far * stride_gs, mask=is_token & is_row, other=0.0)
        total += scores * picked.to(tl.float32)
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0))


def tied_cross(ids_BT: Tensor, e_BTD: Tensor, h_BSD: Tensor, g_BSV: Tensor) -> Tensor:
    """Returns ``Σ_{t,s} g_s[id_t] ⟨e_t, h_s⟩`` for each example, float32 [B].

    Args:
        ids_BT: Row numbers of the table, int64 or int32, each below V.
        e_BTD: Gradients of the looked-up rows; float32, bfloat16 or float16, any strides.
        h_BSD: The head's inputs, of any of the three dtypes, on the same device.
        g_BSV: Gradients of its outputs, likewise.
    """
    size, num_tokens, width = e_BTD.shape
    num_rows = h_BSD.shape[1]
    strips = triton.cdiv(num_tokens, BLOCK_ROWS)
    partial = torch.empty((size, strips), dtype=torch.float32, device=e_BTD.device)
    if partial.numel():
        block_width, num_warps = width_and_warps(e_BTD.dtype, h_BSD.dtype)
        with torch.cuda.device_of(e_BTD):
            tied_cross_kernel[(size * strips,)](
                ids_BT.contiguous(),
                e_BTD,
                h_BSD,
                g_BSV,
                partial,
                *e_BTD.stride(),
                *h_BSD.stride(),
                *g_BSV.stride(),
                num_tokens,
                num_rows,
                width,
                MIXED=e_BTD.dtype is not h_BSD.dtype,
                BLOCK_ROWS=BLOCK_ROWS,
                BLOCK_WIDTH=block_width,
                num_warps=num_warps,
                num_stages=NUM_STAGES,
            )
    return partial.sum(1)
