"""Rows: their norms, whether they are finite, and the clip that bounds them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dp_flash_attention.core.errors import InvalidInputError

NonfiniteRows = Literal["refuse", "zero"]
"""What happens to private rows that hold a NaN, an infinity, or numbers whose norm overflows."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of norms and factors: float64 for float64 rows, float32 for all others."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def row_norms(rows: Tensor) -> Tensor:
    """Returns the L2 norm of every row of [..., D], [..., 1], in ``working_dtype``."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=working_dtype(rows.dtype))
    return norms


def check_finite(name: str, rows: Tensor) -> None:
    """Checks that every number is finite and no norm overflows.

    Raises:
        InvalidInputError: If not. The message names the tensor and nothing of its values.
    """
    if not bool(has_finite_norm(rows).all()):
        raise InvalidInputError(
            name,
            "a tensor with a NaN, an infinity or a norm beyond float32",
            bound="finite, with row norms below 1.8e19",
            remedy="Remove or repair such rows, or pass nonfinite_rows='zero'; nothing was computed or spent."
            if name != "query"
            else "Remove or repair such rows; nothing was computed or spent.",
        )


def has_finite_norm(rows: Tensor) -> Tensor:
    """Returns for every row of [..., D] whether it has a norm, bool [..., 1]."""
    # A NaN, an infinity or a sum of squares beyond the range makes the norm NaN or infinite.
    return torch.isfinite(row_norms(rows.detach()))


def without_broken_rows(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Returns copies in which every broken row is zero, its key and its value, in all heads.

    A row is broken if its key or its value, in any head, holds a NaN or an infinity or has a norm beyond the working
    dtype. The copies are made whether or not a row is broken, so that time does not tell.

    Args:
        key: [B, G, K, D].
        value: [B, G, K, E].

    Guarantees:
        Row by row a function of that row alone. So contexts that differ by one record still do, and every
        row has a norm: what holds for finite contexts holds for all. Theorem 7 of docs/attention.md.
    """
    whole = (has_finite_norm(key) & has_finite_norm(value)).all(dim=1, keepdim=True)
    zero = key.new_zeros(())
    # A product with 0 would keep a NaN.
    return torch.where(whole, key, zero), torch.where(whole, value, zero)


def clip_rows(rows: Tensor, threshold: float) -> Tensor:
    """Scales every row longer than ``threshold`` down to it; differentiable.

    Args:
        rows: [..., D].
        threshold: From ``sensitivity.clip_threshold``, which says how the result is bounded.

    Returns:
        Rows in the same dtype; a row within the threshold is unchanged, bit for bit.
    """
    return (rows * _factor(rows, threshold)).to(rows.dtype)


def clip_rows_into(rows: Tensor, threshold: float, out: Tensor) -> Tensor:
    """Writes what ``clip_rows`` returns to ``out``, of the same shape and dtype, without gradient; returns it.

    Rows are read once: what is measured is what is scaled, even if another thread writes to them meanwhile.
    """
    out.copy_(rows)
    return out.mul_(_factor(out, threshold))


def _factor(rows: Tensor, threshold: float) -> Tensor:
    # Exactly 1 for short rows, and finite at norm 0, forward and backward.
    return threshold / row_norms(rows).clamp_min(threshold)
