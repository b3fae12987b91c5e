"""Whose rows are whose: no record may have more rows in a context than its noise was computed for."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dp_flash_attention.attention.bounds import AttentionBounds, Contexts
from dp_flash_attention.core.errors import InvalidInputError

ExcessRows = Literal["refuse", "hide"]
"""What happens to rows of a record beyond ``max_rows_per_record``."""


def apply_owners(
    record_ids: Tensor, hidden: Tensor | None, key: Tensor, bounds: AttentionBounds, excess_rows: ExcessRows
) -> Tensor | None:
    """Returns the hidden rows, bool [B, K] or None, with no record seen in more rows than promised.

    Args:
        record_ids: integers [K] or [B, K], the owner of every row.
        hidden: bool [B, K] or None: rows that are hidden already, and are nobody's.
        key: [B, G, K, D].
        bounds: ``max_rows_per_record``, and whether a record may have rows in several batch entries.
        excess_rows: ``"refuse"`` raises if a record has too many rows. ``"hide"`` shows the first
            ``max_rows_per_record`` of its rows in each entry, in row order (under ``Contexts.DISJOINT`` only those of
            the first entry that it has rows in), and hides the others.

    Raises:
        InvalidInputError: If ids have the wrong shape or dtype; with ``"refuse"`` also if a record has too many rows, or
            rows in two disjoint contexts.

    Guarantees:
        With ``"hide"``: which rows of a record are shown depends on that record's own rows alone. So
        contexts that differ by one record still do when rows are hidden, and the record has at most r rows
        in each of them. Theorem 7 of docs/attention.md.
    """
    batch, num_rows = key.shape[0], key.shape[2]
    _check_form(record_ids, batch, num_rows)
    ids = record_ids.to(key.device).expand(batch, num_rows)
    seen = torch.ones_like(ids, dtype=torch.bool) if hidden is None else ~hidden
    kept = _first_rows(ids, seen, bounds)
    if excess_rows == "hide":
        return ~kept
    if bool((seen & ~kept).any()):
        _refuse(ids, seen, bounds)
    return hidden


def _check_form(record_ids: Tensor, batch: int, num_rows: int) -> None:
    is_tensor = isinstance(record_ids, Tensor)
    if (
        not is_tensor
        or record_ids.is_floating_point()
        or record_ids.is_complex()
        or record_ids.dtype is torch.bool
    ):
        shown = record_ids.dtype if is_tensor else type(record_ids).__name__
        raise InvalidInputError(
            "record_ids.dtype", shown, bound="an integer dtype", remedy="Number the owners in a tensor."
        )
    if tuple(record_ids.shape) not in ((num_rows,), (batch, num_rows)):
        raise InvalidInputError(
            "record_ids.shape",
            tuple(record_ids.shape),
            bound=f"({num_rows},) or ({batch}, {num_rows})",
            remedy="Name the owner of every key/value row.",
        )


def _first_rows(ids: Tensor, seen: Tensor, bounds: AttentionBounds) -> Tensor:
    """Returns which seen rows are among the first r of their record in their entry, bool [B, K]."""
    kept = torch.zeros_like(seen)
    earlier: Tensor | None = None
    for entry in range(len(ids)):
        places = seen[entry].nonzero().squeeze(1)
        owners = ids[entry, places]
        if bounds.contexts is Contexts.DISJOINT:
            if earlier is not None:
                fresh = ~torch.isin(owners, earlier)
                places, owners = places[fresh], owners[fresh]
            earlier = owners if earlier is None else torch.cat([earlier, owners])
        ordered, order = torch.sort(owners, stable=True)
        if not len(ordered):
            continue
        # A row is the k-th of its record if the one k − 1 places before it has another owner, or none is there.
        r = bounds.max_rows_per_record
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[r:] = ordered[r:] != ordered[:-r]
        kept[entry, places[order[first]]] = True
    return kept


def _refuse(ids: Tensor, seen: Tensor, bounds: AttentionBounds) -> None:
    most = max(
        int(torch.unique(each[visible], return_counts=True)[1].max()) if bool(visible.any()) else 0
        for each, visible in zip(ids, seen, strict=True)
    )
    if most > bounds.max_rows_per_record:
        raise InvalidInputError(
            "rows of one record",
            most,
            bound=f"at most max_rows_per_record = {bounds.max_rows_per_record} in a batch entry",
            remedy="Keep fewer rows of each record, promise more, or pass excess_rows='hide'; nothing was computed or spent.",
        )
    raise InvalidInputError(
        "record_ids",
        "an owner in two batch entries",
        bound="of one entry each under Contexts.DISJOINT",
        remedy="Use Contexts.SHARED, ids that differ between entries, or excess_rows='hide'.",
    )
