"""Compares the norm kernels with float64 on a device, before their first use there."""

from __future__ import annotations

from functools import lru_cache

import torch

from dp_flash_attention.clipping.kernels.gram_norm import gram_norm
from dp_flash_attention.clipping.kernels.outer_norm import outer_norm
from dp_flash_attention.core.errors import KernelMismatchError

# Sums of 130 products in float32; a missing tile or a stale sum is off by a tenth.
_TOLERANCE = 1e-4


@lru_cache(maxsize=64)
def disagreement(device: str, dtype: torch.dtype) -> str | None:
    """Returns by how much a kernel misses float64 on a small problem, as a clause, or None if both agree."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(2, 130, 150, generator=generator).to(device, dtype)
    g = torch.randn(2, 130, 70, generator=generator).to(device, dtype)
    exact = torch.einsum("btp,btd->bpd", g.cpu().double(), x.cpu().double()).square().sum((1, 2))
    for norm in (gram_norm, outer_norm):
        error = float((norm(x, g).cpu().double() / exact - 1.0).abs().max())
        if not error <= _TOLERANCE:  # a NaN is not
            return f"{norm.__name__} misses float64 by a share of {error:.3g} on {device!r} in {dtype}"
    return None


def require_agreement(tensor: torch.Tensor) -> None:
    """Raises if the kernels are wrong where ``tensor`` lies; the first call for a device and dtype runs them.

    Raises:
        KernelMismatchError: If they are. Clipping by a wrong norm would break the guarantee.
    """
    problem = disagreement(str(tensor.device), tensor.dtype)
    if problem is not None:
        raise KernelMismatchError(
            f"The norm kernels failed their check ({problem}). Uninstall triton to use torch's products, and report this "
            "device and the versions of triton and torch."
        )
