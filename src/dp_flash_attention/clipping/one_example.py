"""One example a microbatch: its ordinary gradient is the per-example gradient, for any module.

Nothing is recorded and no rule is needed: PyTorch differentiates the model as it is, and clipping costs a pass over
the gradients. Use it for sequences so long that one example fills memory, and for models that no rule covers.

Tied weights, reused modules and activation checkpointing (``use_reentrant=False``) are exact by themselves. Gradients are
returned by autograd, never accumulated: ``parameter.grad`` and the hooks on it, an optimizer's or a distributed wrapper's,
never see a raw gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dp_flash_attention.clipping.contributions import DenseContribution
from dp_flash_attention.clipping.recording import check_losses
from dp_flash_attention.clipping.tape import Tape
from dp_flash_attention.core.errors import ExampleCouplingError, InvalidInputError


def check_one_example(batch_size: int) -> None:
    """Checks that a microbatch is one example.

    Raises:
        InvalidInputError: If it is not.
    """
    if batch_size != 1:
        raise InvalidInputError(
            "microbatch_size",
            batch_size,
            bound="1 with strategy 'one_example', which takes the ordinary gradient as the example's own",
            remedy="Use microbatch_size=1, or the strategy 'bookkeeping'.",
        )


def record_one_example(
    loss_fn: Callable[[], Tensor],
    *,
    parameters: Mapping[str, nn.Parameter],
) -> tuple[Tape, Tensor]:
    """Runs forward and backward on one example.

    Args:
        loss_fn: Returns one loss, shape [1].
        parameters: Those that are clipped, by name.

    Returns:
        A tape of one gradient for each parameter, and the losses; parameters without a gradient are not on it.

    Raises:
        ExampleCouplingError: If the loss has another shape, or the model writes to its parameters.
    """
    versions = {name: parameter._version for name, parameter in parameters.items()}
    with torch.enable_grad():
        losses = loss_fn()
        check_losses(losses, 1)
        with torch.autocast(losses.device.type, enabled=False):  # as in every strategy
            gradients = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
    for name, parameter in parameters.items():
        if parameter._version != versions[name]:
            raise ExampleCouplingError(
                f"parameter {name!r} was written to in a forward or backward pass, which would carry data into the released "
                f"model without noise. Remove what writes to it, such as an embedding's max_norm."
            )
    tape = Tape(batch_size=1, layouts={})
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            tape.record(name, DenseContribution(grads_B=dense.detach().unsqueeze(0)))
    return tape, losses.detach()
