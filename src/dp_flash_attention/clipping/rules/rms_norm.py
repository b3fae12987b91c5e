"""Root-mean-square normalisation: torch's, and the copies of it in Hugging Face models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dp_flash_attention.clipping.contributions import DenseContribution
from dp_flash_attention.clipping.norm_layers import kernel_norm_backward, norm_layer_path
from dp_flash_attention.clipping.rules.broadcast import call_with_attributes, per_example_copies
from dp_flash_attention.clipping.tape import Tape


class _RecordingRMSNorm(torch.autograd.Function):
    """Torch's norm on a GPU: its backward pass and each example's gain gradient are one kernel."""

    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, weight: Tensor, eps: float | None, record: Callable[[Tensor], None]
    ) -> Tensor:
        output, rstd = torch.ops.aten._fused_rms_norm(x_BTD, weight.shape, weight, eps)
        ctx.save_for_backward(x_BTD, weight, rstd)
        ctx.record = record
        return cast(Tensor, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_BTD: Tensor) -> tuple[Tensor | None, None, None, None]:
        x_BTD, weight, rstd = ctx.saved_tensors
        found = kernel_norm_backward(
            x_BTD,
            g_BTD,
            mean_BT=None,
            rstd_BT=rstd.reshape(x_BTD.shape[:2]),
            weight_D=weight,
            with_input=ctx.needs_input_grad[0],
        )
        ctx.record(found.gains_BD)
        return found.x_BTD, None, None, None


def _is_one_kernel(module: nn.Module, x_BTD: Tensor) -> bool:
    if type(module) is not nn.RMSNorm or x_BTD.dtype is not module.weight.dtype:
        return False
    return norm_layer_path(x_BTD, width=module.weight.numel()) == "triton"


class RMSNormRule:
    """The gain, shape [D], is replaced by one copy for each example, shape [B, 1, D].

    Torch's own module runs a kernel instead where there is one (``norm_layers``). Copies of it in other libraries round and
    scale in ways of their own, so for them autograd differentiates the class's code.
    """

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is an RMSNorm with one gain vector and nothing else."""
        own = list(module.parameters(recurse=False))
        named = type(module) is nn.RMSNorm or type(module).__name__.endswith("RMSNorm")
        weight = getattr(module, "weight", None)
        return (
            named and len(own) == 1 and own[0] is weight and own[0].dim() == 1 and not list(module.children())
        )

    def recording_forward(
        self, module: nn.Module, *, name: str, parameters: dict[str, str], tape: Tape
    ) -> Callable[..., Tensor]:
        """See ``Rule.recording_forward``; inputs are [B, ..., D] or flattened [B·T, D]."""
        weight = cast(Tensor, module.weight)

        def record(gains_BD: Tensor) -> None:
            tape.record(parameters["weight"], DenseContribution(grads_B=gains_BD))

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x_BTD = tape.by_example(hidden_states, num_feature_dims=1, module=name)
            if _is_one_kernel(module, x_BTD):
                with torch.autocast(x_BTD.device.type, enabled=False):
                    output: Tensor = _RecordingRMSNorm.apply(x_BTD, weight, module.eps, record)
                return output.view(hidden_states.shape)
            copies_B1D = per_example_copies(weight, name=parameters["weight"], tape=tape)[:, None]
            if isinstance(module, nn.RMSNorm):
                output = F.rms_norm(x_BTD, weight.shape, None, module.eps) * copies_B1D
            else:
                output = call_with_attributes(module, {"weight": copies_B1D}, (x_BTD, *args), kwargs)
            return output.view(hidden_states.shape)

        return forward
