"""The attention kernels as one operation that autograd differentiates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from dp_flash_attention.attention.interface import AttentionCall
from dp_flash_attention.attention.kernels.launch import attention_forward
from dp_flash_attention.attention.kernels.launch_backward import attention_backward
from dp_flash_attention.core.errors import InvalidInputError


def differentiable_attention(call: AttentionCall) -> Tensor:
    """Returns the noisy output of a call, [B, H, Q, E]; differentiable with respect to query, key and value, once.

    Between the passes the graph keeps the inputs and the mask, and nothing that was computed from them: no exact output, no
    denominators, and no key of the noise. A backward pass with ``create_graph=True`` raises ``InvalidInputError``.

    Raises:
        NoiseReuseError: If a CUDA graph is being captured.
        NoiseUnavailableError: If no kernel makes the numbers of the call's cipher.
    """
    return cast(Tensor, _DPAttention.apply(call.query, call.key, call.value, call))


class _DPAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        output, _ = attention_forward(call)
        ctx.save_for_backward(query, key, value, call.hidden)
        nothing = query.new_empty(0)
        ctx.call = replace(
            call, query=nothing, key=nothing, value=nothing, hidden=None, stddev=None, noise=None
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Torch's own once_differentiable would drop the second derivative in silence where ``grad`` is a constant.
            raise InvalidInputError(
                "create_graph",
                True,
                bound="False for back end 'triton', whose gradients are not differentiable again",
                remedy="Ask for backend='math'.",
            )
        query, key, value, hidden = ctx.saved_tensors
        call = replace(ctx.call, query=query, key=key, value=value, hidden=hidden)
        needs_query, needs_key, needs_value, _ = ctx.needs_input_grad
        gradients = attention_backward(
            call, grad, needs_query=needs_query, needs_rows=needs_key or needs_value
        )
        return (*gradients, None)
