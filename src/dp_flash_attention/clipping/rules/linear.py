"""Linear maps: ``torch.nn.Linear`` and Hugging Face's ``Conv1D`` (weight stored input-first)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dp_flash_attention.clipping.contributions import DenseContribution, linear_contribution
from dp_flash_attention.clipping.tape import Tape


def is_hugging_face_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's ``Conv1D``, told by name and shape: transformers stays optional."""
    weight, outputs = getattr(module, "weight", None), getattr(module, "nf", None)
    return (
        type(module).__name__ == "Conv1D"
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and weight.shape[1] == outputs
    )


class _RecordingLinear(torch.autograd.Function):
    """``x Wᵀ + b`` whose backward pass records (x, g) instead of computing the weight gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_first: bool,
        record: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            # Save what the product really reads: norm and clipped sum then see the same numbers.
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.input_first = input_first
        ctx.record = record
        return F.linear(x, weight.mT if input_first else weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = grad_output.matmul(weight.mT if ctx.input_first else weight)
        ctx.record(x, grad_output)
        return grad_input, None, None, None, None


class LinearRule:
    """Weight by the smaller linear record, bias by the sum over rows."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is a plain linear map."""
        return type(module) is nn.Linear or is_hugging_face_conv1d(module)

    def recording_forward(
        self, module: nn.Module, *, name: str, parameters: dict[str, str], tape: Tape
    ) -> Callable[[Tensor], Tensor]:
        """See ``Rule.recording_forward``; inputs are [B, ..., D] or flattened [B·T, D]."""
        weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
        input_first = not isinstance(module, nn.Linear)

        def record(x: Tensor, grad_output: Tensor) -> None:
            g_BTP = tape.by_example(grad_output, num_feature_dims=1, module=name)
            if "weight" in parameters:
                x_BTD = tape.by_example(x, num_feature_dims=1, module=name)
                tape.record(
                    parameters["weight"],
                    linear_contribution(
                        x_BTD=x_BTD,
                        g_BTP=g_BTP,
                        weight_shape=weight.shape,
                        input_first=input_first,
                        forms=tape.norm_forms,
                    ),
                )
            if "bias" in parameters:
                dtype = torch.promote_types(g_BTP.dtype, torch.float32)
                tape.record(parameters["bias"], DenseContribution(grads_B=g_BTP.sum(1, dtype=dtype)))

        def forward(input: Tensor) -> Tensor:
            tape.by_example(input, num_feature_dims=1, module=name)
            output: Tensor = _RecordingLinear.apply(input, weight, bias, input_first, record)
            return output

        # Conv1D's argument is called x; callers of either pass it by position.
        return forward
