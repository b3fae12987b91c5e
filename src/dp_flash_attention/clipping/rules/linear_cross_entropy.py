"""``LinearCrossEntropy``: the head's norm and weighted gradient without logits [B, T, V]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_attention.clipping.contributions import DenseContribution
from dp_flash_attention.clipping.head_contribution import (
    HeadContribution,
    HeadNorms,
    HeadNormSum,
    version_of,
)
from dp_flash_attention.clipping.linear_cross_entropy import LinearCrossEntropy, head_of, losses_of
from dp_flash_attention.clipping.precision import full_precision
from dp_flash_attention.clipping.rules.linear import LinearRule
from dp_flash_attention.clipping.tape import Tape
from dp_flash_attention.clipping.vocabulary_tiles import Head, Softmax
from dp_flash_attention.core.errors import ExampleCouplingError


class _Pass:
    """One pass over the tiles: losses, and the gradients of their plain sum.

    Args:
        head: The use of the head.
        coefficients_BT: The share of each token in its example's loss.
        with_input_gradient: Whether the input's gradient is wanted.
        with_bias_gradient: Whether each example's bias gradient is wanted.
    """

    def __init__(
        self, head: Head, coefficients_BT: Tensor, *, with_input_gradient: bool, with_bias_gradient: bool
    ) -> None:
        size, vocabulary = head.h_BTD.shape[0], head.weight_VD.shape[0]
        self.grad_h_BTD = torch.zeros_like(head.h_BTD) if with_input_gradient else None
        self.bias_grads_BV = (
            torch.zeros(size, vocabulary, dtype=head.dtype, device=head.h_BTD.device)
            if with_bias_gradient
            else None
        )
        largest_BT = torch.zeros(head.targets_BT.shape, dtype=head.dtype, device=head.h_BTD.device)
        self.kept = Softmax(largest_BT=largest_BT, total_BT=torch.ones_like(largest_BT))
        token_losses_BT = torch.zeros_like(largest_BT)
        sq_norms_B = largest_BT.new_zeros(size)
        self.norms = HeadNorms(sq_norms_B=sq_norms_B, mass_B=torch.zeros_like(sq_norms_B))
        for group in head.groups():
            kept, token_losses_BT[group], above = head.softmax_of(group)
            self.kept.largest_BT[group], self.kept.total_BT[group] = kept.largest_BT, kept.total_BT
            self._add_gradients(head, group, coefficients_BT, above)
            del above
        self.losses_B = losses_of(token_losses_BT, coefficients_BT)

    def _add_gradients(self, head: Head, group: slice, coefficients_BT: Tensor, above: Tensor | None) -> None:
        h_NTD = head.rows(group)
        norm_sum, grad_nD = HeadNormSum(h_NTD), torch.zeros_like(h_NTD).flatten(0, 1)
        for tile in head.tiles():
            g_NTC = head.gradient(group, tile, self.kept, coefficients_BT, above=above)
            norm_sum.add(g_NTC)
            if self.grad_h_BTD is not None:
                grad_nD.addmm_(g_NTC.flatten(0, 1), head.weight(tile))
            if self.bias_grads_BV is not None:
                self.bias_grads_BV[group, tile] = g_NTC.sum(1)
        if self.grad_h_BTD is not None:
            self.grad_h_BTD[group] = grad_nD.view_as(h_NTD).to(self.grad_h_BTD.dtype)
        norms = norm_sum.norms()
        self.norms.sq_norms_B[group], self.norms.mass_B[group] = norms.sq_norms_B, norms.mass_B


class _RecordingLinearCrossEntropy(torch.autograd.Function):
    """The losses; their gradients are formed in the forward pass, while each tile's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        coefficients_BT: Tensor,
        scratch_bytes: int,
        with_bias: bool,
        record: Callable[[Head, Tensor, _Pass, int, Tensor], None],
    ) -> Tensor:
        head = head_of(x, weight, bias, targets, scratch_bytes)
        version = version_of(head)
        with full_precision(x.device):
            done = _Pass(
                head,
                coefficients_BT,
                with_input_gradient=ctx.needs_input_grad[0],
                with_bias_gradient=with_bias,
            )
        ctx.state = head, coefficients_BT, done, version
        ctx.shape, ctx.dtype, ctx.record = x.shape, x.dtype, record
        return done.losses_B

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, ...]:
        head, coefficients_BT, done, version = ctx.state
        ctx.state = None
        grad_x = None
        if done.grad_h_BTD is not None:
            grad_x = done.grad_h_BTD.to(ctx.dtype).mul_(grad_B[:, None, None].to(ctx.dtype)).view(ctx.shape)
        ctx.record(head, coefficients_BT, done, version, grad_B)
        return grad_x, None, None, None, None, None, None, None


class LinearCrossEntropyRule:
    """With targets the weight by a ``HeadContribution``, the bias by its sum over rows; without, as a linear map.

    Guarantees:
        The norm and the weighted sum form the logits' gradients from the same recorded numbers (inputs, softmax,
        weight), by the same products in float32 or wider. A weight that was written to in between is refused.
    """

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is a ``LinearCrossEntropy``."""
        return type(module) is LinearCrossEntropy

    def recording_forward(
        self, module: nn.Module, *, name: str, parameters: dict[str, str], tape: Tape
    ) -> Callable[..., Tensor]:
        """See ``Rule.recording_forward``; inputs are [B, ..., D], targets [B, ...]."""
        assert isinstance(module, LinearCrossEntropy)
        linear = LinearRule().recording_forward(module, name=name, parameters=parameters, tape=tape)

        def record(head: Head, coefficients_BT: Tensor, done: _Pass, version: int, grad_B: Tensor) -> None:
            if "weight" in parameters:
                contribution = HeadContribution(
                    head=head,
                    kept=done.kept,
                    scale_BT=coefficients_BT * grad_B[:, None].to(coefficients_BT),
                    norms=done.norms.scaled(grad_B),
                    version=version,
                )
                tape.record(parameters["weight"], contribution)
            if done.bias_grads_BV is not None:
                grads_BV = done.bias_grads_BV * grad_B[:, None].to(done.bias_grads_BV)
                tape.record(parameters["bias"], DenseContribution(grads_B=grads_BV))

        def forward(
            input: Tensor, targets: Tensor | None = None, *, normalizer: float | None = None
        ) -> Tensor:
            if targets is None:
                return linear(input)
            coefficients_BT = module.coefficients(input, targets, normalizer)
            if targets.shape[0] != tape.batch_size:
                raise ExampleCouplingError(
                    f"module {name!r} received targets of shape {tuple(targets.shape)} in a microbatch of "
                    f"{tape.batch_size} examples: its rows cannot be credited to examples. Put the batch dimension first."
                )
            losses: Tensor = _RecordingLinearCrossEntropy.apply(
                input,
                module.weight,
                module.bias,
                targets,
                coefficients_BT,
                module.scratch_bytes,
                "bias" in parameters,
                record,
            )
            return losses

        return forward
