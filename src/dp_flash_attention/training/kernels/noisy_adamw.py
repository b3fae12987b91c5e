"""A step's noise and AdamW's update of one parameter in one pass: no noise and no noisy gradient is written to memory.

For the sum s of clipped gradients, z the normals of the position and public numbers B̄, β₁, β₂, λ, η, ε,

    g = (s + z)/B̄,   m ← m + (1-β₁)(g - m),   v ← β₂v + (1-β₂)g²,   w ← (1-ηλ)w - (η/c₁)·m/(√v/√c₂ + ε)

with c₁ = 1-β₁ᵗ and c₂ = 1-β₂ᵗ: the operations of ``torch.optim.AdamW``. A program makes whole tiles of noise by the device
functions of ``noise/kernels/writer.py``, with the same numbers for the same (key, step, parameter).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_flash_attention.noise.device import KernelKey
from dp_flash_attention.noise.kernels.transform import tile_normals
from dp_flash_attention.noise.keystream import TILE_NUMBERS

# Not yet measured: as in noise/kernels/writer.py.
TILES_PER_PROGRAM: Final = 2
NUM_WARPS: Final = 4

# Scalars that change from step to step: a variant for each would be compiled otherwise.
_NEVER_SPECIALISED = [
    *("two_variance", "divisor", "shrink", "keep_first", "keep_second", "step_size", "root", "eps"),
    *("k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "stream", "step"),
]


@triton.jit(do_not_specialize=_NEVER_SPECIALISED)
def noisy_adamw_kernel(
    parameter,
    sums,
    first,
    second,
    total,
    two_variance,
    divisor,
    shrink,
    keep_first,
    keep_second,
    step_size,
    root,
    eps,
    k0: tl.uint32,
    k1: tl.uint32,
    k2: tl.uint32,
    k3: tl.uint32,
    k4: tl.uint32,
    k5: tl.uint32,
    k6: tl.uint32,
    k7: tl.uint32,
    stream: tl.uint32,
    step: tl.uint64,
    CIPHER: tl.constexpr,
    TILES: tl.constexpr,
):
    """Updates parameter, first and second moment (float32, contiguous, ``total`` numbers); ``sums`` stays as it is."""
    # The interpreter ignores the annotations of the arguments; on a device these conversions do nothing.
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
    program = tl.program_id(0).to(tl.int64)
    tile = (program * TILES).to(tl.uint64)
    noise = tile_normals(
        key, tile, stream.to(tl.uint32), step.to(tl.uint64), two_variance, sums, CIPHER, TILES
    )
    index = program * (2048 * TILES) + tl.arange(0, 2048 * TILES)
    inside = index < total
    # Divisions and roots are the rounded ones: the approximate ones of the hardware would miss torch's by two units.
    gradient = tl.div_rn(noise + tl.load(sums + index, mask=inside, other=0.0), divisor)
    m = tl.load(first + index, mask=inside, other=0.0)
    m += (gradient - m) * (1.0 - keep_first)
    v = tl.load(second + index, mask=inside, other=0.0) * keep_second
    v += (1.0 - keep_second) * gradient * gradient
    weight = tl.load(parameter + index, mask=inside, other=0.0) * shrink
    weight -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    tl.store(first + index, m, mask=inside)
    tl.store(second + index, v, mask=inside)
    tl.store(parameter + index, weight, mask=inside)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """AdamW's public numbers for one update.

    Attributes:
        learning_rate: η.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ.
        num_steps: t, this one included.
    """

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    num_steps: float


def noisy_adamw_(
    parameter: Tensor,
    sums: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    two_variance: np.float32,
    divisor: float,
    moments: Moments,
    key: KernelKey,
    stream: int,
) -> None:
    """Takes one step of AdamW with the gradient ``(sums + noise)/divisor``, in place.

    Args:
        parameter: float32 and contiguous, as the other three, with at least one element.
        sums: Sums of clipped gradients; only read.
        first: First moment, updated.
        second: Second moment, updated.
        two_variance: Twice the variance of the noise, from ``noise.targets.float32_two_variance``.
        divisor: B̄.
        moments: Numbers of the optimizer.
        key: The noise's key for the step.
        stream: Number of the parameter within the step.
    """
    keep_first, keep_second = moments.betas
    grid = (triton.cdiv(parameter.numel(), TILE_NUMBERS * TILES_PER_PROGRAM),)
    with torch.cuda.device_of(parameter):
        noisy_adamw_kernel[grid](
            parameter,
            sums,
            first,
            second,
            parameter.numel(),
            float(two_variance),
            divisor,
            1.0 - moments.learning_rate * moments.weight_decay,
            keep_first,
            keep_second,
            moments.learning_rate / (1.0 - keep_first**moments.num_steps),
            (1.0 - keep_second**moments.num_steps) ** 0.5,
            moments.eps,
            *key.words,
            stream,
            key.step,
            CIPHER=key.cipher,
            TILES=TILES_PER_PROGRAM,
            num_warps=NUM_WARPS,
        )
