"""Compares the attention kernels with the float64 reference on a device, before their first use there."""

from __future__ import annotations

from functools import lru_cache

import torch

from dp_flash_attention.attention.interface import PASS_ROWS, AttentionCall, RowNorms
from dp_flash_attention.attention.kernels.launch import attention_forward
from dp_flash_attention.attention.kernels.launch_backward import attention_backward
from dp_flash_attention.attention.reference import reference_attention, reference_gradients

# As shares of the value bound. A wrong clip, scale, mask, head or null weight is off by more than 0.05 here;
# bfloat16 rounds queries, weights and values to 2^-9 each, and scores up to 3 with them; float16 to 2^-12.
_TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 0.03, torch.float16: 0.004}

# Of a whole gradient, as a share of its own norm. The interpreter finds 2.5e-7, 0.0033 and 4.2e-4; the rest is room for a
# GPU's exponential and another order of sums. A wrong clip, mask or denominator is off by more than 0.04.
_GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 0.01, torch.float16: 0.00125}


@lru_cache(maxsize=64)
def disagreement(device: str, dtype: torch.dtype) -> str | None:
    """Returns by how much the kernel misses the reference on a small problem, as a clause, or None if it agrees.

    Half of the rows are longer than their bounds. Noise has a check of its own (``noise.kernels.selfcheck``).
    """
    for causal in (False, True):
        call = _problem(device, dtype, causal=causal)
        expected = reference_attention(call)
        for factors in ("inline", "ahead"):
            found, _ = attention_forward(call, factors=factors, splits=1)
            problem = _difference(call, found, expected)
            if problem is not None:
                return f"{problem} ({causal=}, {factors=})"
    return None


@lru_cache(maxsize=64)
def split_disagreement(device: str, dtype: torch.dtype) -> str | None:
    """Does what ``disagreement`` does for few queries over rows in two ranges."""
    call = _problem(device, dtype, causal=False, num_queries=5, num_rows=2 * PASS_ROWS, num_seen=10)
    found, _ = attention_forward(call, splits=2)
    return _difference(call, found, reference_attention(call))


def _difference(call: AttentionCall, found: torch.Tensor, expected: torch.Tensor) -> str | None:
    error = float(torch.linalg.vector_norm(found.cpu().double() - expected, dim=-1).max())
    if error <= _TOLERANCE[call.query.dtype] * call.norms.value:  # a NaN is not
        return None
    return f"on '{call.query.device}' it misses the reference by {error:.3g} in {call.query.dtype}"


@lru_cache(maxsize=64)
def gradient_disagreement(device: str, dtype: torch.dtype) -> str | None:
    """Returns by how much the kernels' gradients miss the reference's on a small problem, or None if they agree."""
    for causal in (False, True):
        call = _problem(device, dtype, causal=causal)
        grad = torch.randn(call.query.shape, generator=torch.Generator().manual_seed(8)).to(device, dtype)
        names = ("query", "key", "value")
        found, expected = attention_backward(call, grad), reference_gradients(call, grad)
        for name, each, other in zip(names, found, expected, strict=True):
            assert each is not None
            error = float((each.cpu().double() - other).norm() / other.norm())
            if not error <= _GRADIENT_TOLERANCE[dtype]:  # a NaN is not
                return f"on {device!r} its gradient of {name} misses the reference by {error:.3g} ({dtype}, {causal=})"
    return None


def _problem(
    device: str,
    dtype: torch.dtype,
    *,
    causal: bool,
    num_queries: int = 70,
    num_rows: int = 75,
    num_seen: int = 52,
) -> AttentionCall:
    generator = torch.Generator().manual_seed(7)
    norms = RowNorms(query=2.0, key=3.0, value=1.5)

    def rows(heads: int, count: int, norm: float) -> torch.Tensor:
        drawn = torch.randn(1, heads, count, 64, generator=generator)
        lengths = norm * torch.exp(torch.randn(1, heads, count, 1, generator=generator)) / 8.0
        return (drawn * lengths).to(device, dtype)

    # The average of many random rows is next to nothing, and so would be what a mistake changes.
    hidden = torch.rand(1, num_rows, generator=generator) >= num_seen / num_rows
    return AttentionCall(
        query=rows(2, num_queries, norms.query),
        key=rows(1, num_rows, norms.key),
        value=rows(1, num_rows, norms.value),
        norms=norms,
        scale=0.5,
        score_bound=3.0,
        causal=causal,
        hidden=hidden.to(device),
        null_rows=1.5,
        stddev=None,
        noise=None,
        out_dtype=torch.float32,
    )
