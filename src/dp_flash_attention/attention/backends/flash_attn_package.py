"""The package ``flash-attn``, where it is installed. Forward only."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NoReturn

import torch
from torch import Tensor

from dp_flash_attention.attention.interface import AttentionCall
from dp_flash_attention.core.errors import DependencyMissingError


class FlashAttnPackage:
    """``flash_attn.flash_attn_func`` with its log-sum-exp. Its layout is [B, rows, heads, D]."""

    name = "flash_attn"
    devices = frozenset({"cuda"})
    equal_widths = True

    def check_installed(self) -> None:
        """Looks for the package.

        Raises:
            DependencyMissingError: If it is not there.
        """
        if find_spec("flash_attn") is None:
            raise DependencyMissingError(
                "Back end 'flash_attn' needs the package flash-attn, which is not installed. Run: pip install flash-attn"
            )

    def refusal(self, call: AttentionCall, *, needs_grad: bool) -> str | None:
        """Refuses gradients, float32, hidden rows, and causal calls whose lengths differ."""
        if needs_grad:
            return "its gradients are not offered"
        if call.query.dtype not in (torch.bfloat16, torch.float16):
            return f"it computes in bfloat16 or float16, not {call.query.dtype}"
        if call.hidden is not None:
            return "it has no mask"
        if call.causal and call.query.shape[2] != call.key.shape[2]:
            return "it aligns causal masks at the bottom right"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See ``FlashKernel``."""
        from flash_attn import flash_attn_func

        rows = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out, lse, _ = flash_attn_func(*rows, softmax_scale=scale, causal=causal, return_attn_probs=True)
        return out.transpose(1, 2), lse

    def backward(self, *_: object, **__: object) -> NoReturn:
        """Never reached: ``refusal`` keeps calls that need gradients away."""
        raise AssertionError("a kernel without a backward pass was asked for gradients")
