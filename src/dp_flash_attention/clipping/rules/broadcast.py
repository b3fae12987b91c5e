"""Parameters that are only added to, multiplied with or expanded over activations.

During the forward pass the parameter is replaced by a view with one copy of it for each example,
so that autograd itself returns one gradient for each example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_attention.clipping.contributions import DenseContribution
from dp_flash_attention.clipping.tape import Tape


class _PerExampleCopies(torch.autograd.Function):
    """[...] to [B, ...] without memory; the backward pass records the B gradients."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, batch_size: int, record: Callable[[Tensor], None]) -> Tensor:
        ctx.record = record
        return parameter.unsqueeze(0).expand(batch_size, *parameter.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None, None]:
        ctx.record(grad_output)
        return None, None, None


def per_example_copies(parameter: Tensor, *, name: str, tape: Tape) -> Tensor:
    """Returns [B, *parameter.shape], a view whose gradient is recorded under ``name``."""

    def record(grads_B: Tensor) -> None:
        tape.record(name, DenseContribution(grads_B=grads_B))

    copies: Tensor = _PerExampleCopies.apply(parameter, tape.batch_size, record)
    return copies


def call_with_attributes(
    module: nn.Module, attributes: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls the module's own ``forward`` with some parameters replaced by other tensors."""
    hidden = module.__dict__
    # An entry of the instance's __dict__ is found before the module's parameters are.
    hidden.update(attributes)
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        for attribute in attributes:
            del hidden[attribute]


class BroadcastRule:
    """Modules whose own parameters all have a leading dimension of 1, to be expanded over the batch.

    That is how class tokens, mask tokens and learned positions of vision transformers are kept.
    """

    def matches(self, module: nn.Module) -> bool:
        """Whether every parameter that the module itself owns has a leading dimension of 1."""
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        return bool(own) and all(p.dim() >= 2 and p.shape[0] == 1 for p in own)

    def recording_forward(
        self, module: nn.Module, *, name: str, parameters: dict[str, str], tape: Tape
    ) -> Callable[..., Any]:
        """See ``Rule.recording_forward``."""
        own = {attribute: getattr(module, attribute) for attribute in parameters}

        def forward(*args: Any, **kwargs: Any) -> Any:
            attributes = {
                attribute: per_example_copies(parameter, name=parameters[attribute], tape=tape).squeeze(1)
                for attribute, parameter in own.items()
            }
            return call_with_attributes(module, attributes, args, kwargs)

        return forward
