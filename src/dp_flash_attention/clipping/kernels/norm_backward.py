"""The backward pass of a layer or root-mean-square norm, with each example's gain and bias gradient, in one reading.

For a row x with x̂ = (x - mean)·rstd, output gradients g and gain w,

    ∂x = rstd·(w·g - x̂·⟨w·g, x̂⟩/D - Σ(w·g)/D),   ∂gain = Σ_t g_t·x̂_t,   ∂bias = Σ_t g_t

(without mean and bias for a root-mean-square norm). A program takes ``ROWS_PER_PROGRAM`` rows of one example, reads x and g
once, stores ∂x, and keeps its two running rows of ∂gain and ∂bias in registers until it stores them, once each (see
``gram_norm.py``): nothing has to be cleared before a call, no atomic operation runs, and the result is the same bits
every time. The programs' rows of an example are added by torch. Scratch is 2·B·D·⌈T/64⌉ float32 numbers; nothing of size
B·T·D is written but ∂x.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_flash_attention.attention.kernels.narrow import rounded

# Not yet measured: scratch is 1/16 of x in bfloat16, and 8 examples of 1,024 tokens are 128 programs.
ROWS_PER_PROGRAM: Final = 64
_TILE_NUMBERS: Final = 2048


@triton.jit
def norm_backward_kernel(
    x,
    g,
    mean,
    rstd,
    weight,
    grad_x,
    gains,
    biases,
    num_rows,
    width,
    HAS_MEAN: tl.constexpr,
    STORE_INPUT: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Writes grad_x [B, T, D] and partial sums [B, pieces, D] of gains and, with ``HAS_MEAN``, biases.

    x, g [B, T, D], mean and rstd [B, T] and weight [D] are contiguous; partial sums are float32. A root-mean-square norm reads no
    mean and writes no biases; without ``STORE_INPUT`` no grad_x is written.
    """
    pieces = tl.cdiv(num_rows, ROWS_PER_PROGRAM)
    example = (tl.program_id(0) // pieces).to(tl.int64)
    first_row = (tl.program_id(0) % pieces) * ROWS_PER_PROGRAM
    column = tl.arange(0, BLOCK_WIDTH)
    inside = (column < width)[None, :]
    gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    of_gain = tl.zeros([BLOCK_WIDTH], tl.float32)
    of_bias = tl.zeros([BLOCK_WIDTH], tl.float32)
    for start in tl.range(0, ROWS_PER_PROGRAM, BLOCK_ROWS):
        row = first_row + start + tl.arange(0, BLOCK_ROWS)
        is_row = row < num_rows
        place = example * num_rows + row
        at = place[:, None] * width + column[None, :]
        here = is_row[:, None] & inside
        # Beyond the end everything is 0, so that nothing is added there.
        x_hat = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        value = tl.load(g + at, mask=here, other=0.0).to(tl.float32)
        scale = tl.load(rstd + place, mask=is_row, other=0.0).to(tl.float32)[:, None]
        if HAS_MEAN:
            centre = tl.load(mean + place, mask=is_row, other=0.0).to(tl.float32)[:, None]
            x_hat = tl.where(inside, x_hat - centre, 0.0)
        x_hat *= scale
        of_gain += tl.sum(value * x_hat, axis=0)
        if HAS_MEAN:
            of_bias += tl.sum(value, axis=0)
        if STORE_INPUT:
            value *= gain
            result = value - x_hat * (tl.sum(value * x_hat, axis=1)[:, None] / width)
            if HAS_MEAN:
                result -= tl.sum(value, axis=1)[:, None] / width
            tl.store(grad_x + at, rounded(result * scale, grad_x.dtype.element_ty), mask=here)
    out = tl.program_id(0).to(tl.int64) * width + column
    tl.store(gains + out, of_gain, mask=column < width)
    if HAS_MEAN:
        tl.store(biases + out, of_bias, mask=column < width)


class NormGradients(NamedTuple):
    """What the backward pass of a norm gives.

    Attributes:
        x_BTD: Of the input, in its dtype, or None if it was not asked for.
        gains_BD: Each example's, of the gain, float32.
        biases_BD: Each example's, of the bias, float32; None for a root-mean-square norm.
    """

    x_BTD: Tensor | None
    gains_BD: Tensor
    biases_BD: Tensor | None


def block_shape(width: int) -> tuple[int, int, int]:
    """Returns the rows and columns of a tile and a program's warps."""
    block_width = triton.next_power_of_2(width)
    block_rows = min(ROWS_PER_PROGRAM, max(1, _TILE_NUMBERS // block_width))
    return block_rows, block_width, min(16, max(4, block_width // 512))


def norm_backward(
    x_BTD: Tensor,
    g_BTD: Tensor,
    *,
    mean_BT: Tensor | None,
    rstd_BT: Tensor,
    weight_D: Tensor,
    with_input: bool = True,
) -> NormGradients:
    """Returns the gradients of ``weight · (x - mean) · rstd + bias`` for output gradients g.

    Args:
        x_BTD: Inputs; float32, bfloat16 or float16, D from 1 to
            ``norm_layers.MAX_KERNEL_WIDTH``.
        g_BTD: Output gradients, of the same shape.
        mean_BT: Each row's mean; None for a root-mean-square norm.
        rstd_BT: What each row was multiplied with.
        weight_D: The gain.
        with_input: Whether the input's gradient is wanted.
    """
    size, num_rows, width = x_BTD.shape
    x_BTD, g_BTD, rstd_BT = x_BTD.contiguous(), g_BTD.contiguous(), rstd_BT.contiguous()
    pieces = triton.cdiv(num_rows, ROWS_PER_PROGRAM)
    grad_x = torch.empty(x_BTD.shape, dtype=x_BTD.dtype, device=x_BTD.device) if with_input else None
    gains, biases = (
        torch.empty((size, pieces, width), dtype=torch.float32, device=x_BTD.device) if wanted else None
        for wanted in (True, mean_BT is not None)
    )
    assert gains is not None
    if gains.numel():
        block_rows, block_width, num_warps = block_shape(width)
        with torch.cuda.device_of(x_BTD):
            norm_backward_kernel[(size * pieces,)](
                x_BTD,
                g_BTD,
                rstd_BT if mean_BT is None else mean_BT.contiguous(),
                rstd_BT,
                weight_D.contiguous(),
                x_BTD if grad_x is None else grad_x,
                gains,
                gains if biases is None else biases,
                num_rows,
                width,
                HAS_MEAN=mean_BT is not None,
                STORE_INPUT=with_input,
                ROWS_PER_PROGRAM=ROWS_PER_PROGRAM,
                BLOCK_ROWS=block_rows,
                BLOCK_WIDTH=block_width,
                num_warps=num_warps,
            )
    return NormGradients(
        x_BTD=grad_x, gains_BD=_summed(gains), biases_BD=None if biases is None else _summed(biases)
    )


def _summed(pieces_BKD: Tensor) -> Tensor:
    return pieces_BKD[:, 0] if pieces_BKD.shape[1] == 1 else pieces_BKD.sum(1)
