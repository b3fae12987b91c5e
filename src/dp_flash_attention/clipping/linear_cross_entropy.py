"""A linear head and its cross entropy in one module, for vocabularies whose logits do not fit into memory.

Called with targets, ``LinearCrossEntropy`` returns one loss for each example and never stores logits [B, T, V]; called
without, it is the ``torch.nn.Linear`` that it replaces. Under a ``ClippedGradientAccumulator`` it has a rule of
its own, ``rules.linear_cross_entropy``, with exact per-example norms.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from dp_flash_attention.clipping.precision import full_precision
from dp_flash_attention.clipping.vocabulary_tiles import SCRATCH_BYTES, Head, Softmax
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.validation import positive_finite


def head_of(input: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scratch_bytes: int) -> Head:
    """Returns the use of a head that the call describes, outside of autograd.

    Under autocast inputs and weight are rounded as a linear map's are; products and sums are float32 or wider.
    """
    h_BTD = input.detach().reshape(targets.shape[0], -1, input.shape[-1])
    if torch.is_autocast_enabled(input.device.type) and h_BTD.dtype != torch.float64:
        h_BTD = h_BTD.to(torch.get_autocast_dtype(input.device.type))
    return Head(
        h_BTD=h_BTD,
        weight_VD=weight.detach(),
        bias_V=None if bias is None else bias.detach(),
        targets_BT=targets.reshape(targets.shape[0], -1).clamp(min=0),
        scratch_bytes=scratch_bytes,
    )


def losses_of(token_losses_BT: Tensor, coefficients_BT: Tensor) -> Tensor:
    """Returns each example's loss, [B]; an ignored token adds nothing, whatever it holds."""
    return (token_losses_BT * coefficients_BT).masked_fill(coefficients_BT == 0, 0).sum(1)


class _LinearCrossEntropy(torch.autograd.Function):
    """The losses, with ordinary gradients: what runs where nothing is recorded."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        coefficients_BT: Tensor,
        scratch_bytes: int,
    ) -> Tensor:
        head = head_of(x, weight, bias, targets, scratch_bytes)
        with full_precision(x.device):
            kept, token_losses_BT = head.softmax()
        ctx.save_for_backward(head.h_BTD, weight, bias, head.targets_BT, coefficients_BT)
        ctx.kept, ctx.scratch_bytes, ctx.shape, ctx.dtype = kept, scratch_bytes, x.shape, x.dtype
        return losses_of(token_losses_BT, coefficients_BT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Any, ...]:
        h_BTD, weight, bias, targets_BT, coefficients_BT = ctx.saved_tensors
        head = Head(
            h_BTD=h_BTD, weight_VD=weight, bias_V=bias, targets_BT=targets_BT, scratch_bytes=ctx.scratch_bytes
        )
        with full_precision(h_BTD.device):
            grads = _ordinary_gradients(head, ctx.kept, coefficients_BT * grad_B[:, None])
        grad_x = grads[0].view(ctx.shape).to(ctx.dtype)
        grad_bias = None if bias is None else grads[2].to(bias.dtype)
        return grad_x, grads[1].to(weight.dtype), grad_bias, None, None, None


def _ordinary_gradients(head: Head, kept: Softmax, scale_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_h_BTD = torch.zeros_like(head.h_BTD, dtype=head.dtype)
    grad_weight = torch.zeros_like(head.weight_VD, dtype=head.dtype)
    grad_bias = grad_weight.new_zeros(head.weight_VD.shape[0])
    for tile in head.tiles():
        for group in head.groups():
            g_nC = head.gradient(group, tile, kept, scale_BT).flatten(0, 1)
            grad_h_BTD[group].view(-1, grad_h_BTD.shape[2]).addmm_(g_nC, head.weight(tile))
            grad_weight[tile].addmm_(g_nC.mT, head.rows(group).flatten(0, 1))
            grad_bias[tile] += g_nC.sum(0)
    return grad_h_BTD, grad_weight, grad_bias


class LinearCrossEntropy(nn.Linear):
    """``cross_entropy(x Wᵀ + b, targets)`` with one loss for each example.

    Args:
        in_features: D.
        out_features: V.
        bias: Whether there is one.
        scratch_bytes: Most bytes of logits held at once, forward and backward.

    Example:
        >>> head = LinearCrossEntropy(8, 50_000, bias=False)
        >>> hidden, targets = torch.randn(2, 5, 8), torch.tensor([[1, 2, 3, -100, -100], [4, 5, 6, 7, 8]])
        >>> head(hidden, targets).shape
        torch.Size([2])

    Guarantees:
        Entry i of the losses depends on row i of the arguments alone: the divisor is that example's own number of
        counted targets, or the public constant ``normalizer``, never a number of the batch.
    """

    ignore_index = -100
    """Target of a position that carries no loss, as in PyTorch and Hugging Face."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scratch_bytes: int = SCRATCH_BYTES,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.scratch_bytes = scratch_bytes

    @classmethod
    def sharing(cls, linear: nn.Linear, *, scratch_bytes: int = SCRATCH_BYTES) -> LinearCrossEntropy:
        """Returns a head with the very parameters of ``linear``: ties, names and saved weights stay as they are."""
        sizes, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
        head = cls(*sizes, has_bias, scratch_bytes=scratch_bytes, device="meta")
        head.weight = linear.weight
        head.register_parameter("bias", linear.bias)
        head.training = linear.training
        return head

    def forward(
        self, input: Tensor, targets: Tensor | None = None, *, normalizer: float | None = None
    ) -> Tensor:
        """Returns losses [B], or logits [..., V] without targets.

        Args:
            input: [B, ..., D].
            targets: Token ids [B, ...], ``ignore_index`` where there is no loss. They are not shifted.
            normalizer: A public constant to divide each example's sum by; None divides by the example's own number of
                counted targets. An example without one has loss 0 and gradient 0.

        Raises:
            InvalidInputError: If shapes do not fit, or a target is not in 0..V-1.
        """
        if targets is None:
            return super().forward(input)
        coefficients_BT = self.coefficients(input, targets, normalizer)
        call = (input, self.weight, self.bias, targets, coefficients_BT, self.scratch_bytes)
        return cast(Tensor, _LinearCrossEntropy.apply(*call))  # type: ignore[no-untyped-call]

    def coefficients(self, input: Tensor, targets: Tensor, normalizer: float | None) -> Tensor:
        """Returns the share of each token's cross entropy in its example's loss, [B, T]; 0 where it is ignored.

        Raises:
            InvalidInputError: As ``forward``.
        """
        if input.shape != (*targets.shape, self.in_features) or targets.dim() == 0:
            raise InvalidInputError(
                "targets shape",
                tuple(targets.shape),
                bound=f"[B, ...] for an input [B, ..., {self.in_features}], here {list(input.shape)}",
                remedy="Pass one target for each position.",
            )
        targets_BT = targets.reshape(targets.shape[0], -1)
        counted_BT = targets_BT != self.ignore_index
        outside = counted_BT & ((targets_BT < 0) | (targets_BT >= self.out_features))
        if bool(outside.any()):
            raise InvalidInputError(
                "targets",
                "an id outside the vocabulary",
                bound=f"0 to {self.out_features - 1}, or {self.ignore_index} for no loss",
                remedy="Check that the tokenizer belongs to the model.",
            )
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        if normalizer is not None:
            constant = positive_finite(
                "normalizer", normalizer, remedy="Use the longest length, for example."
            )
            return counted_BT.to(dtype) / constant
        counts_B1 = counted_BT.sum(1, keepdim=True).clamp(min=1)
        return counted_BT.to(dtype) / counts_B1
