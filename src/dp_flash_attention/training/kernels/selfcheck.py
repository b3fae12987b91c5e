"""Compares the noisy update with the CPU's noise and with AdamW in float64, before its first use on a device."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dp_flash_attention.core.errors import NoiseUnavailableError
from dp_flash_attention.noise.device import KernelCipher
from dp_flash_attention.noise.kernels.selfcheck import STEPS, check_generator
from dp_flash_attention.noise.keystream import TILE_NUMBERS
from dp_flash_attention.training.kernels.noisy_adamw import TILES_PER_PROGRAM, Moments, noisy_adamw_

_NUMBERS = TILES_PER_PROGRAM * TILE_NUMBERS + 5  # two programs, the second with numbers beyond the end
_DIVISOR = 3.0
# Noise agrees to 16 units of 2^-24 (docs/kernels.md); the update adds a few roundings and β₂'s own in float32.
_TOLERANCE = 1e-5


@lru_cache(maxsize=64)
def disagreement(device: str, cipher: KernelCipher) -> str | None:
    """Returns by how much the kernel misses its reference on a device, as a clause, or None if it agrees."""
    generator = check_generator(cipher)
    drawn = torch.Generator().manual_seed(15)
    sums, weight, first = (torch.randn(_NUMBERS, generator=drawn) for _ in range(3))
    second = torch.rand(_NUMBERS, generator=drawn)
    moments = Moments(learning_rate=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, num_steps=3)
    got = [tensor.to(device, copy=True) for tensor in (weight, first, second)]
    noisy_adamw_(
        got[0],
        sums.to(device),
        *got[1:],
        two_variance=np.float32(2.0),
        divisor=_DIVISOR,
        moments=moments,
        key=generator.kernel_key(STEPS[cipher]),
        stream=0,
    )
    noise = generator.fill_normal_(torch.empty(_NUMBERS), step=STEPS[cipher], stream=0)
    gradient = (sums.double() + noise.double()) / _DIVISOR
    want = exact_adamw(weight, first, second, gradient, moments)
    for name, found, exact in zip(("parameter", "first moment", "second moment"), got, want, strict=True):
        error = float(((found.cpu().double() - exact).abs() / (1.0 + exact.abs())).max())
        if not error <= _TOLERANCE:  # a NaN is not
            return f"the {name} of {cipher!r} misses float64 by {error:.3g} on {device!r}"
    return None


def exact_adamw(
    weight: Tensor, first: Tensor, second: Tensor, gradient: Tensor, moments: Moments
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns parameter and moments after a step of AdamW, float64 (Loshchilov & Hutter 2019, algorithm 2)."""
    keep_first, keep_second = moments.betas
    m = keep_first * first.double() + (1.0 - keep_first) * gradient
    v = keep_second * second.double() + (1.0 - keep_second) * gradient.square()
    m_hat, v_hat = (
        m / (1.0 - keep_first**moments.num_steps),
        v / (1.0 - keep_second**moments.num_steps),
    )
    decayed = weight.double() * (1.0 - moments.learning_rate * moments.weight_decay)
    return decayed - moments.learning_rate * m_hat / (v_hat.sqrt() + moments.eps), m, v


def require_agreement(tensor: Tensor, cipher: KernelCipher) -> None:
    """Raises if the kernel is wrong where ``tensor`` lies; the first call for a device and cipher runs it.

    Raises:
        NoiseUnavailableError: If it is: what it adds would not be the noise that is accounted for.
    """
    problem = disagreement(str(tensor.device), cipher)
    if problem is not None:
        raise NoiseUnavailableError(
            f"The kernel of noise and update failed its check ({problem}). Train with torch.optim.AdamW, and report this device "
            "and the versions of triton and torch."
        )
