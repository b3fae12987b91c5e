"""The fallback for any module: ``torch.func.vmap`` over examples, with a parameter copy for each.

Exact for whatever the module computes, at the price of one gradient of the module's size for each
example in memory. It is used only where the caller names the module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from dp_flash_attention.clipping.rules.broadcast import per_example_copies
from dp_flash_attention.clipping.tape import Tape
from dp_flash_attention.core.errors import ExampleCouplingError

_TENSOR = object()  # marks the place of a tensor among a module's outputs


class PerModuleFallback:
    """Runs a whole module, children included, one example at a time under ``vmap``."""

    def matches(self, module: nn.Module) -> bool:
        """Any module will do; the caller chooses."""
        return True

    def recording_forward(
        self, module: nn.Module, *, name: str, parameters: dict[str, str], tape: Tape
    ) -> Callable[..., Any]:
        """See ``Rule.recording_forward``.

        Tensor arguments whose leading dimension follows B are split by example; others are shared.
        """
        own = {path: module.get_parameter(path) for path in parameters}

        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            mapped = [
                isinstance(leaf, Tensor)
                and leaf.dim() > 0
                and tape.splits_by_example(leaf.shape[0], argument=f"{k}, {leaf.dim()}d", module=name)
                for k, leaf in enumerate(leaves)
            ]
            if not any(mapped):
                raise ExampleCouplingError(
                    f"module {name!r} received no tensor with leading dimension {tape.batch_size}, so its calls "
                    f"cannot be credited to examples. Put the batch dimension first."
                )
            copies = {
                path: per_example_copies(p, name=parameters[path], tape=tape) for path, p in own.items()
            }

            def one_example(values: dict[str, Tensor], *items: Any) -> Any:
                batched = [
                    item.unsqueeze(0) if is_mapped else item
                    for item, is_mapped in zip(items, mapped, strict=True)
                ]
                call_args, call_kwargs = pytree.tree_unflatten(batched, spec)
                outputs, structure = pytree.tree_flatten(
                    _call_unpatched(module, values, call_args, call_kwargs)
                )
                # vmap returns tensors alone; whatever else the module returned is the same for all.
                kept[:] = [_TENSOR if isinstance(o, Tensor) else o for o in outputs]
                structures.append(structure)
                return tuple(o.squeeze(0) for o in outputs if isinstance(o, Tensor))

            kept: list[Any] = []
            structures: list[pytree.TreeSpec] = []
            in_dims = (0, *(0 if is_mapped else None for is_mapped in mapped))
            # The fused attention kernels have no batching rule; the plain one has.
            with sdpa_kernel(SDPBackend.MATH):
                tensors = iter(
                    torch.func.vmap(one_example, in_dims=in_dims, randomness="different")(copies, *leaves)
                )
            outputs = [next(tensors) if leaf is _TENSOR else leaf for leaf in kept]
            return pytree.tree_unflatten(outputs, structures[-1])

        return forward


def _call_unpatched(
    module: nn.Module, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    replacement = module.__dict__.pop("forward")
    try:
        return torch.func.functional_call(module, values, args, kwargs)
    finally:
        module.__dict__["forward"] = replacement
