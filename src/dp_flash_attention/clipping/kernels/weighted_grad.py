"""``Σ_i f_i · g_iᵀx_i``: the clipped sum of a linear map's weight, from 16-bit inputs and float32 factors.

Multiplying x or g by the clip factors beforehand would round them anew: what is added would no longer be what the norm was
taken of, and where an example's rows cancel, the difference could be larger than the clip norm allows. Here an
example's products are summed in float32, on the tensor cores, and its factor meets the float32 sum.

A program takes one tile of the gradient, P×D, and a run of examples. It stores its sum once; runs are added up by torch,
in a fixed order, so there is no atomic operation, nothing to clear before a call, and the result is the same bits every
time. Scratch is at most 16 MiB, and none where the gradient has 128 tiles or more.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_flash_attention.clipping.kernels.outer_norm import gradient_tile

# Not yet measured: two sums of 128 x 128 take 64 registers a thread each with eight warps.
BLOCK_OUTPUTS: Final = 128
BLOCK_INPUTS: Final = 128
BLOCK_ROWS: Final = 64
NUM_WARPS: Final = 8
NUM_STAGES: Final = 3

# Programs that keep an H100 (132 SMs) busy; fewer tiles than this are shared out over runs of examples.
_ENOUGH_PROGRAMS: Final = 128


@triton.jit
def weighted_grad_kernel(
    x,
    g,
    factors,
    out,
    stride_xb,
    stride_xt,
    stride_xd,
    stride_gb,
    stride_gt,
    stride_gp,
    size,
    num_rows,
    num_inputs,
    num_outputs,
    examples_per_run,
    ADD: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Writes, or adds to, out [runs, P, D], float32 and contiguous, for x [B, T, D] and g [B, T, P] by strides."""
    across = tl.cdiv(num_inputs, BLOCK_INPUTS)
    tiles = across * tl.cdiv(num_outputs, BLOCK_OUTPUTS)
    run = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    inputs = (tile % across) * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)
    outputs = (tile // across) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    total = tl.zeros([BLOCK_OUTPUTS, BLOCK_INPUTS], tl.float32)
    first = run.to(tl.int64) * examples_per_run
    for k in tl.range(0, tl.minimum(examples_per_run, size - run * examples_per_run)):
        example = first + k
        gradient = gradient_tile(
            x + example * stride_xb,
            g + example * stride_gb,
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
        factor = tl.load(factors + example)
        # 0 · NaN is NaN: an example of factor 0 counts as nothing whatever it holds.
        total += tl.where(factor == 0.0, 0.0, gradient * factor)
    inside = (outputs < num_outputs)[:, None] & (inputs < num_inputs)[None, :]
    place = (
        out + (run.to(tl.int64) * num_outputs + outputs.to(tl.int64)[:, None]) * num_inputs + inputs[None, :]
    )
    if ADD:
        total += tl.load(place, mask=inside, other=0.0)
    tl.store(place, total, mask=inside)


def weighted_grad(x_BTD: Tensor, g_BTP: Tensor, factors_B: Tensor, out_PD: Tensor, *, fresh: bool) -> None:
    """Adds ``Σ_i f_i · g_iᵀx_i`` to ``out_PD``.

    Args:
        x_BTD: Inputs; bfloat16, float16 or float32, any strides.
        g_BTP: Output gradients, of the same dtype and device.
        factors_B: float32 and contiguous. An example of factor 0 adds nothing, NaN included.
        out_PD: float32 and contiguous.
        fresh: Whether ``out_PD`` holds nothing yet and is overwritten.
    """
    size, num_rows, num_inputs = x_BTD.shape
    num_outputs = g_BTP.shape[2]
    tiles = triton.cdiv(num_inputs, BLOCK_INPUTS) * triton.cdiv(num_outputs, BLOCK_OUTPUTS)
    if tiles == 0:
        return
    runs = max(1, min(size, triton.cdiv(_ENOUGH_PROGRAMS, tiles)))
    examples_per_run = triton.cdiv(max(1, size), runs)
    runs = triton.cdiv(max(1, size), examples_per_run)
    target = out_PD
    if runs > 1:
        target = torch.empty((runs, num_outputs, num_inputs), dtype=torch.float32, device=x_BTD.device)
    with torch.cuda.device_of(x_BTD):
        weighted_grad_kernel[(runs * tiles,)](
            x_BTD,
            g_BTP,
            factors_B,
            target,
            *x_BTD.stride(),
            *g_BTP.stride(),
            size,
            num_rows,
            num_inputs,
            num_outputs,
            examples_per_run,
            ADD=runs == 1 and not fresh,
            BLOCK_OUTPUTS=BLOCK_OUTPUTS,
            BLOCK_INPUTS=BLOCK_INPUTS,
            BLOCK_ROWS=BLOCK_ROWS,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    if runs > 1 and fresh:
        torch.sum(target, 0, out=out_PD)
    elif runs > 1:
        out_PD.add_(target.sum(0))
