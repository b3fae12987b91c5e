"""Everything that is checked before anything is computed or spent."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dp_flash_attention.attention.bounds import Contexts
from dp_flash_attention.attention.interface import PASS_ROWS
from dp_flash_attention.attention.owners import ExcessRows, apply_owners
from dp_flash_attention.attention.planning import MAX_PRIVATE_PASSES, AttentionPlan
from dp_flash_attention.core.errors import InvalidInputError, NoiseReuseError
from dp_flash_attention.core.privacy import NeighboringRelation

_OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_IN_DTYPES = (*_OUT_DTYPES, torch.float64)


def refuse_tracing() -> None:
    """Refuses to be recorded by ``torch.jit.trace``, ``make_fx`` or ``torch.export``.

    Noise is written outside of torch's operators, so a recorded graph would repeat the exact answer without it.

    Raises:
        NoiseReuseError: If a trace is being recorded.
    """
    proxy = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    if proxy is not None or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise NoiseReuseError(
            "The call is being traced, but a recorded graph would give the exact answer, or the same noise to every replay. "
            "Call it outside of the traced region."
        )


def refuse_transforms() -> None:
    """Refuses to run under ``torch.func`` (``vmap``, ``grad``, ``jvp`` …) or in forward-mode differentiation.

    One call would stand for many, and all of them would get its noise; derivatives forward have none at all.

    Raises:
        InvalidInputError: If a transform is active.
    """
    in_func = torch._C._functorch.peek_interpreter_stack() is not None
    if in_func or torch.autograd.forward_ad._current_level >= 0:
        raise InvalidInputError(
            "the call",
            "inside a transform of torch.func, or forward-mode differentiation",
            bound="outside of them",
            remedy="Make one call with a batch dimension, or differentiate with torch.autograd.grad; nothing was spent.",
        )


def check_plan(plan: AttentionPlan) -> None:
    """Checks that a plan's deviations still are those that its μ was computed from: a tensor can be written to.

    Raises:
        InvalidInputError: If the noise would be too small for the plan's μ.
    """
    entries = len(plan.sensitivity)
    stddev = plan.stddev if entries > 1 else plan.stddev[:1]
    ratio = plan.sensitivity[:, None, :] / stddev.numpy().astype(np.float64)
    if plan.precision is not None:
        ratio = ratio + plan.precision.rounding  # of the grid, a share of the deviation
    by_entry = np.square(ratio).sum(axis=(1, 2))
    if plan.bounds.contexts is Contexts.DISJOINT:
        spent = by_entry.max()
    else:
        spent = by_entry.sum() * (plan.batch_size if entries == 1 else 1)
    shape = (plan.batch_size, plan.num_heads, plan.num_queries)
    # The plan's deviations are rounded up by more than these sums lose; a NaN fails too.
    if tuple(plan.stddev.shape) != shape or not spent <= plan.mu * plan.mu * (1.0 + 1e-9):
        raise InvalidInputError(
            "plan.stddev",
            "changed since it was planned",
            bound=f"such that the call is {plan.mu:.6g}-GDP",
            remedy="Make a new plan, and leave it as it is.",
        )


def check_shapes(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool) -> None:
    """Checks that the three are [B, H, Q, D], [B, G, K, D] and [B, G, K, E] on one device.

    Raises:
        InvalidInputError: If not.
    """
    for name, rows in (("query", query), ("key", key), ("value", value)):
        # A class of its own sees, and may change, what is computed with it.
        is_plain = type(rows) in (Tensor, nn.Parameter)
        if not is_plain or rows.ndim != 4 or rows.layout is not torch.strided:
            shown = tuple(rows.shape) if is_plain else type(rows).__name__
            raise InvalidInputError(
                name,
                shown,
                bound="a plain dense tensor [batch, heads, rows, width]",
                remedy="Add the missing dimensions, or pass rows.as_subclass(torch.Tensor).",
            )
    batch, num_heads, num_queries, width = query.shape
    groups, num_rows = key.shape[1:3]
    if min(batch, num_heads, num_queries, width, groups, value.shape[3]) == 0:
        raise InvalidInputError(
            "query.shape",
            tuple(query.shape),
            bound="without empty dimensions",
            remedy="Ask at least one query.",
        )
    if key.shape[0] != batch or key.shape[3] != width:
        raise InvalidInputError(
            "key.shape",
            tuple(key.shape),
            bound=f"[{batch}, heads, rows, {width}]",
            remedy="Match the query's shape.",
        )
    if tuple(value.shape[:3]) != (batch, groups, num_rows):
        raise InvalidInputError(
            "value.shape",
            tuple(value.shape),
            bound=f"[{batch}, {groups}, {num_rows}, width]",
            remedy="Match the key's.",
        )
    if num_heads % groups or (groups != num_heads and not enable_gqa):
        raise InvalidInputError(
            "key.shape[1]",
            groups,
            bound=f"{num_heads} heads, or with enable_gqa a divisor of it",
            remedy="Pass enable_gqa=True for grouped-query heads.",
        )
    if not query.device == key.device == value.device:
        raise InvalidInputError(
            "key.device",
            str(key.device),
            bound=f"the query's, {query.device}",
            remedy="Move all to one device.",
        )


def check_dtypes(query: Tensor, key: Tensor, value: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    """Returns the compute dtype.

    Raises:
        InvalidInputError: If the inputs' dtypes differ or are not floating point.
    """
    if query.dtype not in _IN_DTYPES or not query.dtype == key.dtype == value.dtype:
        raise InvalidInputError(
            "dtypes",
            (query.dtype, key.dtype, value.dtype),
            bound="one of float32, bfloat16, float16, float64 for all three",
            remedy="Convert them before the call.",
        )
    return query.dtype if compute_dtype is None else compute_dtype


def checked_out_dtype(out_dtype: torch.dtype | None, inputs: torch.dtype) -> torch.dtype:
    """Returns the output's dtype: the inputs' if None is asked for, and never float64.

    Raises:
        InvalidInputError: If it is not float32, bfloat16 or float16. The noise is float32, and the low digits of
            a float64 output would show the exact answer.
    """
    if out_dtype is None:
        return torch.float32 if inputs is torch.float64 else inputs
    if out_dtype not in _OUT_DTYPES:
        raise InvalidInputError(
            "out_dtype",
            out_dtype,
            bound="float32, bfloat16 or float16, for the noise has the digits of float32",
            remedy="Convert afterwards.",
        )
    return out_dtype


def check_context(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    key_padding_mask: Tensor | None,
    record_ids: Tensor | None,
    *,
    excess_rows: ExcessRows = "refuse",
) -> Tensor | None:
    """Checks tensors against a plan and returns the hidden rows, bool [B, K] or None.

    Raises:
        InvalidInputError: If shapes, numbers of rows or owners break what the plan was made for.
    """
    shape = (*query.shape, value.shape[3])
    planned = (plan.batch_size, plan.num_heads, plan.num_queries, plan.query_width, plan.value_width)
    if shape != planned:
        raise InvalidInputError(
            "[B, H, Q, D, E]",
            shape,
            bound=f"as planned, {planned}",
            remedy="Plan for the shapes that are called with.",
        )
    hidden = _checked_mask(key_padding_mask, key)
    if record_ids is not None:
        hidden = apply_owners(record_ids, hidden, key, plan.bounds, excess_rows)
    if plan.bounds.neighboring_relation is NeighboringRelation.REPLACE_ONE:
        _check_row_counts(plan, key.shape[2], hidden)  # of what is left
    _check_charged_rows(plan, key.shape[2])
    return hidden


def checked_choice(name: str, value: str, choices: tuple[str, str]) -> None:
    """Checks what is to be done about faults in private rows.

    Raises:
        InvalidInputError: If it is not one of the two choices.
    """
    if value not in choices:
        raise InvalidInputError(
            name, value, bound=f"'{choices[0]}' or '{choices[1]}'", remedy="See docs/attention.md, 'Faults'."
        )


def _checked_mask(mask: Tensor | None, key: Tensor) -> Tensor | None:
    if mask is None:
        return None
    expected = (key.shape[0], key.shape[2])
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or tuple(mask.shape) != expected:
        shown = (tuple(mask.shape), mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidInputError(
            "key_padding_mask",
            shown,
            bound=f"bool {expected}, True for padding",
            remedy="Build it from the lengths.",
        )
    return mask.to(key.device)


def _check_row_counts(plan: AttentionPlan, num_rows: int, hidden: Tensor | None) -> None:
    """Under replace-one: no query may see fewer rows than its noise was computed for."""
    for entry in range(plan.batch_size):
        promised = plan.bounds.rows_of(entry)
        if plan.is_causal:
            # Query t needs min(t + 1, promised) rows: exactly the first ones have to be there.
            promised = min(promised, plan.num_queries)
            seen = num_rows if hidden is None else int((~hidden[entry, :promised]).sum())
        else:
            seen = num_rows if hidden is None else int((~hidden[entry]).sum())
        if seen < promised:
            which = "first rows that a causal query sees" if plan.is_causal else "visible rows"
            raise InvalidInputError(
                f"{which} of batch entry {entry}",
                seen,
                bound=f"at least num_rows = {promised}, which the noise was computed for",
                remedy="Promise fewer rows, or pad on the right; nothing was computed or spent.",
            )
        if hidden is None and not isinstance(plan.bounds.num_rows, tuple):
            break  # every entry is alike


def _check_charged_rows(plan: AttentionPlan, num_rows: int) -> None:
    """The plan charges for rounding over so many rows at most."""
    if plan.bounds.rounding is None or plan.is_causal:  # a causal call is charged for the rows that are seen
        return
    limit = plan.num_key_rows
    if limit is None or plan.bounds.num_rows is None:
        limit = PASS_ROWS * MAX_PRIVATE_PASSES
    if num_rows > limit:
        raise InvalidInputError(
            "key.shape[2]",
            num_rows,
            bound=f"at most {limit}, for which rounding was charged",
            remedy="Plan with num_key_rows = key.shape[2], or with bounds.rounding = None.",
        )
