"""The attention kernels that come with torch, called where they return their log-sum-exp.

``torch.nn.functional.scaled_dot_product_attention`` picks one of them and drops the log-sum-exp, which null rows
and chunks need. The operators below are what it calls; ``selfcheck`` compares each with the float64 reference
before its first use, so that a torch in which one of them means something else is refused.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dp_flash_attention.attention.interface import AttentionCall

_aten = torch.ops.aten


class CpuFlash:
    """torch's flash attention for CPUs. Grouped heads, bias and unequal lengths are native; widths must agree."""

    name = "flash"
    devices = frozenset({"cpu"})
    equal_widths = True

    def check_installed(self) -> None:
        """It comes with torch."""

    def refusal(self, call: AttentionCall, *, needs_grad: bool) -> str | None:
        """Refuses nothing."""
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See ``FlashKernel``."""
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        causal: bool,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``FlashKernel``."""
        grads: tuple[Tensor, Tensor, Tensor] = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
        return grads


class MathKernel:
    """The formula itself in plain operations: any device, any dtype, and Q×K scores in memory."""

    name = "math"
    devices = frozenset({"cpu", "cuda"})
    equal_widths = False

    def check_installed(self) -> None:
        """It is written here."""

    def refusal(self, call: AttentionCall, *, needs_grad: bool) -> str | None:
        """Refuses nothing."""
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See ``FlashKernel``."""
        scores = self._scores(q, k, scale=scale, causal=causal, bias=bias)
        lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - lse.unsqueeze(-1))
        return weights @ self._widened(v, q).to(weights.dtype), lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        causal: bool,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``FlashKernel``."""
        scores = self._scores(q, k, scale=scale, causal=causal, bias=bias)
        weights = torch.exp(scores - lse.unsqueeze(-1))
        working = weights.dtype
        grad, out = grad.to(working), out.to(working)
        keys, values = self._widened(k, q).to(working), self._widened(v, q).to(working)
        grad_weights = grad @ values.mT
        grad_scores = scale * weights * (grad_weights - (grad * out).sum(dim=-1, keepdim=True))
        grad_k, grad_v = grad_scores.mT @ q.to(working), weights.mT @ grad
        return (
            (grad_scores @ keys).to(q.dtype),
            self._narrowed(grad_k, k).to(k.dtype),
            self._narrowed(grad_v, v).to(v.dtype),
        )

    @staticmethod
    def _widened(rows: Tensor, q: Tensor) -> Tensor:
        return rows.repeat_interleave(q.shape[1] // rows.shape[1], dim=1)

    @staticmethod
    def _narrowed(grads: Tensor, rows: Tensor) -> Tensor:
        batch, num_heads, *rest = grads.shape
        return grads.reshape(batch, rows.shape[1], num_heads // rows.shape[1], *rest).sum(dim=2)

    def _scores(self, q: Tensor, k: Tensor, *, scale: float, causal: bool, bias: Tensor | None) -> Tensor:
        working = torch.promote_types(q.dtype, torch.float32)
        scores = scale * (q.to(working) @ self._widened(k, q).to(working).mT)
        if causal:
            beyond = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(beyond, -math.inf)
        return scores if bias is None else scores + bias.to(working)
