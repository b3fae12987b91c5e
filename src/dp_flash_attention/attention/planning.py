"""What an attention release will cost and how useful it can be, before anything is computed or spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dp_flash_attention.attention.bounds import AttentionBounds, Contexts
from dp_flash_attention.attention.finite_precision import (
    FinitePrecision,
    check_range,
    grid_noise,
    ideal_budget,
    plan_grid,
)
from dp_flash_attention.attention.interface import PASS_ROWS, AttentionNoise, RowNorms
from dp_flash_attention.attention.sensitivity import (
    add_or_remove_sensitivity,
    clip_threshold,
    replace_one_curve,
    rounding_slack,
    score_bound,
    subnormal_step,
)
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget
from dp_flash_attention.core.validation import positive_finite, positive_int
from dp_flash_attention.noise.targets import checked_stddev

MAX_PRIVATE_PASSES = 512
"""Passes that are charged for where the number of rows is private: up to 524,288 rows."""

# A deviation is rounded to float32, its product with a normal again; this covers both, and the double
# precision sums over queries.
_STDDEV_UPWARD = 1.0 + 2.0**-21
_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionPlan:
    """The noise of one call, and what it certifies. Made by ``plan_attention_release``.

    Attributes:
        bounds: The public promises.
        batch_size: B.
        num_heads: H, query heads.
        num_queries: Q.
        query_width: D.
        value_width: E.
        num_key_rows: K where it is public, else None.
        scale: Factor of scores.
        is_causal: Whether query t sees rows 0 … t.
        compute_dtype: Dtype that the kernel reads.
        score_bound: S.
        sensitivity: Δ of every query, rounding included, float64 [B or 1, Q]; the same for every head.
        stddev: σ of every output row, float32 [B, H, Q], possibly expanded.
        head_mus: μ of each head's outputs together, one for each head.
        mu: μ of everything the call releases; with noise ``"exact"`` up to ``precision.total_distance``.
        norms: What rows are clipped to.
        precision: Grid and cost of noise ``"exact"``; None for normals, whose analysis is one of real numbers.
    """

    bounds: AttentionBounds
    batch_size: int
    num_heads: int
    num_queries: int
    query_width: int
    value_width: int
    num_key_rows: int | None
    scale: float
    is_causal: bool
    compute_dtype: torch.dtype
    score_bound: float
    sensitivity: npt.NDArray[np.float64]
    stddev: Tensor
    head_mus: tuple[float, ...]
    mu: float
    norms: RowNorms
    precision: FinitePrecision | None = None

    @property
    def distance(self) -> float:
        """η: how far, in total variation, the call may be from a μ-GDP one; 0 with normals."""
        return 0.0 if self.precision is None else self.precision.total_distance

    def epsilon(self, delta: float) -> float:
        """Returns ε of the call at ``delta``, by the exact formula of the Gaussian mechanism and the distance to it."""
        from dp_flash_attention.accounting.near_gdp import near_gdp_epsilon

        return near_gdp_epsilon(mu=self.mu, distance=self.distance, delta=delta)

    def signal_to_noise(self, output_norm: float | None = None) -> npt.NDArray[np.float64]:
        """Returns the *estimated* signal-to-noise ratio of every output row, [B or 1, H, Q].

        Args:
            output_norm: L2 norm that you expect an exact output row to have, from public knowledge. None takes
                R_v, the largest possible: then the ratio is an upper bound.

        Returns:
            ``output_norm / (σ·sqrt(E))``: below 1 the noise is longer than the answer.
        """
        signal = self.bounds.value_norm if output_norm is None else output_norm
        positive_finite("output_norm", signal, remedy="Leave it out for the best case.")
        distinct = self.stddev if len(self.sensitivity) > 1 else self.stddev[:1]
        ratio: npt.NDArray[np.float64] = signal / (
            distinct.numpy().astype(np.float64) * math.sqrt(self.value_width)
        )
        return ratio


def plan_attention_release(
    bounds: AttentionBounds,
    *,
    num_queries: int,
    query_width: int,
    value_width: int | None = None,
    num_heads: int = 1,
    batch_size: int = 1,
    num_key_rows: int | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    budget: PrivacyBudget | None = None,
    mu: float | None = None,
    head_epsilons: Sequence[float] | None = None,
    head_importance: Sequence[float] | None = None,
    compute_dtype: torch.dtype = torch.float32,
    noise: AttentionNoise = "secure",
) -> AttentionPlan:
    """Computes sensitivity and noise of a call from public numbers alone.

    Args:
        bounds: The public promises about every context.
        num_queries: Q.
        query_width: D.
        value_width: E; None for D.
        num_heads: H, query heads. Key/value heads may be fewer; that changes nothing here.
        batch_size: B.
        num_key_rows: K of the key tensor where it is public (replace-one); None for ``bounds.num_rows``. It only
            decides how much rounding is charged for.
        scale: Factor of the scores; None for 1/sqrt(D), as torch.
        is_causal: Whether query t sees rows 0 … t only.
        budget: (ε, δ) of the whole call. With ``head_epsilons``, a limit on what they compose to.
        mu: Instead of ``budget``: μ of the whole call in Gaussian DP.
        head_epsilons: ε of each head's outputs alone, at the budget's δ.
        head_importance: Instead: public weights; a head's share of μ² is proportional to its weight.
        compute_dtype: Dtype that the kernel reads.
        noise: The kind that the call is made with. ``"exact"`` plans a grid and pays for finite precision.

    Returns:
        The plan. Each head's μ² is divided evenly over its outputs.

    Raises:
        InvalidInputError: If a number is out of range, or not exactly one of ``budget`` and ``mu`` is given, or
            heads compose to more than the budget, or finite precision takes more than a hundredth of δ.

    Example:
        >>> bounds = AttentionBounds(query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=100_000)
        >>> plan = plan_attention_release(bounds, num_queries=1, query_width=32, scale=2.0, mu=0.5)
        >>> round(float(plan.sensitivity[0, 0]), 5), round(float(plan.signal_to_noise()[0, 0, 0]), 1)
        (0.00144, 61.3)
    """
    shape = {
        "num_queries": num_queries,
        "query_width": query_width,
        "num_heads": num_heads,
        "batch_size": batch_size,
    }
    for name, size in shape.items():
        positive_int(name, size, remedy="It is a dimension of the query tensor.")
    width = (
        query_width if value_width is None else positive_int("value_width", value_width, remedy="State E.")
    )
    if compute_dtype not in _COMPUTE_DTYPES:
        raise InvalidInputError(
            "compute_dtype",
            compute_dtype,
            bound="float32, bfloat16, float16 or float64",
            remedy="Use float32.",
        )
    factor = 1.0 / math.sqrt(query_width) if scale is None else scale
    reach = score_bound(query_norm=bounds.query_norm, key_norm=bounds.key_norm, scale=factor)
    norms = RowNorms(
        query=clip_threshold(bounds.query_norm, compute_dtype, query_width),
        key=clip_threshold(bounds.key_norm, compute_dtype, query_width),
        value=clip_threshold(bounds.value_norm, compute_dtype, width),
    )
    rows = _public_rows(bounds, batch_size, num_key_rows)
    sensitivity = _sensitivity(bounds, reach, num_queries, query_width, width, rows, is_causal, compute_dtype)
    num_numbers = batch_size * num_heads * num_queries * width
    if noise == "exact" and budget is not None:
        budget = ideal_budget(budget, num_numbers=num_numbers)
    head_mus, total = _head_mus(num_heads, budget, mu, head_epsilons, head_importance)
    charged = num_queries * (batch_size if bounds.contexts is Contexts.SHARED else 1)
    # [B or 1, H, Q]: every output of a head takes an equal share of its μ².
    factors = math.sqrt(charged) / np.array(head_mus)
    precision = None
    if noise == "exact":
        precision = plan_grid(
            num_numbers=num_numbers, value_width=width, smallest_row_mu=float(1.0 / factors.max())
        )
        # (Δ + γ·√E·c)/σ is a row's share of μ for this σ.
        factors = factors / (1.0 - precision.rounding * factors)
    spread = sensitivity[:, None, :] * factors[None, :, None] * _STDDEV_UPWARD
    for extreme in (spread.min(), spread.max()):
        checked_stddev(
            float(extreme), torch.float32
        )  # the generator would refuse it when the call is paid for
    sensitivity.setflags(write=False)
    stddev = torch.from_numpy(_float32_up(spread)).expand(batch_size, -1, -1)
    if precision is not None:
        check_range(precision, value_norm=bounds.value_norm, smallest_stddev=float(stddev.min()))
        grid_noise(precision.steps)  # what it needs is found now, before anything is spent
    return AttentionPlan(
        bounds=bounds,
        batch_size=batch_size,
        num_heads=num_heads,
        num_queries=num_queries,
        query_width=query_width,
        value_width=width,
        num_key_rows=rows,
        scale=factor,
        is_causal=is_causal,
        compute_dtype=compute_dtype,
        score_bound=reach,
        sensitivity=sensitivity,
        stddev=stddev,
        head_mus=head_mus,
        mu=total,
        norms=norms,
        precision=precision,
    )


def _public_rows(bounds: AttentionBounds, batch_size: int, num_key_rows: int | None) -> int | None:
    if bounds.num_rows is None:
        return num_key_rows
    counts = bounds.num_rows if isinstance(bounds.num_rows, tuple) else (bounds.num_rows,)
    if len(counts) not in (1, batch_size) or (
        isinstance(bounds.num_rows, tuple) and len(counts) != batch_size
    ):
        raise InvalidInputError(
            "bounds.num_rows",
            bounds.num_rows,
            bound=f"one number, or one for each of {batch_size} batch entries",
            remedy="State as many as there are entries.",
        )
    if num_key_rows is not None and num_key_rows < max(counts):
        raise InvalidInputError(
            "num_key_rows",
            num_key_rows,
            bound=f"at least bounds.num_rows = {max(counts)}",
            remedy="State the true number of rows; with fewer rows than assumed the noise would be too small.",
        )
    return max(counts) if num_key_rows is None else num_key_rows


def _sensitivity(
    bounds: AttentionBounds,
    reach: float,
    num_queries: int,
    query_width: int,
    value_width: int,
    num_key_rows: int | None,
    is_causal: bool,
    dtype: torch.dtype,
) -> npt.NDArray[np.float64]:
    """Returns Δ, rounding included, [B or 1, Q]."""
    output_slack = 0.0
    if bounds.rounding is not None:
        rows = None if bounds.num_rows is None else num_key_rows
        if is_causal:
            # No query sees more rows than there are queries; what it does not see weighs exactly 0.
            rows, passes = num_queries, 1
        elif rows is None:
            rows, passes = PASS_ROWS, MAX_PRIVATE_PASSES
        else:
            rows, passes = min(rows, PASS_ROWS), -(-rows // PASS_ROWS)
        slack = rounding_slack(
            rounding=bounds.rounding,
            dtype=dtype,
            width=query_width,
            num_rows=rows,
            num_passes=passes,
            score_bound=reach,
        )
        reach, output_slack = reach + slack.score, slack.output * bounds.value_norm
        # Below the dtype's normal range an output is rounded by up to half a step, whatever its size.
        output_slack += math.sqrt(value_width) * subnormal_step(dtype)
    visible = np.arange(1, num_queries + 1) if is_causal else None
    if bounds.neighboring_relation is NeighboringRelation.ADD_OR_REMOVE_ONE:
        exact = _add_or_remove_curve(bounds, reach, num_queries, visible)[None]
    else:
        counts = bounds.num_rows if isinstance(bounds.num_rows, tuple) else (bounds.rows_of(0),)
        exact = np.stack([_replace_curve(bounds, reach, num_queries, visible, count) for count in counts])
    return exact + output_slack


def _replace_curve(
    bounds: AttentionBounds, reach: float, num_queries: int, visible: npt.NDArray[np.int64] | None, count: int
) -> npt.NDArray[np.float64]:
    seen = np.full(num_queries, count) if visible is None else np.minimum(visible, count)
    own = np.minimum(seen, bounds.max_rows_per_record)
    return replace_one_curve(bounds.value_norm, reach, seen - own, own, bounds.null_rows)


def _add_or_remove_curve(
    bounds: AttentionBounds, reach: float, num_queries: int, visible: npt.NDArray[np.int64] | None
) -> npt.NDArray[np.float64]:
    r = bounds.max_rows_per_record

    def change(own: int, max_rest: int | None) -> float:
        return add_or_remove_sensitivity(
            value_norm=bounds.value_norm,
            score_bound=reach,
            null_rows=bounds.null_rows,
            record_rows=own,
            max_rest=max_rest,
        )

    curve = np.full(num_queries, change(r, None))
    if visible is not None:
        # Only where a query sees few rows is there less room than the worst case takes: r and at most r more.
        for t in range(min(num_queries, 2 * r)):
            curve[t] = max(change(own, t + 1 - own) for own in range(1, min(r, t + 1) + 1))
    return curve


def _head_mus(
    num_heads: int,
    budget: PrivacyBudget | None,
    mu: float | None,
    head_epsilons: Sequence[float] | None,
    head_importance: Sequence[float] | None,
) -> tuple[tuple[float, ...], float]:
    """Returns each head's μ and the whole call's."""
    from dp_flash_attention.accounting.gdp import compose_gdp, gdp_epsilon, gdp_mu

    if (budget is None) == (mu is None):
        raise InvalidInputError(
            "budget", budget, bound="given, or mu in its place", remedy="Pass exactly one of budget and mu."
        )
    if head_epsilons is not None and head_importance is not None:
        raise InvalidInputError(
            "head_importance",
            head_importance,
            bound="None beside head_epsilons",
            remedy="Pass one of the two.",
        )
    if head_epsilons is not None:
        if budget is None:
            raise InvalidInputError(
                "budget", None, bound="given with head_epsilons", remedy="It states delta and the limit."
            )
        epsilons = _per_head("head_epsilons", head_epsilons, num_heads)
        mus = tuple(gdp_mu(PrivacyBudget(epsilon=each, delta=budget.delta)) for each in epsilons)
        composed = compose_gdp(mus)
        spent = gdp_epsilon(mu=composed, delta=budget.delta)
        if spent > budget.epsilon:
            raise InvalidInputError(
                "head_epsilons",
                tuple(epsilons),
                bound=f"such that all heads together stay within epsilon={budget.epsilon:g}; they compose to {spent:.6g}",
                remedy="Lower them, raise the budget, or use head_importance.",
            )
        return mus, composed
    total = (
        gdp_mu(budget)
        if budget is not None
        else positive_finite("mu", mu, remedy="Common values are 0.1 to 3.")
    )
    weights = (
        [1.0] * num_heads
        if head_importance is None
        else _per_head("head_importance", head_importance, num_heads)
    )
    # Rounded down so that the heads compose to no more than the total.
    scale = total / math.sqrt(math.fsum(weights)) * (1.0 - 1e-14)
    return tuple(scale * math.sqrt(weight) for weight in weights), total


def _per_head(name: str, values: Sequence[float], num_heads: int) -> list[float]:
    if len(values) != num_heads:
        raise InvalidInputError(
            name,
            tuple(values),
            bound=f"one number for each of {num_heads} heads",
            remedy="State one for each.",
        )
    return [positive_finite(name, value, remedy="Use positive numbers.") for value in values]


def _float32_up(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    rounded = values.astype(np.float32)
    return np.where(rounded < values, np.nextafter(rounded, np.float32(np.inf)), rounded)
