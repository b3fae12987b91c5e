"""``‖gᵀx‖²_F`` by the outer form, tile by tile: the weight gradient of an example is formed and never stored.

A program takes one tile of one example's gradient, P×D, sums its products over the rows in registers, and stores the sum
of their squares, once. Nothing is accumulated in memory (see ``gram_norm.py``). Scratch is B·P·D/16384 numbers.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_flash_attention.attention.kernels.narrow import dot

# Not yet measured: what two warp groups of sm_90 multiply in 96 registers a thread (triton 3.7.1).
BLOCK_OUTPUTS: Final = 128
BLOCK_INPUTS: Final = 128
BLOCK_ROWS: Final = 64
NUM_WARPS: Final = 8
NUM_STAGES: Final = 3


@triton.jit
def gradient_tile(
    x,
    g,
    stride_xt,
    stride_xd,
    stride_gt,
    stride_gp,
    inputs,
    outputs,
    num_rows,
    num_inputs,
    num_outputs,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Returns rows ``outputs`` and columns ``inputs`` of ``gᵀx`` of one example, float32 [BLOCK_OUTPUTS, BLOCK_INPUTS]."""
    gradient = tl.zeros([BLOCK_OUTPUTS, BLOCK_INPUTS], tl.float32)
    for start in tl.range(0, num_rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        far, inside = row.to(tl.int64)[:, None], (row < num_rows)[:, None]
        x_tile = tl.load(
            x + far * stride_xt + inputs[None, :] * stride_xd,
            mask=inside & (inputs < num_inputs)[None, :],
            other=0.0,
        )
        g_tile = tl.load(
            g + far * stride_gt + outputs[None, :] * stride_gp,
            mask=inside & (outputs < num_outputs)[None, :],
            other=0.0,
        )
        gradient = dot(tl.trans(g_tile), x_tile, gradient, "ieee")
    return gradient


@triton.jit
def outer_norm_kernel(
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
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Writes partial sums [B, tiles], float32 and contiguous, for x [B, T, D] and g [B, T, P] by strides."""
    across = tl.cdiv(num_inputs, BLOCK_INPUTS)
    tiles = across * tl.cdiv(num_outputs, BLOCK_OUTPUTS)
    example = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    x += example * stride_xb
    g += example * stride_gb
    inputs = (tile % across) * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)
    outputs = (tile // across) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    gradient = gradient_tile(
        x,
        g,
        stride_xt,
        stride_xd,
        stride_gt,
        stride_gp,
        inputs,
        outputs,
        num_rows,
        num_inputs,
        num_outputs,
        BLOCK_OUTPUTS,
        BLOCK_INPUTS,
        BLOCK_ROWS,
    )
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(gradient * gradient, axis=1), axis=0))


def outer_norm(x_BTD: Tensor, g_BTP: Tensor) -> Tensor:
    """Returns ``‖gᵀx‖²_F`` for each example, float32 [B], by the outer form.

    Args:
        x_BTD: Inputs; float32, bfloat16 or float16, any strides.
        g_BTP: Output gradients, of the same dtype and device.
    """
    size, num_rows, num_inputs = x_BTD.shape
    num_outputs = g_BTP.shape[2]
    tiles = triton.cdiv(num_inputs, BLOCK_INPUTS) * triton.cdiv(num_outputs, BLOCK_OUTPUTS)
    partial = torch.empty((size, tiles), dtype=torch.float32, device=x_BTD.device)
    if partial.numel():
        with torch.cuda.device_of(x_BTD):
            outer_norm_kernel[(size * tiles,)](
                x_BTD,
                g_BTP,
                partial,
                *x_BTD.stride(),
                *g_BTP.stride(),
                num_rows,
                num_inputs,
                num_outputs,
                BLOCK_OUTPUTS=BLOCK_OUTPUTS,
                BLOCK_INPUTS=BLOCK_INPUTS,
                BLOCK_ROWS=BLOCK_ROWS,
                num_warps=NUM_WARPS,
                num_stages=NUM_STAGES,
            )
    return partial.sum(1)
