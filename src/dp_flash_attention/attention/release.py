"""What a caller may say about a noisy attention output, and under which assumptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dp_flash_attention.attention.bounds import AttentionBounds, Contexts
from dp_flash_attention.attention.interface import AttentionNoise, Cipher
from dp_flash_attention.attention.planning import AttentionPlan
from dp_flash_attention.core.errors import InvalidInputError
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
        noise: ``"secure"``, ``"exact"`` or ``"fast"``.
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
        """μ in Gaussian DP of the whole output. Releases on one data set compose by root of sum of squares.

        With noise ``"exact"`` up to ``distance``.
        """
        return self.plan.mu

    @property
    def distance(self) -> float:
        """η: bound of the total variation to a μ-GDP output, the generator's advantage included; 0 with normals.

        Over several releases η adds up; (1 + e^ε) times the sum is added to δ at ε.
        """
        return self.plan.distance

    @property
    def neighboring_relation(self) -> NeighboringRelation:
        """The relation that μ holds for."""
        return self.plan.bounds.neighboring_relation

    @property
    def event(self) -> GaussianRelease:
        """The release as an event for ``accounting``, to be composed with others.

        Raises:
            InvalidInputError: With noise ``"exact"``: an event has no place for ``distance``.
        """
        from dp_flash_attention.accounting import GaussianRelease

        if self.distance > 0.0:
            raise InvalidInputError(
                "noise",
                self.noise,
                bound="'secure' or 'fast' for an event, which has no place for finite precision",
                remedy="Use a GaussianFilter with a finite_precision_share, or compose mu and add up distance.",
            )
        return GaussianRelease(noise_multiplier=1.0 / self.mu, neighboring_relation=self.neighboring_relation)

    def epsilon(self, delta: float) -> float:
        """Returns ε at ``delta``, exact up to rounding upwards (``accounting.near_gdp_epsilon``)."""
        return self.plan.epsilon(delta)

    def delta(self, epsilon: float) -> float:
        """Returns δ at ``epsilon`` (``accounting.near_gdp_delta``)."""
        from dp_flash_attention.accounting import near_gdp_delta

        return near_gdp_delta(mu=self.mu, distance=self.distance, epsilon=epsilon)

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
        sensitivity=f"{narrowest:.6g} to {widest:.6g} in L2 for each output row, {bounds.max_rows_per_record} row(s) a record"
        f"{_rounding(plan)}",
        public=(*_public(bounds), *(() if plan.precision is None else ("grids of the output rows",))),
        theorem=f"Gaussian mechanism, sqrt(sum of squared sensitivity over noise) = {plan.mu:.6g} over all rows and heads: "
        f"{plan.mu:.6g}-GDP{_nearness(plan)}",
        source="docs/attention.md, Theorems 1 to 7; Dong, Roth & Su 2022, Theorem 2.7 and Corollary 3.3",
    )


def _rounding(plan: AttentionPlan) -> str:
    if plan.precision is None:
        return ""
    return f", and {plan.precision.rounding:.3g} of its noise from rounding to its grid, noise/{plan.precision.steps}"


def _nearness(plan: AttentionPlan) -> str:
    if plan.precision is None:
        return ""
    return (
        f" up to a total variation of {plan.precision.distance:.3g} and a generator's advantage of "
        f"{plan.precision.advantage:.3g}: (1 + e^epsilon) times their sum is part of delta"
    )


def assumptions_of(
    bounds: AttentionBounds,
    *,
    has_record_ids: bool,
    noise: AttentionNoise,
    cipher: Cipher,
    vouched: Sequence[str],
    dtype: torch.dtype,
    may_refuse_rows: bool,
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
    return (*found, *_noise_assumptions(noise, cipher, vouched))


def _noise_assumptions(noise: AttentionNoise, cipher: Cipher, vouched: Sequence[str]) -> tuple[str, ...]:
    if noise == "exact":
        return (
            f"no attack on {cipher} beats key search with 2^64 sequential Grover iterations (the generator's advantage), and "
            "the noise's key stays secret",
            *(f"on the caller's word: {statement}" for statement in vouched),
        )
    generator = (
        "the noise's cipher is a pseudo-random function and its key stays secret"
        if noise == "secure"
        else "observers do not attack the generator 'fast', which is no cipher"
    )
    return (generator, "noise in float32 stands for real numbers: its finite grid is not analysed")


def _public(bounds: AttentionBounds) -> tuple[str, ...]:
    layout = () if bounds.num_rows is None else ("number and layout of rows",)
    return ("queries", "norm bounds", "scale", "null rows", "masks' causality", "noise scales", *layout)
