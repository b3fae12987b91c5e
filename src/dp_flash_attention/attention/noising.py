"""Adds a call's noise to an exact output that is kept in memory, row by row with its own scale."""

from __future__ import annotations

import torch
from torch import Tensor

from dp_flash_attention.attention.interface import NoiseStream


def add_noise(exact: Tensor, stddev: Tensor, noise: NoiseStream, out_dtype: torch.dtype) -> Tensor:
    """Returns ``exact + stddev·z`` in float32, rounded to ``out_dtype``.

    Args:
        exact: [B, H, Q, E], owned by the caller's call: it is overwritten where no gradient needs it.
        stddev: [B, H, Q], float32, may be expanded.
        noise: Where z comes from.
        out_dtype: Dtype of the result: float32, bfloat16 or float16.

    Returns:
        [B, H, Q, E], contiguous. Its gradient with respect to ``exact`` is the identity.
    """
    if torch.is_grad_enabled() and exact.requires_grad:
        with torch.no_grad():
            z = torch.zeros(exact.shape, dtype=torch.float32, device=exact.device)
            _add_(z, z, stddev, noise)
        return (exact.to(torch.float32) + z).to(out_dtype)
    with torch.no_grad():
        exact = exact.detach()
        writable = exact.dtype is out_dtype and exact.is_contiguous()
        out = exact if writable else torch.empty(exact.shape, dtype=out_dtype, device=exact.device)
        return _add_(out, exact, stddev, noise)


def _add_(out: Tensor, exact: Tensor, stddev: Tensor, noise: NoiseStream) -> Tensor:
    """Writes ``exact`` plus noise to ``out``, one head at a time, so that scratch is one head's output."""
    num_heads = exact.shape[1]
    on_host = out.dtype is torch.float32 and out.device.type == "cpu"
    for entry in range(exact.shape[0]):
        for head in range(num_heads):
            source, target = exact[entry, head], out[entry, head]
            rows = target if on_host else torch.empty(source.shape, dtype=torch.float32)
            if out is not exact or not on_host:
                rows.copy_(source)
            noise.generator.add_row_normal_(
                rows,
                row_stddev=stddev[entry, head].to("cpu").contiguous(),
                step=noise.call_id,
                stream=entry * num_heads + head,
            )
            if not on_host:
                target.copy_(rows)
    return out
