"""Differentially private evaluation of a binary classifier: one noisy histogram, everything else from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.core.privacy import Guarantee
from dp_flash_attention.training.evaluation.terms import KINDS, ReleaseTerms, evaluation_guarantee, release
from dp_flash_attention.training.finite_precision import TrainingNoise

NUM_BINS = 64
"""Cells of each class's histogram: enough that ties within a cell cost the AUC less than 0.001 on spread-out
scores, few enough that the noise of all cells together stays small beside some ten thousand records."""

SCORE_BOUND = 8.0
"""Scores (log-odds) beyond ± this count in the outer cells; a public constant."""


@dataclass(frozen=True, kw_only=True)
class ClassifierEvaluation:
    """A released histogram of scores; every figure below is computed from it alone.

    Attributes:
        epsilon, delta: The guarantee of the release.
        noise_stddev: Standard deviation of each cell's noise, in records.
        negatives: Noisy number of records of the first class in each cell, by increasing score.
        positives: The same of the second class.
        noise: Kind of the noise.
    """

    epsilon: float
    delta: float
    noise_stddev: float
    negatives: tuple[float, ...]
    positives: tuple[float, ...]
    noise: TrainingNoise = "secure"

    @property
    def auc(self) -> float:
        """Area under the ROC curve, in [0, 1]; 0.5 if the noise hides one class."""
        num_negatives, num_positives = sum(self.negatives), sum(self.positives)
        if num_negatives <= 0.0 or num_positives <= 0.0:
            return 0.5
        below, wins = 0.0, 0.0
        for negative, positive in zip(self.negatives, self.positives, strict=True):
            wins += positive * (below + 0.5 * negative)
            below += negative
        return min(1.0, max(0.0, wins / (num_negatives * num_positives)))

    @property
    def auc_standard_error(self) -> float:
        """Estimated standard deviation of ``auc`` that the noise causes (first-order error propagation).

        The sampling error of the hold-out is not part of it.
        """
        num_negatives, num_positives, auc = sum(self.negatives), sum(self.positives), self.auc
        if num_negatives <= 0.0 or num_positives <= 0.0:
            return 0.5
        variance, below, above = 0.0, 0.0, num_positives
        for negative, positive in zip(self.negatives, self.positives, strict=True):
            above -= positive
            # Derivatives of wins / (n₋ n₊) by this cell's two counts.
            by_positive = ((below + 0.5 * negative) / num_negatives - auc) / num_positives
            by_negative = ((above + 0.5 * positive) / num_positives - auc) / num_negatives
            variance += by_positive**2 + by_negative**2
            below += negative
        return self.noise_stddev * math.sqrt(variance)

    @property
    def positive_rate(self) -> float:
        """Share of the second class, in [0, 1]."""
        total = sum(self.negatives) + sum(self.positives)
        return min(1.0, max(0.0, sum(self.positives) / total)) if total > 0.0 else 0.5

    @property
    def accuracy(self) -> float:
        """Share of records whose class has the positive log-odds, in [0, 1]."""
        total, half = sum(self.negatives) + sum(self.positives), len(self.negatives) // 2
        right = sum(self.negatives[:half]) + sum(self.positives[half:])
        return min(1.0, max(0.0, right / total)) if total > 0.0 else 0.5

    @property
    def roc(self) -> list[list[float]]:
        """Points (false positive rate, true positive rate), both non-decreasing from 0 to 1."""
        return _curve(self.negatives, self.positives)

    kind: ClassVar[str] = "binary"

    def estimates(self) -> dict[str, float]:
        """Returns the figures for the certificate."""
        return {"auc": self.auc, "auc_standard_error_of_noise": self.auc_standard_error}

    @property
    def num_values(self) -> int:
        """How many numbers were released."""
        return len(self.negatives) + len(self.positives)

    @property
    def guarantee(self) -> Guarantee:
        """The five statements, for the certificate."""
        return evaluation_guarantee(self.kind, epsilon=self.epsilon, delta=self.delta, noise=self.noise)

    def summary(self) -> str:
        """Returns one line for people."""
        return (
            f"AUC on the hold-out: {self.auc:.4f} ± {self.auc_standard_error:.4f} "
            "(differentially private; ± is the noise alone)."
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the release and its figures as JSON values."""
        released = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return released | {
            "kind": self.kind,
            "auc": self.auc,
            "auc_standard_error": self.auc_standard_error,
            "positive_rate": self.positive_rate,
            "accuracy": self.accuracy,
            "roc": self.roc,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClassifierEvaluation:
        """Reads what ``to_dict`` wrote; the figures are computed anew."""
        known: dict[str, Any] = {
            field.name: values[field.name]
            for field in fields(cls)
            if field.name != "noise" or "noise" in values
        }
        return cls(**known | {name: tuple(known[name]) for name in ("negatives", "positives")})


def evaluate_classifier(logits: Tensor, labels: Tensor, terms: ReleaseTerms) -> ClassifierEvaluation:
    """Releases the scores' histogram by class under (ε, δ)-DP.

    Args:
        logits: Shape [N, 2]; the score is their difference. N may be 0.
        labels: Class indices, shape [N].
        terms: What the release may cost, and its secret.

    Raises:
        InvalidInputError: If a value is out of range; nothing is released.

    Guarantees:
        neighbouring relation: add or remove one record of the hold-out.
        privacy unit: one record.
        sensitivity: 1 in L2 norm; a record is one count in one of 2 · ``NUM_BINS`` cells, whatever its score is.
        public: the cells. The model may depend on other records, none of them in the hold-out.
        theorem: Gaussian mechanism, calibrated by the certified accountant; post-processing.
    """
    if logits.dim() != 2 or logits.shape[1] != 2 or labels.shape != logits.shape[:1]:
        raise InvalidInputError(
            "logits shape",
            tuple(logits.shape),
            bound=f"[N, 2] for labels of shape [N], here {list(labels.shape)}",
            remedy="Pass the logits of two classes.",
        )
    counts = class_histograms(logits[:, 1] - logits[:, 0], labels)
    noise_stddev = release(
        counts, l2_sensitivity=KINDS[ClassifierEvaluation.kind].l2_sensitivity, terms=terms
    )
    return ClassifierEvaluation(
        epsilon=float(terms.epsilon),
        delta=float(terms.delta),
        noise_stddev=noise_stddev,
        noise=terms.noise,
        negatives=tuple(counts[0].tolist()),
        positives=tuple(counts[1].tolist()),
    )


def class_histograms(scores: Tensor, labels: Tensor) -> Tensor:
    """Counts records by class and by cell of their score, shape [2, NUM_BINS], float64. Private data.

    A score that is NaN counts as 0: a refusal would show that there is such a record.
    """
    scores = scores.double().nan_to_num(nan=0.0, posinf=SCORE_BOUND, neginf=-SCORE_BOUND)
    cells = ((scores + SCORE_BOUND) * (NUM_BINS / (2 * SCORE_BOUND))).floor().long()
    cells = cells.clamp(0, NUM_BINS - 1) + NUM_BINS * labels
    return torch.bincount(cells, minlength=2 * NUM_BINS).double().view(2, NUM_BINS)


def exact_auc(scores: Tensor, labels: Tensor) -> float:
    """Returns the area under the ROC curve, ties counted half. NOT PRIVATE.

    Args:
        scores: Shape [N].
        labels: 0 or 1, shape [N].
    """
    positive, negative = scores[labels == 1].double(), scores[labels == 0].double().sort().values
    if len(positive) == 0 or len(negative) == 0:
        return math.nan
    below = torch.searchsorted(negative, positive, right=False)
    not_above = torch.searchsorted(negative, positive, right=True)
    return float((below + not_above).double().mean() / (2 * len(negative)))


def exact_roc(scores: Tensor, labels: Tensor) -> list[list[float]]:
    """Returns points of the exact ROC curve on fine cells. NOT PRIVATE."""
    cells = ((scores.double() + SCORE_BOUND) * 64).round().clamp(0, 128 * SCORE_BOUND).long()
    width = int(128 * SCORE_BOUND) + 1
    negatives, positives = (torch.bincount(cells[labels == k], minlength=width).tolist() for k in (0, 1))
    return _curve(negatives, positives)


def _curve(negatives: Any, positives: Any) -> list[list[float]]:
    """From the highest cell down; noise is made monotone and clipped to [0, 1]."""
    totals = (max(sum(negatives), 1e-9), max(sum(positives), 1e-9))
    points, false, true, best = [[0.0, 0.0]], 0.0, 0.0, [0.0, 0.0]
    for negative, positive in zip(reversed(negatives), reversed(positives), strict=True):
        false, true = false + negative, true + positive
        best = [min(1.0, max(best[0], false / totals[0])), min(1.0, max(best[1], true / totals[1]))]
        points.append(best)
    return [*points, [1.0, 1.0]]
