"""What the evaluations share: the terms of a release, the release itself, and its five statements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dp_flash_attention.accounting import calibrate_noise_multiplier
from dp_flash_attention.core.privacy import Guarantee, NeighboringRelation, PrivacyUnit
from dp_flash_attention.noise import NoiseName, make_generator
from dp_flash_attention.noise.entropy import NoiseKey


@dataclass(frozen=True, kw_only=True)
class ReleaseTerms:
    """What a release may cost, and its secret.

    Attributes:
        epsilon: ε of the release.
        delta: δ of the release.
        key: Secret of the run, used for this release and nothing else.
        noise: Name of the generator.
    """

    epsilon: float
    delta: float
    key: NoiseKey
    noise: NoiseName = "secure"


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
    """
    noise_stddev = l2_sensitivity * calibrate_noise_multiplier(
        epsilon=terms.epsilon, delta=terms.delta, sampling_prob=1.0, num_steps=1
    )
    make_generator(terms.noise, terms.key).add_normal_(values, stddev=noise_stddev, step=0, stream=0)
    return noise_stddev


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


def evaluation_guarantee(kind: str, *, epsilon: float, delta: float) -> Guarantee:
    """Returns the five statements of a release by ``release``."""
    return Guarantee(
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        privacy_unit=PrivacyUnit.EXAMPLE,
        sensitivity=KINDS[kind].sensitivity,
        public=KINDS[kind].public,
        theorem=f"({epsilon:g}, {delta:g})-DP: one Gaussian mechanism; the figures are post-processing",
        source="Dwork & Roth 2014, Theorem A.1 and Proposition 2.1; Balle & Wang 2018, Theorem 8",
    )
