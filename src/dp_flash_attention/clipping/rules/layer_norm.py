"""``torch.nn.LayerNorm``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_attention.clipping.contributions import DenseContribution
from dp_flash_attention.clipping.tape import Tape

# From this many numbers an example on, one fused backward call for each example beats the
# vectorised form, which reads the activations four more times (2-core EPYC 7003: T x D = 128 x 64).
_FUSED_FROM = 8192


class _RecordingLayerNorm(torch.autograd.Function):
    """Layer normalisation whose backward pass records each example's gain and bias gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        batch_size: int,
        record: Callable[[Tensor, Tensor | None], None],
    ) -> Tensor:
        shape = weight.shape
        output, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.batch_size = batch_size
        ctx.record = record
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        size = ctx.batch_size
        backward = _backward_fused if x.numel() >= _FUSED_FROM * size else _backward_vectorised
        needs_input = ctx.needs_input_grad[0]
        grad_input, gains, biases = backward(
            grad_output.contiguous(), x.contiguous(), weight, bias, mean, rstd, size, needs_input
        )
        ctx.record(gains, biases)
        return grad_input, None, None, None, None, None


_Grads = tuple[Tensor | None, Tensor, Tensor | None]


def _backward_fused(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor, size: int, needs: bool
) -> _Grads:
    """One call of torch's fused kernel for each example: no pass over memory beyond torch's own."""
    rows = [t.reshape(size, -1, *t.shape[t.dim() - weight.dim() :]) for t in (g, x)]
    stats = [t.reshape(size, -1, *[1] * weight.dim()) for t in (mean, rstd)]
    has_bias = bias is not None
    results = [
        torch.ops.aten.native_layer_norm_backward(
            rows[0][i], rows[1][i], weight.shape, stats[0][i], stats[1][i], weight, bias, [needs, True, has_bias]
        )
        for i in range(size)
    ]
    grad_input = torch.stack([r[0] for r in results]).view_as(x) if needs else None
    gains = torch.stack([r[1] for r in results])
    return grad_input, gains, torch.stack([r[2] for r in results]) if has_bias else None


def _backward_vectorised(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor, size: int, needs: bool
) -> _Grads:
    """Few, small rows: one call for the inputs, one vectorised sum for gains and biases."""
    grad_input = None
    if needs:
        grad_input = torch.ops.aten.native_layer_norm_backward(
            g, x, weight.shape, mean, rstd, weight, bias, [True, False, False]
        )[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = (size, -1, *weight.shape)
    normalised = (x.to(dtype) - mean.to(dtype)) * rstd.to(dtype)
    wide = g.to(dtype)
    gains = (wide * normalised).reshape(rows).sum(1)
    return grad_input, gains, wide.reshape(rows).sum(1) if bias is not None else None


class LayerNormRule:
    """Gain and bias gradients kept for each example: [B, D] is small."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is torch's LayerNorm."""
        return type(module) is nn.LayerNorm

    def recording_forward(
        self, module: nn.Module, *, name: str, parameters: dict[str, str], tape: Tape
    ) -> Callable[[Tensor], Tensor]:
        """See ``Rule.recording_forward``; inputs are [B, ..., D] or flattened [B·T, D]."""
        assert isinstance(module, nn.LayerNorm)
        weight, bias, eps = module.weight, module.bias, module.eps

        def record(gains: Tensor, biases: Tensor | None) -> None:
            if "weight" in parameters:
                tape.record(parameters["weight"], DenseContribution(grads_B=gains))
            if "bias" in parameters and biases is not None:
                tape.record(parameters["bias"], DenseContribution(grads_B=biases))

        def forward(input: Tensor) -> Tensor:
            tape.by_example(input, num_feature_dims=weight.dim(), module=name)
            # Under autocast torch computes normalisations in float32; so do we.
            if torch.is_autocast_enabled(input.device.type):
                input = input.to(weight.dtype)
            with torch.autocast(input.device.type, enabled=False):
                output: Tensor = _RecordingLayerNorm.apply(input, weight, bias, eps, tape.batch_size, record)
            return output

        return forward
