"""Rows: their norms, whether they are finite, and the clip that bounds them."""

from __future__ import annotations

import torch
from torch import Tensor

from dp_flash_attention.core.errors import InvalidInputError


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
    # A NaN, an infinity or a sum of squares beyond the range makes the norm NaN or infinite.
    if not bool(torch.isfinite(row_norms(rows.detach())).all()):
        raise InvalidInputError(
            name,
            "a tensor with a NaN, an infinity or a norm beyond float32",
            bound="finite, with row norms below 1.8e19",
            remedy="Remove or repair such rows; nothing was computed or spent.",
        )


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
    """Writes what ``clip_rows`` returns to ``out``, of the same shape and dtype, without gradient; returns it."""
    return torch.mul(rows, _factor(rows, threshold), out=out)


def _factor(rows: Tensor, threshold: float) -> Tensor:
    # Exactly 1 for short rows, and finite at norm 0, forward and backward.
    return threshold / row_norms(rows).clamp_min(threshold)
