"""Differentially private evaluations of a trained model, one file for each kind, and the exact scores beside."""

from collections.abc import Mapping
from typing import Any

from dp_flash_attention.core.errors import RunStateError
from dp_flash_attention.training.evaluation.binary import (
    NUM_BINS,
    SCORE_BOUND,
    ClassifierEvaluation,
    class_histograms,
    evaluate_classifier,
    exact_auc,
    exact_roc,
)
from dp_flash_attention.training.evaluation.confusion import ConfusionEvaluation, evaluate_confusion
from dp_flash_attention.training.evaluation.exact import exact_classification, exact_language_model
from dp_flash_attention.training.evaluation.next_token import (
    LanguageModelEvaluation,
    evaluate_language_model,
    token_losses,
)
from dp_flash_attention.training.evaluation.terms import KINDS, Evaluation, ReleaseTerms, evaluation_guarantee

_KINDS: tuple[type[ClassifierEvaluation | ConfusionEvaluation | LanguageModelEvaluation], ...] = (
    ClassifierEvaluation,
    ConfusionEvaluation,
    LanguageModelEvaluation,
)


def read_evaluation(values: Mapping[str, Any]) -> Evaluation:
    """Reads what an evaluation's ``to_dict`` wrote.

    Raises:
        RunStateError: If its kind is unknown.
    """
    for kind in _KINDS:
        if values.get("kind") == kind.kind:
            return kind.from_dict(values)
    raise RunStateError(
        f"An evaluation of kind {values.get('kind')!r} is unknown. Read it with the version that wrote it."
    )


__all__ = [
    "KINDS",
    "NUM_BINS",
    "SCORE_BOUND",
    "ClassifierEvaluation",
    "ConfusionEvaluation",
    "Evaluation",
    "LanguageModelEvaluation",
    "ReleaseTerms",
    "class_histograms",
    "evaluate_classifier",
    "evaluate_confusion",
    "evaluate_language_model",
    "evaluation_guarantee",
    "exact_auc",
    "exact_classification",
    "exact_language_model",
    "exact_roc",
    "read_evaluation",
    "token_losses",
]
