"""What the evaluations share: the terms of a release, the release itself, and its five statements.

With noise ``"exact"`` a release is one step of docs/training.md's "Exact noise" with sampling probability 1: values are
rounded to a public grid and get rounded Gaussian noise; what finite precision costs is taken from δ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dp_flash_attention.accounting import calibrate_noise_multiplier
from dp_flash_attention.core.privacy import Guarantee, NeighboringRelation, PrivacyUnit
from dp_flash_attention.noise import make_generator
from dp_flash_attention.noise.entropy import NoiseKey
from dp_flash_attention.noise.rounded_gaussian import RoundedGaussian
from dp_flash_attention.training.finite_precision import (
    FinitePrecision,
    TrainingNoise,
    finite_precision,
    multiplier_on_grid,
)
from dp_flash_attention.training.step_noise import round_to_steps

_ON_GRID = " on sums that are rounded to a grid, its noise whole steps of it; finite precision is paid for out of delta"


@dataclass(frozen=True, kw_only=True)
class ReleaseTerms:
    """What a release may cost, and its secret.

    Attributes:
        epsilon: ε of the release.
        delta: δ of the release.
        key: Secret of the run, used for this release and nothing else.
        noise: Kind of the noise.
    """

    epsilon: float
    delta: float
    key: NoiseKey
    noise: TrainingNoise = "secure"


class Evaluation(Protocol):
    """A differentially private evaluation: a release, and figures computed from it alone."""

    @property
    def kind(self) -> str:
        """A name in ``KINDS``; decides the sensitivity."""

    @property
    def epsilon(self) -> float:
        """ε of the release."""

    @property
    def delta(self) -> float:
        """δ of the release."""

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise of each released number."""

    @property
    def noise(self) -> TrainingNoise:
        """Kind of the noise."""

    @property
    def num_values(self) -> int:
        """How many numbers were released."""

    @property
    def guarantee(self) -> Guarantee:
        """The five statements, for the certificate."""

    def summary(self) -> str:
        """Returns one line for people."""

    def estimates(self) -> dict[str, float]:
        """Returns the figures for the certificate."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the release and its figures as JSON values, with ``kind``."""


def release(values: Tensor, *, l2_sensitivity: float, terms: ReleaseTerms) -> float:
    """Adds the Gaussian noise that the terms ask for to ``values``, in place.

    Args:
        values: float64, of the stated sensitivity under add-or-remove. In float32 a count above 2^24 would
            round, and one record could then move it by 2.
        l2_sensitivity: Its L2 sensitivity.
        terms: ε, δ and the secret.

    Returns:
        The noise's standard deviation.

    Raises:
        InvalidInputError: With noise ``"exact"``, if finite precision would cost more than a hundredth of δ.
    """
    precision = _precision(terms, values.numel(), l2_sensitivity)
    multiplier = calibrate_noise_multiplier(
        epsilon=terms.epsilon,
        delta=terms.delta if precision is None else terms.delta - precision.delta,
        sampling_prob=1.0,
        num_steps=1,
    )
    if terms.noise != "exact":
        noise_stddev = l2_sensitivity * multiplier
        make_generator(terms.noise, terms.key).add_normal_(values, stddev=noise_stddev, step=0, stream=0)
        return noise_stddev
    assert precision is not None, "exact noise has a grid"
    multiplier = multiplier_on_grid(multiplier, precision)
    precision = _precision(terms, values.numel(), l2_sensitivity, multiplier)
    assert precision is not None
    noise = RoundedGaussian(precision.stddev)
    assert noise.total_variation * values.numel() <= precision.distance, "128-bit tables are within 2^-100"
    drawn = torch.from_numpy(noise.draw(terms.key, values.numel(), step=0, stream=0)).view(values.shape)
    # Whole numbers below 2^52 and a power of two: exact in float64.
    values.copy_(round_to_steps(values, precision.grid).add_(drawn).mul_(precision.grid))
    return l2_sensitivity * multiplier


def _precision(
    terms: ReleaseTerms, num_values: int, l2_sensitivity: float, noise_multiplier: float | None = None
) -> FinitePrecision | None:
    return finite_precision(
        terms.noise,
        epsilon=terms.epsilon,
        delta=terms.delta,
        l2_clip_norm=l2_sensitivity,
        num_parameters=num_values if terms.noise == "exact" else None,
        num_steps=1,
        noise_multiplier=noise_multiplier,
    )


@dataclass(frozen=True, kw_only=True)
class KindOfEvaluation:
    """What all evaluations of one kind have in common.

    Attributes:
        l2_sensitivity: Of the released numbers together, when one record comes or goes.
        sensitivity: The same in words.
        public: What is public of it.
    """

    l2_sensitivity: float
    sensitivity: str
    public: tuple[str, ...]


KINDS: Mapping[str, KindOfEvaluation] = {
    "binary": KindOfEvaluation(
        l2_sensitivity=1.0,
        sensitivity="L2 norm 1 of the histograms of both classes: one record is one count in one cell",
        public=("cells", "score bound", "classes", "noise standard deviation"),
    ),
    "confusion": KindOfEvaluation(
        l2_sensitivity=1.0,
        sensitivity="L2 norm 1 of the confusion matrix: one record is one count in one cell",
        public=("classes", "noise standard deviation"),
    ),
    "next token": KindOfEvaluation(
        l2_sensitivity=math.sqrt(2.0),
        sensitivity="L2 norm sqrt(2) of both sums: one record adds at most 1 to each",
        public=("loss bound", "longest record", "noise standard deviation"),
    ),
}


def evaluation_guarantee(kind: str, *, epsilon: float, delta: float, noise: TrainingNoise) -> Guarantee:
    """Returns the five statements of a release by ``release``."""
    return Guarantee(
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        privacy_unit=PrivacyUnit.EXAMPLE,
        sensitivity=KINDS[kind].sensitivity,
        public=KINDS[kind].public,
        theorem=f"({epsilon:g}, {delta:g})-DP: one Gaussian mechanism{_ON_GRID if noise == 'exact' else ''}; the figures are "
        "post-processing",
        source="Dwork & Roth 2014, Theorem A.1 and Proposition 2.1; Balle & Wang 2018, Theorem 8",
    )
