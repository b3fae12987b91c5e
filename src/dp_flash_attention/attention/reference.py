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
    with torch.no_grad():
        return _attended(call, call.query, call.key, call.value)


def reference_gradients(call: AttentionCall, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value for the gradient ``grad_out`` of the output, float64.

    By differentiating the words of ``interface`` one operation at a time. Rounding counts as the identity, and a row exactly as
    long as its bound as one that is clipped.
    """
    rows = [
        each.detach().cpu().to(torch.float64).requires_grad_(True)
        for each in (call.query, call.key, call.value)
    ]
    with torch.enable_grad():
        out = _attended(call, *rows)
        # So that each of them has a gradient where nothing is seen.
        total = (out * grad_out.cpu().to(torch.float64)).sum() + sum(0.0 * each.sum() for each in rows)
    query, key, value = torch.autograd.grad(total, rows)
    return query, key, value


def _attended(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    dtype = call.query.dtype
    query, key, value = (
        _clipped(rows.cpu(), bound, dtype)
        for rows, bound in ((query, call.norms.query), (key, call.norms.key), (value, call.norms.value))
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


def _clipped(rows: Tensor, bound: float, dtype: torch.dtype) -> Tensor:
    """Clips in float64, and rounds the rows that were scaled to the call's dtype, as a kernel does."""
    exact = rows.to(torch.float64)
    norms = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    scaled = (exact * (bound / norms.clamp_min(bound))).to(dtype).to(torch.float64)
    return torch.where(norms >= bound, scaled, exact)
