"""What a traced step was made with, to tell when another trace is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dp_flash_attention.clipping.precision import Autocast


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceKey:
    """What a trace depends on; equal keys share a graph.

    Attributes:
        objects: Compared by identity, and kept alive so that no other object can take their place.
        values: Compared by type and value.
    """

    objects: tuple[object, ...]
    values: tuple[object, ...]

    @staticmethod
    def of(model: nn.Module, loss_fn: Callable[..., Tensor], inputs: Any, autocast: Autocast) -> TraceKey:
        """Returns the key of a microbatch."""
        leaves, tree = pytree.tree_flatten(inputs)
        objects, values = _function_parts(loss_fn)
        described = tuple(
            (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        )
        trained = tuple(
            (name, p.requires_grad, p.dtype, p.device, tuple(p.shape)) for name, p in model.named_parameters()
        )
        return TraceKey(
            objects=(*objects, *model.modules()),
            values=(
                values,
                tree,
                described,
                trained,
                tuple(module.training for module in model.modules()),
                torch.get_default_dtype(),
                autocast,
                torch.are_deterministic_algorithms_enabled(),
            ),
        )

    def __eq__(self, other: object) -> bool:
        """Whether a trace made under one key holds under the other."""
        return (
            isinstance(other, TraceKey)
            and len(self.objects) == len(other.objects)
            and all(a is b for a, b in zip(self.objects, other.objects, strict=True))
            and _same(self.values, other.values)
        )


def _same(first: object, second: object) -> bool:
    # 1, 1.0 and True are equal and not the same to a trace.
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(_same(a, b) for a, b in zip(first, second, strict=True))
    return type(first) is type(second) and bool(first == second)


def _function_parts(function: Any) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """Returns what identifies a function: objects by identity, plain values by equality.

    A lambda written in a loop is a new object each time, with the same code and, mostly, the same surroundings.
    """
    if isinstance(function, MethodType):
        objects, values = _function_parts(function.__func__)
        return (function.__self__, *objects), values
    if not isinstance(function, FunctionType):
        return (function,), ()
    around = [cell.cell_contents for cell in function.__closure__ or ()]
    around += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    plain = tuple(x for x in around if isinstance(x, int | float | str | bool | None))
    others = tuple(x for x in around if not isinstance(x, int | float | str | bool | None))
    return (function.__code__, function.__globals__, *others), plain
