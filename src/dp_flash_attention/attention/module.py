"""``nn.MultiheadAttention`` whose output is private in its key/value rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dp_flash_attention.attention.bounds import AttentionBounds
from dp_flash_attention.attention.calls import CallNoise
from dp_flash_attention.attention.functional import ReleaseFilter, dp_flash_attention
from dp_flash_attention.attention.owners import ExcessRows
from dp_flash_attention.attention.release import Release
from dp_flash_attention.attention.rows import NonfiniteRows
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import PrivacyBudget
from dp_flash_attention.core.validation import positive_int

_PARAMETERS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")


class DPFlashAttention(nn.Module):
    """Multi-head attention over a private context: projections, private attention, output projection.

    Interface and parameters are those of ``nn.MultiheadAttention`` (its ``state_dict`` loads), with the privacy arguments
    added and without what would break the guarantee: attention weights, masks by score, dropout, and keys that are
    added to the context.

    Args:
        embed_dim: Width of queries and outputs.
        num_heads: H; a divisor of ``embed_dim``.
        bounds: The public promises; norms are those of one head's *projected* rows.
        noise: Key, kind of noise and call numbers, shared by every call on that key. With ``"exact"``, a ``privacy_filter``
            needs a ``finite_precision_share``.
        budget: (ε, δ) of each forward call, or
        mu: its μ. Exactly one of the two.
        privacy_filter: A budget over many calls.
        bias: Whether projections have biases.
        kdim: Width of keys; None for ``embed_dim``.
        vdim: Width of values; None for ``embed_dim``.
        batch_first: Whether inputs are [B, rows, width] and not [rows, B, width].
        head_epsilons: See ``plan_attention_release``.
        head_importance: See ``plan_attention_release``.
        backend: See ``dp_flash_attention``.
        nonfinite_rows: See ``dp_flash_attention``; it looks at projected rows.
        excess_rows: See ``dp_flash_attention``.

    Raises:
        InvalidInputError: If ``num_heads`` does not divide ``embed_dim``.

    Guarantees:
        neighbouring relation, privacy unit, sensitivity, theorem, source: those of ``dp_flash_attention``, for the rows
            of ``key`` and ``value``: a projection maps each row by itself, so one record's rows stay its own, and
            the output projection is post-processing.
        public: queries, and every weight of this module. Weights that were trained on the records themselves are not
            public, and then the guarantee does not hold. Gradients with respect to keys, values and their
            projections are not private releases: see docs/attention.md, "Training through it".
    """

    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter
    k_proj_weight: nn.Parameter
    v_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        bounds: AttentionBounds,
        noise: CallNoise,
        budget: PrivacyBudget | None = None,
        mu: float | None = None,
        privacy_filter: ReleaseFilter | None = None,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        head_epsilons: Sequence[float] | None = None,
        head_importance: Sequence[float] | None = None,
        backend: str = "auto",
        nonfinite_rows: NonfiniteRows = "refuse",
        excess_rows: ExcessRows = "refuse",
    ) -> None:
        super().__init__()
        self.embed_dim = positive_int("embed_dim", embed_dim, remedy="It is the width of the queries.")
        self.num_heads = positive_int("num_heads", num_heads, remedy="1 is the least.")
        if embed_dim % num_heads:
            raise InvalidInputError(
                "num_heads",
                num_heads,
                bound=f"a divisor of embed_dim = {embed_dim}",
                remedy="Choose another.",
            )
        if (budget is None) == (mu is None):
            raise InvalidInputError(
                "budget",
                budget,
                bound="given, or mu in its place",
                remedy="Pass exactly one of budget and mu.",
            )
        self.batch_first = batch_first
        self.bounds, self.noise, self.privacy_filter = bounds, noise, privacy_filter
        self.budget, self.mu = budget, mu
        self.head_epsilons, self.head_importance = head_epsilons, head_importance
        self.backend = backend
        self.nonfinite_rows, self.excess_rows = nonfinite_rows, excess_rows
        # Parameters, their names and their first values are torch's, so that its state_dict loads as it is.
        pattern = nn.MultiheadAttention(embed_dim, num_heads, bias=bias, kdim=kdim, vdim=vdim)
        for name in _PARAMETERS:
            self.register_parameter(name, getattr(pattern, name))
        self.out_proj = pattern.out_proj

    @classmethod
    def from_multihead(
        cls,
        attention: nn.MultiheadAttention,
        *,
        bounds: AttentionBounds,
        noise: CallNoise,
        budget: PrivacyBudget | None = None,
        mu: float | None = None,
        privacy_filter: ReleaseFilter | None = None,
        head_epsilons: Sequence[float] | None = None,
        head_importance: Sequence[float] | None = None,
        backend: str = "auto",
        nonfinite_rows: NonfiniteRows = "refuse",
        excess_rows: ExcessRows = "refuse",
    ) -> DPFlashAttention:
        """Returns a private module with copies of an attention's weights, which have to be public.

        Raises:
            InvalidInputError: If it adds keys of its own, or uses dropout.
        """
        if attention.bias_k is not None or attention.add_zero_attn or attention.dropout > 0.0:
            raise InvalidInputError(
                "attention",
                "an nn.MultiheadAttention with add_bias_kv, add_zero_attn or dropout",
                bound="without them",
                remedy="Use bounds.null_rows for rows of score 0, and no dropout.",
            )
        made = cls(
            attention.embed_dim,
            attention.num_heads,
            bounds=bounds,
            noise=noise,
            budget=budget,
            mu=mu,
            privacy_filter=privacy_filter,
            bias=attention.in_proj_bias is not None,
            kdim=attention.kdim,
            vdim=attention.vdim,
            batch_first=attention.batch_first,
            head_epsilons=head_epsilons,
            head_importance=head_importance,
            backend=backend,
            nonfinite_rows=nonfinite_rows,
            excess_rows=excess_rows,
        )
        made.load_state_dict(attention.state_dict())
        return made.to(attention.out_proj.weight)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        record_ids: Tensor | None = None,
        call_id: int | None = None,
    ) -> tuple[Tensor, Release]:
        """Answers public queries from a private context.

        Args:
            query: [Q, B, embed_dim], or [B, Q, embed_dim] with ``batch_first``; public.
            key: [K, B, kdim] (or batch first); private.
            value: [K, B, vdim] (or batch first); private.
            key_padding_mask: bool [B, K], True for padding.
            is_causal: Query t sees rows 0 … t.
            record_ids: Owners of rows, integers [B, K] or [K].
            call_id: See ``dp_flash_attention``.

        Returns:
            The output, shaped as ``query``, and its ``Release`` in place of attention weights, which are not private.

        Raises:
            InvalidInputError: As ``dp_flash_attention``; nothing was computed or spent.
            BudgetExhaustedError: Likewise.
        """
        for name, rows in (("query", query), ("key", key), ("value", value)):
            if rows.ndim != 3:
                raise InvalidInputError(
                    name, tuple(rows.shape), bound="three-dimensional", remedy="Add the batch dimension."
                )
        if not self.batch_first:
            query, key, value = (rows.transpose(0, 1) for rows in (query, key, value))
        heads = [self._split(rows) for rows in self._projected(query, key, value)]
        output, release = dp_flash_attention(
            *heads,
            bounds=self.bounds,
            noise=self.noise,
            budget=self.budget,
            mu=self.mu,
            privacy_filter=self.privacy_filter,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            record_ids=record_ids,
            head_epsilons=self.head_epsilons,
            head_importance=self.head_importance,
            call_id=call_id,
            backend=self.backend,
            nonfinite_rows=self.nonfinite_rows,
            excess_rows=self.excess_rows,
        )
        mixed: Tensor = self.out_proj(output.transpose(1, 2).flatten(2).to(query.dtype))
        return (mixed if self.batch_first else mixed.transpose(0, 1)), release

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        together, bias = self.in_proj_weight, self.in_proj_bias
        apart = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = apart if together is None else together.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        rows = (query, key, value)
        return [nn.functional.linear(*each) for each in zip(rows, weights, biases, strict=True)]

    def _split(self, rows: Tensor) -> Tensor:
        return rows.view(*rows.shape[:2], self.num_heads, -1).transpose(1, 2)
