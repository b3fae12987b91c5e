"""Exact scores of a model. NOT PRIVATE: for diagnostics, and for comparisons on public data."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from dp_flash_attention.training.evaluation.binary import exact_auc, exact_roc


def exact_classification(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Returns log loss (nats), accuracy and, for two classes, AUC and ROC curve. NOT PRIVATE.

    Args:
        logits: Shape [N, K].
        labels: Class indices, shape [N].
    """
    figures: dict[str, Any] = {
        "log_loss": float(cross_entropy(logits.double(), labels)),
        "accuracy": float((logits.argmax(1) == labels).double().mean()),
    }
    if logits.shape[1] == 2:
        scores = logits[:, 1] - logits[:, 0]
        figures |= {"auc": exact_auc(scores, labels), "roc": exact_roc(scores, labels)}
    return figures


def exact_language_model(losses: Tensor, counts: Tensor) -> dict[str, Any]:
    """Returns the mean loss of a token (nats) and its exponential. NOT PRIVATE.

    Args:
        losses: Sum of each record's token losses, shape [N].
        counts: Number of each record's predicted tokens, shape [N].
    """
    nats = losses.double().sum() / counts.sum().clamp(min=1)
    return {"nats_per_token": float(nats), "perplexity": float(nats.exp())}
