"""What a call means, in float64 and as slowly as it reads. Every back end is compared with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dp_flash_attention.attention.interface import AttentionCall
from dp_flash_attention.noise.rounded_gaussian import RoundedGaussian


def reference_attention(call: AttentionCall) -> Tensor:
    """Returns the exact part of a call, without noise: float64 [B, H, Q, E].

    One query at a time, over the rows that it sees and nothing else, in the words of ``interface``.
    """
    query, key, value = (
        _clipped(rows.detach().cpu(), bound)
        for rows, bound in (
            (call.query, call.norms.query),
            (call.key, call.norms.key),
            (call.value, call.norms.value),
        )
    )
    batch, num_heads, num_queries, _ = query.shape
    group = num_heads // key.shape[1]
    out = torch.full((batch, num_heads, num_queries, value.shape[-1]), math.nan, dtype=torch.float64)
    for b in range(batch):
        seen = torch.ones(key.shape[2], dtype=torch.bool) if call.hidden is None else ~call.hidden[b].cpu()
        for h in range(num_heads):
            for t in range(num_queries):
                rows = seen.clone()
                if call.causal:
                    rows[t + 1 :] = False
                keys, values = key[b, h // group][rows], value[b, h // group][rows]
                weights = torch.exp(call.scale * (keys @ query[b, h, t]))
                total = weights.sum() + call.null_rows
                out[b, h, t] = (weights @ values) / total if total > 0.0 else 0.0
    return out


def reference_noise(call: AttentionCall) -> Tensor:
    """Returns the noise of a call, float64 [B, H, Q, E]: every head's normals, times its rows' deviations.

    With noise ``"exact"``, whole numbers times γ.
    """
    assert call.noise is not None
    assert call.stddev is not None
    if call.noise.name == "exact":
        return _reference_steps(call) * reference_grid(call)
    assert call.noise.generator is not None
    batch, num_heads, num_queries, _ = call.query.shape
    out = torch.empty((batch, num_heads, num_queries, call.value.shape[-1]), dtype=torch.float64)
    for b in range(batch):
        for h in range(num_heads):
            z = torch.empty(out.shape[2:], dtype=torch.float32)
            call.noise.generator.fill_normal_(z, step=call.noise.call_id, stream=b * num_heads + h)
            out[b, h] = z.to(torch.float64) * call.stddev[b, h].cpu().to(torch.float64)[:, None]
    return out


def reference_grid(call: AttentionCall) -> Tensor:
    """Returns γ of every output row of a call with exact noise, float64 [B, H, Q, 1]."""
    assert call.noise is not None
    assert call.noise.steps is not None
    assert call.stddev is not None
    return call.stddev.cpu().to(torch.float64).unsqueeze(-1) / call.noise.steps


def _reference_steps(call: AttentionCall) -> Tensor:
    noise, shape = call.noise, (*call.query.shape[:3], call.value.shape[-1])
    assert noise is not None
    assert noise.steps is not None
    drawn = RoundedGaussian(float(noise.steps)).draw(
        noise.key, math.prod(shape), step=noise.call_id, stream=0, cipher=noise.cipher
    )
    return torch.from_numpy(drawn).to(torch.float64).view(shape)


def _clipped(rows: Tensor, bound: float) -> Tensor:
    """Clips in float64, and rounds the rows that were scaled to their own dtype, as a kernel does."""
    exact = rows.to(torch.float64)
    norms = exact.square().sum(dim=-1, keepdim=True).sqrt()
    scaled = (exact * (bound / norms)).to(rows.dtype).to(torch.float64)
    return torch.where(norms > bound, scaled, exact)
