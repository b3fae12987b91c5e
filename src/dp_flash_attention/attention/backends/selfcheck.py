"""Compares a kernel with the float64 reference before its first use on a machine."""

from __future__ import annotations

from functools import lru_cache

import torch

from dp_flash_attention.attention.backends.kernel import FlashKernel, attend
from dp_flash_attention.attention.interface import AttentionCall, RowNorms
from dp_flash_attention.attention.reference import reference_attention

_LARGE = 1e4
# Outputs have norm 1 here. Twice what Theorem 5 charges a short context for; a wrong scale, mask, head or
# log-sum-exp is off by more than 0.01 in float32 and 0.1 in the narrow dtypes.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.04, torch.float16: 0.005}


@lru_cache(maxsize=256)
def disagreement(
    kernel: FlashKernel, device: str, dtype: torch.dtype, *, grouped: bool, causal: bool, hides: bool
) -> str | None:
    """Returns by how much a kernel misses the reference on a small problem, as a clause, or None if it agrees.

    One null row of weight 2 makes a wrong log-sum-exp a wrong output.
    """
    call = _problem(device, dtype, grouped=grouped, causal=causal, hides=hides)
    expected = reference_attention(call)
    with torch.no_grad():
        found = attend(kernel, call, call.query, call.key, call.value)
    error = float((found.cpu().to(torch.float64) - expected).norm(dim=-1).max())
    tolerance = _TOLERANCE[dtype]
    if error <= tolerance:  # a NaN does not
        return None
    return f"on this machine it misses the reference by {error:.3g} (at most {tolerance:g} is rounding)"


def _problem(device: str, dtype: torch.dtype, *, grouped: bool, causal: bool, hides: bool) -> AttentionCall:
    generator = torch.Generator().manual_seed(20)
    rows, width = 160, 16

    def unit(heads: int) -> torch.Tensor:
        drawn = torch.randn(2, heads, rows, width, generator=generator, dtype=torch.float64)
        normed: torch.Tensor = drawn / torch.linalg.vector_norm(drawn, dim=-1, keepdim=True)
        return normed.to(device, dtype)

    hidden = torch.zeros(2, rows, dtype=torch.bool)
    hidden[0, -40:] = True
    hidden[1, :130] = True  # a whole first block of rows
    return AttentionCall(
        query=unit(4),
        key=unit(2 if grouped else 4),
        value=unit(2 if grouped else 4),
        norms=RowNorms(query=_LARGE, key=_LARGE, value=_LARGE),
        scale=3.0,
        score_bound=3.1,
        causal=causal,
        hidden=hidden.to(device) if hides else None,
        null_rows=2.0,
        stddev=None,
        noise=None,
        out_dtype=torch.float32,
    )
