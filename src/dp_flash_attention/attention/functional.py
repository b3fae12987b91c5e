"""The call itself: check everything, spend, claim noise, run. In this order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dp_flash_attention.attention.backends import choose_backend
from dp_flash_attention.attention.bounds import AttentionBounds
from dp_flash_attention.attention.calls import CallNoise
from dp_flash_attention.attention.checks import (
    check_context,
    check_dtypes,
    check_plan,
    check_shapes,
    checked_choice,
    checked_out_dtype,
    refuse_tracing,
    refuse_transforms,
)
from dp_flash_attention.attention.finite_precision import checked_steps
from dp_flash_attention.attention.interface import AttentionCall
from dp_flash_attention.attention.owners import ExcessRows
from dp_flash_attention.attention.planning import AttentionPlan, plan_attention_release
from dp_flash_attention.attention.release import Release, assumptions_of
from dp_flash_attention.attention.rows import NonfiniteRows, check_finite, without_broken_rows
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget
from dp_flash_attention.noise.precision import true_float32


class ReleaseFilter(Protocol):
    """What a call needs of ``accounting.GaussianFilter``."""

    @property
    def neighboring_relation(self) -> NeighboringRelation:
        """The relation that releases must hold for."""

    def admits(self, mu: float, *, distance: float = 0.0) -> bool:
        """Returns whether ``spend`` would pass."""

    def spend(self, mu: float, *, distance: float = 0.0) -> None:
        """Charges a release before it runs, or raises ``BudgetExhaustedError``.

        Called with ``distance``, the total variation to a μ-GDP release, for noise ``"exact"`` alone.
        """


def dp_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bounds: AttentionBounds,
    noise: CallNoise,
    budget: PrivacyBudget | None = None,
    mu: float | None = None,
    privacy_filter: ReleaseFilter | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_padding_mask: Tensor | None = None,
    record_ids: Tensor | None = None,
    head_epsilons: Sequence[float] | None = None,
    head_importance: Sequence[float] | None = None,
    call_id: int | None = None,
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    nonfinite_rows: NonfiniteRows = "refuse",
    excess_rows: ExcessRows = "refuse",
) -> tuple[Tensor, Release]:
    """Scaled dot product attention whose output is differentially private in its key/value rows.

    Shapes and defaults are those of ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        query: [B, H, Q, D]; public. Every head's row is clipped to ``bounds.query_norm``.
        key: [B, G, K, D], H a multiple of G (with ``enable_gqa``); private.
        value: [B, G, K, E]; private.
        bounds: The public promises about the context.
        noise: Key, kind of noise and call numbers; the same object for every call on one key.
        budget: (ε, δ) of this call, or
        mu: its μ in Gaussian DP. Exactly one of the two.
        privacy_filter: A budget over many calls (``accounting.GaussianFilter``) that the call's μ is spent from. With noise
            ``"exact"`` it needs a ``finite_precision_share``.
        is_causal: Query t sees rows 0 … t (aligned at the top left, as torch).
        scale: Factor of the scores; None for 1/sqrt(D).
        enable_gqa: Allow G < H.
        key_padding_mask: bool [B, K], True where a row is padding, as in ``nn.MultiheadAttention``.
        record_ids: integers [B, K] or [K], the owner of each row; ``bounds.max_rows_per_record`` is enforced.
        head_epsilons: See ``plan_attention_release``.
        head_importance: See ``plan_attention_release``.
        call_id: A call number of your own, at least ``noise.next_call``; None takes the next one.
        backend: A name of ``available_backends``, or ``"auto"``: the fastest that was measured for this shape.
        compute_dtype: Dtype that the kernel reads; None for the inputs'.
        out_dtype: float32, bfloat16 or float16; None for the inputs' (float32 for float64).
        nonfinite_rows: What to do with a private row whose key or value holds a NaN or an infinity, or overflows.
            ``"refuse"`` raises, which tells whoever sees the error one unprotected fact of the rows: for the holder of the
            data. ``"zero"`` makes key and value of such a row zero, at the cost of a copy of both tensors, and the
            guarantee holds for every context. Queries are public, and always refused.
        excess_rows: What to do with rows of a record beyond ``max_rows_per_record``. ``"refuse"`` raises, with the same
            warning where owners are private; ``"hide"`` keeps a record's first rows and hides the rest.

    Returns:
        The noisy output [B, H, Q, E] and its ``Release``. The output is differentiable with respect to query, key
        and value; none of these gradients is private, that of the query included: it reads keys and values again.

    Raises:
        InvalidInputError: Wrong shapes or dtypes, numbers that are not finite, fewer rows than promised, a
            record with too many rows, a query that sees nothing, bounds out of range.
        BudgetExhaustedError: The filter has less left than the call costs.
        NoiseReuseError: The call number is used up, or the call is being traced: a graph repeats its noise or has none.
        DependencyMissingError: The back end asked for by name is not installed.
        Whatever is raised, nothing was computed or spent.

    Guarantees:
        neighbouring relation: ``bounds.neighboring_relation``.
        privacy unit: a record: all rows with one of ``record_ids``, or one row.
        sensitivity: per output row ``AttentionPlan.sensitivity``; over all rows and heads of the call jointly
            ``sqrt(Σ Δ²/σ²) <= μ``.
        public: queries, bounds, scale, causality, shapes; under replace-one also masks and record ids.
        theorem: the output is μ-GDP, hence (ε, δ(ε))-DP (Gaussian mechanism, Dong, Roth & Su 2022, Theorem 2.7).
            Rounding to ``out_dtype`` follows the noise and is post-processing. With noise ``"exact"`` it is within
            ``plan.distance`` of that, on the numbers that really come out (Theorem 6).
        source: docs/attention.md, Theorems 1 to 7.
    """
    refuse_tracing()
    refuse_transforms()
    check_shapes(query, key, value, enable_gqa=enable_gqa)
    dtype = check_dtypes(query, key, value, compute_dtype)
    plan = plan_attention_release(
        bounds,
        num_queries=query.shape[2],
        query_width=query.shape[3],
        value_width=value.shape[3],
        num_heads=query.shape[1],
        batch_size=query.shape[0],
        num_key_rows=key.shape[2] if bounds.num_rows is not None else None,
        scale=scale,
        is_causal=is_causal,
        budget=budget,
        mu=mu,
        head_epsilons=head_epsilons,
        head_importance=head_importance,
        compute_dtype=dtype,
        noise=noise.name,
    )
    return release_attention(
        query,
        key,
        value,
        plan=plan,
        noise=noise,
        privacy_filter=privacy_filter,
        key_padding_mask=key_padding_mask,
        record_ids=record_ids,
        call_id=call_id,
        backend=backend,
        out_dtype=out_dtype,
        nonfinite_rows=nonfinite_rows,
        excess_rows=excess_rows,
    )


def release_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    plan: AttentionPlan,
    noise: CallNoise,
    privacy_filter: ReleaseFilter | None = None,
    key_padding_mask: Tensor | None = None,
    record_ids: Tensor | None = None,
    call_id: int | None = None,
    backend: str = "auto",
    out_dtype: torch.dtype | None = None,
    nonfinite_rows: NonfiniteRows = "refuse",
    excess_rows: ExcessRows = "refuse",
) -> tuple[Tensor, Release]:
    """Runs a planned call; arguments, errors and guarantees are those of ``dp_flash_attention``.

    For callers that make many calls of one shape, or want to look at the plan first.

    Raises:
        InvalidInputError: As there, and if the tensors do not have the plan's shapes, or the plan is for another kind of
            noise.
    """
    refuse_tracing()
    refuse_transforms()
    checked_choice("nonfinite_rows", nonfinite_rows, ("refuse", "zero"))
    checked_choice("excess_rows", excess_rows, ("refuse", "hide"))
    steps = checked_steps(plan.precision, noise.name)
    check_plan(plan)
    check_shapes(query, key, value, enable_gqa=True)
    check_dtypes(query, key, value, plan.compute_dtype)
    out_type = checked_out_dtype(out_dtype, query.dtype)
    # What is checked is what is computed with: a large number may become infinite in a narrower dtype.
    query, key, value = (rows.to(plan.compute_dtype) for rows in (query, key, value))
    hidden = check_context(query, key, value, plan, key_padding_mask, record_ids, excess_rows=excess_rows)
    check_finite("query", query)
    if nonfinite_rows == "zero":
        key, value = without_broken_rows(key, value)
    else:
        check_finite("key", key)
        check_finite("value", value)
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        norms=plan.norms,
        scale=plan.scale,
        score_bound=plan.score_bound,
        causal=plan.is_causal,
        hidden=hidden,
        null_rows=float(plan.bounds.null_rows),
        stddev=plan.stddev,
        # A back end that cannot make this noise has to refuse now: after the spending it is too late.
        noise=replace(noise.peek(call_id), steps=steps),
        out_dtype=out_type,
    )
    with _as_charged(query.device):
        chosen = choose_backend(backend, call, rounding=plan.bounds.rounding)
    if privacy_filter is None:
        stream = noise.claim(call_id)
    else:
        if privacy_filter.neighboring_relation is not plan.bounds.neighboring_relation:
            raise InvalidInputError(
                "privacy_filter.neighboring_relation",
                privacy_filter.neighboring_relation.value,
                bound=f"that of the bounds, {plan.bounds.neighboring_relation.value}",
                remedy="State both for one relation.",
            )
        price = {} if plan.precision is None else {"distance": plan.distance}
        stream = noise.claim_for(partial(privacy_filter.spend, plan.mu, **price), call_id)
    with _as_charged(query.device):
        output = chosen.release(replace(call, noise=replace(stream, steps=steps)))
    release = Release(
        plan=plan,
        call_id=stream.call_id,
        backend=chosen.name,
        noise=noise.name,
        uses_test_key=noise.uses_test_key,
        assumptions=assumptions_of(
            plan.bounds,
            has_record_ids=record_ids is not None,
            noise=noise.name,
            cipher=noise.cipher,
            vouched=noise.vouched,
            dtype=plan.compute_dtype,
            may_refuse_rows=nonfinite_rows == "refuse",
        ),
    )
    return output, release


@contextmanager
def _as_charged(device: torch.device) -> Iterator[None]:
    """Products in the dtype that was charged for, and in its full precision."""
    with true_float32(), torch.autocast(device.type, enabled=False):
        yield
