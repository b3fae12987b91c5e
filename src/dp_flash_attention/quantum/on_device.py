"""Noise on the grid for tensors that stay on their CUDA device: the arithmetic of ``grid.py`` in torch, the noise by a kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import DiscreteGaussianGenerator, ExactCipher
from dp_flash_attention.noise.targets import runs_on_kernel
from dp_flash_attention.quantum.values import LARGEST_FLOAT, MAX_MAGNITUDE

# Others would be rounded or saturated on their way back, which the host does.
_NATIVE = (torch.float32, torch.float64, torch.int64)
_REACH = int(MAX_MAGNITUDE)


def stays_on_device(value: object, cipher: ExactCipher) -> bool:
    """Whether a release of ``value`` is made where it lies: a CUDA tensor of 32 or 64 bits, and a cipher with a kernel."""
    return (
        runs_on_kernel(value)
        and isinstance(value, Tensor)
        and value.dtype in _NATIVE
        and cipher == "chacha20"
    )


def checked_on_device(value: Tensor) -> Tensor:
    """Returns ``value`` without its graph.

    Raises:
        InvalidInputError: If it is empty, not dense, or needs a gradient.
    """
    if value.layout is not torch.strided or value.numel() == 0:
        raise InvalidInputError(
            "value",
            f"{value.layout} of {value.numel()} numbers",
            bound="a dense tensor of at least one number",
            remedy="Convert it first.",
        )
    if value.requires_grad and torch.is_grad_enabled():
        raise InvalidInputError(
            "value.requires_grad",
            True,
            bound="False, for noise has no gradient",
            remedy="Pass value.detach().",
        )
    return value.detach()


def projected_on_device(value: Tensor, l2_clip_norm: float) -> Tensor:
    """Returns ``value`` in double precision, bounded as on the host, projected onto the ball of that L2 norm.

    Any order of summation rounds the norm by no more than the slack that the plan of a clipped release holds.
    """
    wide = bounded_on_device(value, limit=LARGEST_FLOAT)
    norm = math.sqrt(float(wide.square().sum()))
    return wide * (l2_clip_norm / norm) if norm > l2_clip_norm else wide


def bounded_on_device(value: Tensor, *, limit: float, scale: float = 1.0) -> Tensor:
    """Returns ``value * scale`` in double precision as ``values.write_bounded`` writes it: whatever it holds, nothing raises."""
    if value.dtype is torch.int64:
        value = value.clamp(-_REACH, _REACH)
    return (value.double() * scale).nan_to_num_(nan=0.0).clamp_(-limit, limit)


def add_on_device(
    value: Tensor, generator: DiscreteGaussianGenerator, grid: float, *, step: int, dtype: torch.dtype
) -> Tensor:
    """Returns (round(value/grid) + noise)·grid in ``dtype``: what ``grid.add_on_grid`` makes of the same noise.

    Args:
        value: float32, float64 or int64.
        generator: Of the noise, in units of the grid.
        grid: A power of two.
        step: A pair of the generator's key and this is for one release only.
        dtype: Of the result; rounding to it comes last.

    Raises:
        NoiseUnavailableError: If the kernel does not agree with the CPU on this device.
    """
    if value.dtype is torch.int64 and grid == 1.0:
        counts = value.clamp(-_REACH, _REACH).contiguous()
    else:
        numbers = bounded_on_device(value, limit=MAX_MAGNITUDE, scale=1.0 / grid)
        counts = numbers.round_().to(torch.int64).contiguous()  # halves to even, as rint
    generator.add_(counts, step=step, stream=0)
    if dtype is torch.int64:
        return counts if grid == 1.0 else (counts.double() * grid).round_().to(torch.int64)
    return (counts.double() * grid).to(dtype)
