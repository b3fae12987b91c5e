"""torch's attention kernels for NVIDIA GPUs, forward only, where they return their log-sum-exp.

Written to the operators' schemas of torch 2.13. ``selfcheck`` compares each with the float64 reference on the machine
that is to run it, before its first use, and a kernel that disagrees is refused.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from dp_flash_attention.attention.interface import AttentionCall

_aten = torch.ops.aten
_HALVES = (torch.bfloat16, torch.float16)


class _ForwardOnly:
    devices = frozenset({"cuda"})

    def check_installed(self) -> None:
        """It comes with torch."""

    def backward(self, *_: object, **__: object) -> NoReturn:
        """Never reached: ``refusal`` keeps calls that need gradients away."""
        raise AssertionError("a kernel without a backward pass was asked for gradients")


class CudaFlash(_ForwardOnly):
    """torch's flash attention for GPUs: bfloat16 and float16, no bias."""

    name = "flash"
    equal_widths = True

    def refusal(self, call: AttentionCall, *, needs_grad: bool) -> str | None:
        """Refuses gradients, float32, hidden rows, and causal calls whose lengths differ."""
        if needs_grad:
            return "its gradients are not offered"
        if call.query.dtype not in _HALVES:
            return f"it computes in bfloat16 or float16, not {call.query.dtype}"
        if call.hidden is not None:
            return "it has no mask"
        if call.causal and call.query.shape[2] != call.key.shape[2]:
            return "its causal mask needs as many queries as rows"
        if (
            max(call.query.shape[3], call.value.shape[3]) > 256
            or call.query.shape[3] % 8
            or call.value.shape[3] % 8
        ):
            return "it needs widths of at most 256 that are multiples of 8"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See ``FlashKernel``."""
        found = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return found[0], found[1][..., : q.shape[2]]


class CudaCudnn(CudaFlash):
    """cuDNN's flash attention: as torch's, by another library."""

    name = "cudnn"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See ``FlashKernel``."""
        found = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return found[0], found[1].reshape(q.shape[:3])


class CudaEfficient(_ForwardOnly):
    """torch's memory-efficient attention: every float dtype but float64, no grouped heads."""

    name = "efficient"
    equal_widths = False

    def refusal(self, call: AttentionCall, *, needs_grad: bool) -> str | None:
        """Refuses gradients, float64, grouped heads and hidden rows."""
        if needs_grad:
            return "its gradients are not offered"
        if call.query.dtype is torch.float64:
            return "it does not compute in float64"
        if call.hidden is not None:
            return "it has no mask"
        if call.query.shape[1] != call.key.shape[1]:
            return "it has no grouped heads"
        if call.query.shape[3] % 8 or call.value.shape[3] % 8:
            return "it needs widths that are multiples of 8"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See ``FlashKernel``."""
        found = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
        return found[0], found[1][..., : q.shape[2]]
