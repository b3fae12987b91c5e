"""Look-ups: ``torch.nn.Embedding`` and its subclasses that only compute the indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dp_flash_attention.clipping.contributions import EmbeddingContribution
from dp_flash_attention.clipping.tape import Tape


class _RecordingLookup(torch.autograd.Function):
    """``weight[ids]`` whose backward pass records (ids, g) instead of a table of gradients."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, record: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.record = record
        return F.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None, None]:
        ctx.record(ctx.saved_tensors[0], grad_output)
        return None, None, None


def _overrides_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Embedding.forward


class EmbeddingRule:
    """One row gradient for each index; repeated indices of an example add up before the norm."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is a dense, unrenormalised look-up."""
        return (
            isinstance(module, nn.Embedding)
            and module.max_norm is None
            and not module.scale_grad_by_freq
            and not module.sparse
        )

    def recording_forward(
        self, module: nn.Module, *, name: str, parameters: dict[str, str], tape: Tape
    ) -> Callable[..., Tensor]:
        """See ``Rule.recording_forward``; indices are [B, ...], shared [T] or [1, T]."""
        assert isinstance(module, nn.Embedding)
        weight, padding_idx = module.weight, module.padding_idx

        def record(ids_BT: Tensor, grad_output: Tensor) -> None:
            g_BTD = grad_output.reshape(*ids_BT.shape, weight.shape[1])
            if padding_idx is not None:
                g_BTD = g_BTD.masked_fill((ids_BT == padding_idx)[:, :, None], 0)
            tape.record(
                parameters["weight"],
                EmbeddingContribution(ids_BT=ids_BT, g_BTD=g_BTD, weight_shape=weight.shape),
            )

        def lookup(input: Tensor) -> Tensor:
            ids_BT, shared = tape.indices_by_example(input, module=name)
            rows: Tensor = _RecordingLookup.apply(ids_BT, weight, record)
            if shared:
                shape = input.shape[1:] if input.dim() > 1 else input.shape
                return rows.view(tape.batch_size, *shape, weight.shape[1])
            return rows.view(*input.shape, weight.shape[1])

        if not _overrides_forward(module):
            return lookup

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            # A subclass computes its indices and calls nn.Embedding.forward on them (OPT's learned
            # positions): its own code runs, with the look-up at its base replaced by ours.
            return _call_with_lookup(module, lookup, args, kwargs)

        return forward


def _call_with_lookup(
    module: nn.Embedding, lookup: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    class _Lookup(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.embedding and args[1] is module.weight:
                return lookup(args[0])
            return func(*args, **(kwargs or {}))

    with _Lookup():
        output: Tensor = type(module).forward(module, *args, **kwargs)
    return output
