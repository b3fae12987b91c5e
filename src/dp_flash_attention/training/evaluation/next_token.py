"""Differentially private evaluation of a language model: two noisy sums, the loss and the number of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import Guarantee
from dp_flash_attention.training.evaluation.terms import KINDS, ReleaseTerms, evaluation_guarantee, release
from dp_flash_attention.training.finite_precision import TrainingNoise
from dp_flash_attention.training.losses import IGNORE_INDEX

_STEPS = 2.0**20


@dataclass(frozen=True, kw_only=True)
class LanguageModelEvaluation:
    """Two released sums over the hold-out; every figure below is computed from them alone.

    Attributes:
        epsilon, delta: The guarantee of the release.
        noise_stddev: Standard deviation of the noise of both sums, in records of full length.
        loss_bound: Nats at which a token's loss is cut off; public.
        max_tokens: Most predicted tokens of a record; public.
        loss_sum: Noisy sum of token losses over ``loss_bound`` · ``max_tokens``.
        token_sum: Noisy number of tokens over ``max_tokens``.
        noise: Kind of the noise.
    """

    epsilon: float
    delta: float
    noise_stddev: float
    loss_bound: float
    max_tokens: int
    loss_sum: float
    token_sum: float
    noise: TrainingNoise = "secure"

    kind: ClassVar[str] = "next token"

    @property
    def nats_per_token(self) -> float:
        """Mean loss of a token, cut off at ``loss_bound``; the bound itself if the noise hides the hold-out."""
        if self.token_sum <= 0.0:
            return self.loss_bound
        return min(self.loss_bound, max(0.0, self.loss_bound * self.loss_sum / self.token_sum))

    @property
    def nats_standard_error(self) -> float:
        """Estimated standard deviation of ``nats_per_token`` that the noise causes (first-order propagation)."""
        if self.token_sum <= 0.0:
            return self.loss_bound
        share = self.nats_per_token / self.loss_bound
        error = self.loss_bound * self.noise_stddev * math.hypot(1.0, share) / self.token_sum
        return min(self.loss_bound, error)

    @property
    def perplexity(self) -> float:
        """Exponential of ``nats_per_token``."""
        return math.exp(self.nats_per_token)

    @property
    def num_values(self) -> int:
        """How many numbers were released."""
        return 2

    @property
    def guarantee(self) -> Guarantee:
        """The five statements, for the certificate."""
        return evaluation_guarantee(self.kind, epsilon=self.epsilon, delta=self.delta, noise=self.noise)

    def summary(self) -> str:
        """Returns one line for people."""
        return (
            f"Loss on the hold-out: {self.nats_per_token:.4f} ± {self.nats_standard_error:.4f} nats a token, "
            f"perplexity {self.perplexity:.2f} (differentially private; ± is the noise alone)."
        )

    def estimates(self) -> dict[str, float]:
        """Returns the figures for the certificate."""
        return {
            "nats_per_token": self.nats_per_token,
            "nats_per_token_standard_error_of_noise": self.nats_standard_error,
            "perplexity": self.perplexity,
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns the release and its figures as JSON values."""
        return asdict(self) | {"kind": self.kind} | self.estimates()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LanguageModelEvaluation:
        """Reads what ``to_dict`` wrote; the figures are computed anew."""
        return cls(
            **{
                field.name: values[field.name]
                for field in fields(cls)
                if field.name != "noise" or "noise" in values
            }
        )


def evaluate_language_model(
    losses: Tensor, counts: Tensor, terms: ReleaseTerms, *, loss_bound: float, max_tokens: int
) -> LanguageModelEvaluation:
    """Releases mean loss and perplexity under (ε, δ)-DP.

    Args:
        losses: Sum of each record's token losses, each cut off at ``loss_bound``, shape [N].
        counts: Number of each record's predicted tokens, shape [N], at most ``max_tokens``.
        terms: What the release may cost, and its secret.
        loss_bound: Public bound of a token's loss, in nats.
        max_tokens: Public bound of ``counts``.

    Raises:
        InvalidInputError: If a record exceeds its bounds or is not finite; nothing is released.

    Guarantees:
        neighbouring relation: add or remove one record of the hold-out.
        privacy unit: one record.
        sensitivity: sqrt(2) in L2 norm; a record adds at most 1 to each of both normalised sums.
        public: the bounds. The model may depend on other records, none of them in the hold-out.
        theorem: Gaussian mechanism, calibrated by the certified accountant; post-processing.
    """
    shares = torch.stack([losses.double() / (loss_bound * max_tokens), counts.double() / max_tokens])
    # Rounding of a float32 sum of at most max_tokens numbers.
    if not bool(((shares >= 0.0) & (shares <= 1.0 + 1e-4)).all()):
        raise InvalidInputError(
            "losses",
            "out of bounds or not finite",
            bound=f"in [0, {loss_bound * max_tokens:g}] over at most {max_tokens} tokens",
            remedy="Cut token losses off at loss_bound; if training diverged, lower the learning rate.",
        )
    # Whole multiples of 2^-20: in float64 their sums, of up to 2^32 records, have no rounding that another record could change.
    sums = shares.clamp(max=1.0).mul_(_STEPS).round_().sum(dim=1) / _STEPS
    noise_stddev = release(
        sums, l2_sensitivity=KINDS[LanguageModelEvaluation.kind].l2_sensitivity, terms=terms
    )
    return LanguageModelEvaluation(
        epsilon=float(terms.epsilon),
        delta=float(terms.delta),
        noise_stddev=noise_stddev,
        noise=terms.noise,
        loss_bound=float(loss_bound),
        max_tokens=max_tokens,
        loss_sum=float(sums[0]),
        token_sum=float(sums[1]),
    )


def token_losses(logits: Tensor, labels: Tensor, *, loss_bound: float) -> tuple[Tensor, Tensor]:
    """Returns each record's sum of token losses, cut off one by one, and its number of tokens. Private data.

    A loss that is NaN counts as the bound: a refusal would show that there is such a record.

    Args:
        logits: Shape [B, T, V]; position t predicts token t + 1.
        labels: Token ids, ``IGNORE_INDEX`` where not counted, shape [B, T].
        loss_bound: Cut-off in nats.

    Returns:
        Two tensors [B].
    """
    targets_BT = labels[:, 1:]
    losses_BT = cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        targets_BT.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    ).view(targets_BT.shape)
    return losses_BT.nan_to_num(nan=loss_bound).clamp(max=loss_bound).sum(dim=1), (
        targets_BT != IGNORE_INDEX
    ).sum(dim=1)
