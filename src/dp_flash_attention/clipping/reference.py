"""The definition, slow and plain: one ordinary backward pass for each example.

Tests and the verification of kernels compare with this. Nothing on the fast path imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def per_example_gradients(
    model: nn.Module, loss_fn: Callable[[Any], Tensor], inputs: Any, *, batch_size: int
) -> dict[str, Tensor]:
    """Returns each trainable parameter's gradients, shape [B, *parameter.shape].

    Args:
        model: The model.
        loss_fn: Maps inputs of any number of examples to one loss for each.
        inputs: A tree of tensors with leading dimension B.
        batch_size: B.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = []
    for i in range(batch_size):
        one = pytree.tree_map_only(Tensor, itemgetter(slice(i, i + 1)), inputs)
        rows.append(torch.autograd.grad(loss_fn(one).sum(), list(parameters.values())))
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(parameters)}


def clipped_sum(
    gradients: dict[str, Tensor], *, l2_clip_norm: float, weights: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the sum of flat-clipped gradients by parameter, and the norms before clipping, [B]."""
    whole = [(tuple(gradients), l2_clip_norm)]
    return clipped_sum_of_groups(gradients, groups=whole, weights=weights)


def clipped_sum_of_groups(
    gradients: dict[str, Tensor],
    *,
    groups: Iterable[tuple[Iterable[str], float]],
    weights: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the sum of gradients, each group of which is clipped alone, and the norms before clipping, [B].

    Args:
        gradients: [B, *parameter.shape] by parameter.
        groups: Names of parameters with their bound C_k.
        weights: 1 for a real example, 0 for padding.
    """
    sums: dict[str, Tensor] = {}
    squares = []
    for names, bound in groups:
        part = {name: gradients[name] for name in names}
        flat = torch.cat([g.flatten(1).double() for g in part.values()], 1)
        norms = torch.linalg.vector_norm(flat, dim=1)
        factors = torch.where(norms > bound, bound / norms, torch.ones_like(norms))
        if weights is not None:
            factors = factors * weights
        sums |= {name: torch.einsum("b,b...->...", factors.to(g.dtype), g) for name, g in part.items()}
        squares.append(norms.square())
    return {name: sums[name] for name in gradients}, torch.stack(squares).sum(0).sqrt()
