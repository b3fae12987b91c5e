"""From norms to clip factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ClipFactors:
    """What each example's gradient is multiplied with before the sum.

    Attributes:
        factors_B: ``min(1, C / norm)``, and 0 for an example of weight 0 or without a finite norm.
        not_finite_B: The examples whose norm is NaN or infinite; their gradients are dropped.
    """

    factors_B: Tensor
    not_finite_B: Tensor


def flat_clip_factors(sq_norms_B: Tensor, *, l2_clip_norm: float, weights_B: Tensor) -> ClipFactors:
    """Returns the factors that bring every example's gradient within ``l2_clip_norm``.

    | norm            | factor         | contribution's norm |
    |-----------------|----------------|---------------------|
    | 0               | 1              | 0                   |
    | in (0, C]       | 1              | norm                |
    | above C         | C / norm       | C                   |
    | NaN or infinite | 0, and dropped | 0                   |

    Args:
        sq_norms_B: Squared norms, float32 or better.
        l2_clip_norm: C.
        weights_B: 1 for a real example, 0 for padding.

    Guarantees: each factor depends on its own example alone, and ``factor · norm ≤ C``.
    """
    norms_B = sq_norms_B.sqrt()
    # A square below zero, which no rule should return, has no norm either.
    not_finite_B = ~torch.isfinite(norms_B)
    # norm 0 gives C / 0 = inf, which the minimum turns into 1.
    factors_B = (l2_clip_norm / norms_B).clamp(max=1.0)
    factors_B = torch.where(not_finite_B, torch.zeros_like(factors_B), factors_B) * weights_B.to(norms_B)
    return ClipFactors(factors_B=factors_B, not_finite_B=not_finite_B)
