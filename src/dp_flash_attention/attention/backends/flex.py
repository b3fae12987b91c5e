"""FlexAttention, compiled: the first call of a shape compiles for some seconds.

GPUs only: torch 2.13 compiles it for CPUs without the log-sum-exp, which null rows and passes need.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dp_flash_attention.attention.interface import AttentionCall


class FlexKernel:
    """``torch.nn.attention.flex_attention`` with its log-sum-exp; masks become block masks."""

    name = "flex"
    devices = frozenset({"cuda"})
    equal_widths = True

    def check_installed(self) -> None:
        """It comes with torch; what compiles it is looked for when it compiles."""

    def refusal(self, call: AttentionCall, *, needs_grad: bool) -> str | None:
        """Refuses gradients and float64."""
        if needs_grad:
            return "its gradients are not offered"
        if call.query.dtype is torch.float64:
            return "it does not compute in float64"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See ``FlashKernel``."""
        from torch.nn.attention.flex_attention import AuxRequest

        out, extra = _compiled()(
            q,
            k,
            v,
            block_mask=_block_mask(q, k, causal=causal, bias=bias),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
        )
        return out, extra.lse

    def backward(self, *_: object, **__: object) -> Any:
        """Never reached: ``refusal`` keeps calls that need gradients away."""
        raise AssertionError("a kernel without a backward pass was asked for gradients")


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _block_mask(q: Tensor, k: Tensor, *, causal: bool, bias: Tensor | None) -> Any:
    if not causal and bias is None:
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    seen = None if bias is None else bias[:, 0, 0] == 0

    def visible(b: Tensor, h: Tensor, t: Tensor, i: Tensor) -> Tensor:
        shown = t >= i if causal else i >= 0
        return shown if seen is None else shown & seen[b, i]

    batch = None if seen is None else len(seen)
    return create_block_mask(visible, batch, None, q.shape[2], k.shape[2], device=str(q.device))
