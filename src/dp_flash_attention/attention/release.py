"""What a caller may say about a noisy attention output, and under which assumptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dp_flash_attention.attention.bounds import AttentionBounds, Contexts
from dp_flash_attention.attention.planning import AttentionPlan
from dp_flash_attention.core.privacy import Guarantee, NeighboringRelation, PrivacyUnit

if TYPE_CHECKING:
    from dp_flash_attention.accounting import GaussianRelease

_ROWS = (
    "the queries, and every weight that made keys and values, are public: they do not depend on the records"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Release:
    """The guarantee of one call's output. Everything here is public.

    Attributes:
        plan: The noise and what it was computed from.
        call_id: Number of the call under its key.
        backend: Name of the back end that ran.
        noise: ``"secure"`` or ``"fast"``.
        uses_test_key: Whether the key is public, so that nothing is private.
        assumptions: What has to be true for the certified figures to hold.
    """

    plan: AttentionPlan
    call_id: int
    backend: str
    noise: str
    uses_test_key: bool
    assumptions: tuple[str, ...]

    @property
    def mu(self) -> float:
        """μ in Gaussian DP of the whole output. Releases on one data set compose by root of sum of squares."""
        return self.plan.mu

    @property
    def neighboring_relation(self) -> NeighboringRelation:
        """The relation that μ holds for."""
        return self.plan.bounds.neighboring_relation

    @property
    def event(self) -> GaussianRelease:
        """The release as an event for ``accounting``, to be composed with others."""
        from dp_flash_attention.accounting import GaussianRelease

        return GaussianRelease(noise_multiplier=1.0 / self.mu, neighboring_relation=self.neighboring_relation)

    def epsilon(self, delta: float) -> float:
        """Returns ε at ``delta``, exact up to rounding upwards (``accounting.gdp_epsilon``)."""
        from dp_flash_attention.accounting import gdp_epsilon

        return gdp_epsilon(mu=self.mu, delta=delta)

    def delta(self, epsilon: float) -> float:
        """Returns δ at ``epsilon`` (``accounting.gdp_delta``)."""
        from dp_flash_attention.accounting import gdp_delta

        return gdp_delta(mu=self.mu, epsilon=epsilon)

    @property
    def guarantee(self) -> Guarantee:
        """The five statements of the call."""
        return guarantee_of(self.plan)


def guarantee_of(plan: AttentionPlan) -> Guarantee:
    """Returns the five statements of a plan."""
    bounds = plan.bounds
    widest, narrowest = float(plan.sensitivity.max()), float(plan.sensitivity.min())
    return Guarantee(
        neighboring_relation=bounds.neighboring_relation,
        privacy_unit=PrivacyUnit.EXAMPLE if bounds.max_rows_per_record == 1 else PrivacyUnit.USER,
        sensitivity=f"{narrowest:.6g} to {widest:.6g} in L2 for each output row, {bounds.max_rows_per_record} row(s) a record",
        public=_public(bounds),
        theorem=f"Gaussian mechanism, sqrt(sum of squared sensitivity over noise) = {plan.mu:.6g} over all rows and heads: "
        f"{plan.mu:.6g}-GDP",
        source="docs/attention.md, Theorems 1 to 6; Dong, Roth & Su 2022, Theorem 2.7 and Corollary 3.3",
    )


def assumptions_of(
    bounds: AttentionBounds, *, has_record_ids: bool, noise: str, dtype: torch.dtype, may_refuse_rows: bool
) -> tuple[str, ...]:
    """Returns what a release with these settings takes for granted."""
    found = [_ROWS]
    if not has_record_ids:
        found.append(
            f"each record owns at most {bounds.max_rows_per_record} of the rows of a batch entry (no record_ids)"
        )
    if bounds.contexts is Contexts.DISJOINT and not has_record_ids:
        found.append("no record has rows in two batch entries (no record_ids)")
    if bounds.neighboring_relation is NeighboringRelation.REPLACE_ONE:
        found.append("the number, places and owners of rows, and the padding mask, are public")
    else:
        found.append(
            "time, memory, errors and the choice of back end, which depend on the number of rows, are not observed"
        )
        found.append(
            "under a causal mask a removed record's rows become hidden: other rows keep their positions"
        )
    if may_refuse_rows:
        found.append("refusals of rows that are not finite are not observed (nonfinite_rows='zero' has none)")
    if bounds.rounding is None:
        found.append("scores, weights and sums are exact: rounding is not charged for")
    else:
        found.append(f"the kernel's arithmetic in {dtype} obeys the error model '{bounds.rounding.value}'")
    if noise == "secure":
        found.append("the noise's cipher is a pseudo-random function and its key stays secret")
    else:
        found.append("observers do not attack the generator 'fast', which is no cipher")
    found.append("noise in float32 stands for real numbers: its finite grid is not analysed")
    return tuple(found)


def _public(bounds: AttentionBounds) -> tuple[str, ...]:
    layout = () if bounds.num_rows is None else ("number and layout of rows",)
    return ("queries", "norm bounds", "scale", "null rows", "masks' causality", "noise scales", *layout)
