"""Convolutions over one or two dimensions, patch embeddings above all: linear maps of unfolded inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_input, conv2d_input

from dp_flash_attention.clipping.contributions import (
    DenseContribution,
    LinearContribution,
    linear_contribution,
)
from dp_flash_attention.clipping.tape import Tape
from dp_flash_attention.core.errors import ExampleCouplingError


class _RecordingConv(torch.autograd.Function):
    """A convolution whose backward pass records (x, g) instead of computing the weight gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        module: nn.Conv1d | nn.Conv2d,
        record: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.module = module
        ctx.record = record
        convolve = F.conv1d if isinstance(module, nn.Conv1d) else F.conv2d
        with torch.autocast(x.device.type, enabled=False):
            return convolve(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        module = ctx.module
        grad_input = None
        if ctx.needs_input_grad[0]:
            of_input = conv1d_input if isinstance(module, nn.Conv1d) else conv2d_input
            grad_input = of_input(
                x.shape, weight, grad_output, module.stride, module.padding, module.dilation, module.groups
            )
        ctx.record(x, grad_output)
        return grad_input, None, None, None, None


def _as_2d(size: tuple[int, ...]) -> tuple[int, int]:
    return (1, size[0]) if len(size) == 1 else (size[0], size[1])


def _unfolded(x: Tensor, module: nn.Conv1d | nn.Conv2d) -> Tensor:
    """Returns the input patches, [B, T, channels·kernel], one row for each output position."""
    one_dimensional = isinstance(module, nn.Conv1d)
    assert not isinstance(module.padding, str)
    padding = (0, module.padding[0]) if one_dimensional else _as_2d(module.padding)
    patches_BDT = F.unfold(
        x.unsqueeze(2) if one_dimensional else x,
        _as_2d(module.kernel_size),
        dilation=_as_2d(module.dilation),
        padding=padding,
        stride=_as_2d(module.stride),
    )
    return patches_BDT.mT


class ConvRule:
    """Weight by the linear contribution over patches; grouped weights by a gradient an example."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is a plain, zero-padded convolution with numeric padding."""
        return (
            type(module) in (nn.Conv1d, nn.Conv2d)
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )

    def recording_forward(
        self, module: nn.Module, *, name: str, parameters: dict[str, str], tape: Tape
    ) -> Callable[[Tensor], Tensor]:
        """See ``Rule.recording_forward``; inputs are [B, channels, length] or [B, channels, h, w]."""
        assert isinstance(module, (nn.Conv1d, nn.Conv2d))
        conv = module
        weight, bias = conv.weight, conv.bias

        def record(x: Tensor, grad_output: Tensor) -> None:
            g_BTP = grad_output.flatten(2).mT
            if "weight" in parameters:
                contribution = _grouped(x, g_BTP) if conv.groups > 1 else _plain(x, g_BTP)
                tape.record(parameters["weight"], contribution)
            if "bias" in parameters:
                dtype = torch.promote_types(g_BTP.dtype, torch.float32)
                tape.record(parameters["bias"], DenseContribution(grads_B=g_BTP.sum(1, dtype=dtype)))

        def _plain(x: Tensor, g_BTP: Tensor) -> LinearContribution | DenseContribution:
            return linear_contribution(
                x_BTD=_unfolded(x, conv), g_BTP=g_BTP, weight_shape=weight.shape, forms=tape.norm_forms
            )

        def _grouped(x: Tensor, g_BTP: Tensor) -> DenseContribution:
            size, groups = x.shape[0], conv.groups
            dtype = torch.promote_types(g_BTP.dtype, torch.float32)
            x_BTgd = _unfolded(x, conv).unflatten(2, (groups, -1)).to(dtype)
            g_BTgp = g_BTP.unflatten(2, (groups, -1)).to(dtype)
            grads = torch.einsum("btgp,btgd->bgpd", g_BTgp, x_BTgd)
            return DenseContribution(grads_B=grads.reshape(size, *weight.shape))

        def forward(input: Tensor) -> Tensor:
            if input.dim() != weight.dim() or input.shape[0] != tape.batch_size:
                raise ExampleCouplingError(
                    f"module {name!r} received a tensor of shape {tuple(input.shape)} in a microbatch of "
                    f"{tape.batch_size} examples. Put the batch dimension first."
                )
            output: Tensor = _RecordingConv.apply(input, weight, bias, conv, record)
            return output

        return forward
