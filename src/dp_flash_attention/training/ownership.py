"""Checks that an optimizer moves exactly the parameters whose gradients are clipped and noised."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dp_flash_attention.core.errors import InvalidInputError

_MAX_SHOWN = 4


def check_same_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer, private: Mapping[str, nn.Parameter]
) -> None:
    """Checks that the optimizer holds every private parameter and no other.

    A parameter in the optimizer alone could be moved by a raw gradient; one in the model alone would
    spend budget and stay as it is.

    Args:
        model: Gives names to parameters that are not private.
        optimizer: The optimizer.
        private: The clipped parameters by name.

    Raises:
        InvalidInputError: If they differ, naming the parameters, or the optimizer is not one of single steps.
    """
    if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        raise InvalidInputError(
            "optimizer",
            type(optimizer).__name__,
            bound="a torch.optim.Optimizer that takes one step for each gradient",
            remedy="Use AdamW or SGD; LBFGS evaluates the raw loss several times.",
        )
    held = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
    private_ids = {id(parameter) for parameter in private.values()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    extra = [
        names.get(key, f"<not in the model, shape {tuple(p.shape)}>")
        for key, p in held.items()
        if key not in private_ids
    ]
    if extra:
        raise InvalidInputError(
            "optimizer",
            _listed(extra),
            bound="made of trainable parameters of the private model alone",
            remedy="Build it from [p for p in model.parameters() if p.requires_grad], after freezing.",
        )
    missing = [name for name, parameter in private.items() if id(parameter) not in held]
    if missing:
        raise InvalidInputError(
            "optimizer",
            f"without {_listed(missing)}",
            bound="holding every trainable parameter of the model",
            remedy="Add them, or freeze them with requires_grad_(False) first.",
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(names[:_MAX_SHOWN]) + more
