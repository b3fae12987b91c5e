"""Differentially private evaluation of a classifier with more than two classes: a noisy confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import Guarantee
from dp_flash_attention.training.evaluation.terms import KINDS, ReleaseTerms, evaluation_guarantee, release
from dp_flash_attention.training.finite_precision import TrainingNoise


@dataclass(frozen=True, kw_only=True)
class ConfusionEvaluation:
    """A released confusion matrix; every figure below is computed from it alone.

    Attributes:
        epsilon, delta: The guarantee of the release.
        noise_stddev: Standard deviation of each cell's noise, in records.
        counts: Noisy number of records by true (row) and predicted class (column).
        noise: Kind of the noise.
    """

    epsilon: float
    delta: float
    noise_stddev: float
    counts: tuple[tuple[float, ...], ...]
    noise: TrainingNoise = "secure"

    kind: ClassVar[str] = "confusion"

    @property
    def total(self) -> float:
        """Noisy number of records of the hold-out, at least 1."""
        return max(1.0, sum(map(sum, self.counts)))

    @property
    def accuracy(self) -> float:
        """Share of rightly predicted records, in [0, 1]."""
        right = sum(row[k] for k, row in enumerate(self.counts))
        return min(1.0, max(0.0, right / self.total))

    @property
    def accuracy_standard_error(self) -> float:
        """Estimated standard deviation of ``accuracy`` that the noise causes (first-order propagation)."""
        k, accuracy = len(self.counts), self.accuracy
        variance = k * (1 - accuracy) ** 2 + (k * k - k) * accuracy**2
        return min(0.5, self.noise_stddev * math.sqrt(variance) / self.total)

    @property
    def largest_class_share(self) -> float:
        """Accuracy of always answering with the most frequent class, in [0, 1]."""
        return min(1.0, max(0.0, max(map(sum, self.counts)) / self.total))

    @property
    def num_values(self) -> int:
        """How many numbers were released."""
        return len(self.counts) ** 2

    @property
    def guarantee(self) -> Guarantee:
        """The five statements, for the certificate."""
        return evaluation_guarantee(self.kind, epsilon=self.epsilon, delta=self.delta, noise=self.noise)

    def summary(self) -> str:
        """Returns one line for people."""
        return (
            f"Accuracy on the hold-out: {self.accuracy:.4f} ± {self.accuracy_standard_error:.4f}; the most frequent "
            f"class alone would have {self.largest_class_share:.4f} (differentially private; ± is the noise alone)."
        )

    def estimates(self) -> dict[str, float]:
        """Returns the figures for the certificate."""
        return {
            "accuracy": self.accuracy,
            "accuracy_standard_error_of_noise": self.accuracy_standard_error,
            "largest_class_share": self.largest_class_share,
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns the release and its figures as JSON values."""
        released = asdict(self) | {"counts": [list(row) for row in self.counts]}
        return released | {"kind": self.kind} | self.estimates()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConfusionEvaluation:
        """Reads what ``to_dict`` wrote; the figures are computed anew."""
        return cls(
            epsilon=values["epsilon"],
            delta=values["delta"],
            noise_stddev=values["noise_stddev"],
            counts=tuple(tuple(row) for row in values["counts"]),
            noise=values.get("noise", "secure"),
        )


def evaluate_confusion(logits: Tensor, labels: Tensor, terms: ReleaseTerms) -> ConfusionEvaluation:
    """Releases the confusion matrix under (ε, δ)-DP.

    Args:
        logits: Shape [N, K]; N may be 0.
        labels: Class indices, shape [N].
        terms: What the release may cost, and its secret.

    Raises:
        InvalidInputError: If a shape does not fit; nothing is released.

    Guarantees:
        neighbouring relation: add or remove one record of the hold-out.
        privacy unit: one record.
        sensitivity: 1 in L2 norm; a record is one count in one of K² cells.
        public: the classes. The model may depend on other records, none of them in the hold-out.
        theorem: Gaussian mechanism, calibrated by the certified accountant; post-processing.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise InvalidInputError(
            "logits shape",
            tuple(logits.shape),
            bound=f"[N, K] for labels of shape [N], here {list(labels.shape)}",
            remedy="Pass one row of logits for each label.",
        )
    k = logits.shape[1]
    counts = confusion_counts(logits, labels)
    noise_stddev = release(counts, l2_sensitivity=KINDS[ConfusionEvaluation.kind].l2_sensitivity, terms=terms)
    return ConfusionEvaluation(
        epsilon=float(terms.epsilon),
        delta=float(terms.delta),
        noise_stddev=noise_stddev,
        noise=terms.noise,
        counts=tuple(tuple(row) for row in counts.view(k, k).tolist()),
    )


def confusion_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts records by true and predicted class, shape [K, K], float64. Private data.

    A logit that is NaN counts as 0: a refusal would show that there is such a record.
    """
    k = logits.shape[1]
    cells = labels * k + logits.nan_to_num(nan=0.0).argmax(dim=1)
    return torch.bincount(cells, minlength=k * k).double().view(k, k)
