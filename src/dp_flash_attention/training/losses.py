"""Per-example losses: one number for each record, never an average over the batch.

A batch-level normaliser would let one record change the weight of another, and no clipping bounds
that. Each loss here depends on its own row alone and is computed in float32 whatever the logits are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from dp_flash_attention.clipping.linear_cross_entropy import LinearCrossEntropy
from dp_flash_attention.core.errors import InvalidInputError

IGNORE_INDEX = -100
"""Label of a position that carries no loss (padding), as in PyTorch and Hugging Face."""


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each record, in nats.

    Args:
        logits: Shape [B, K], any floating dtype.
        labels: Class indices, shape [B].

    Returns:
        Losses, shape [B], float32 (float64 for float64 logits).

    Raises:
        InvalidInputError: If the shapes do not fit.

    Guarantees:
        Row i of the result depends on row i of the arguments alone.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise InvalidInputError(
            "labels shape",
            tuple(labels.shape),
            bound=f"[B] for logits of shape [B, K], here {list(logits.shape)}",
            remedy="Pass one class index for each record.",
        )
    return cross_entropy(_at_least_float32(logits), labels, reduction="none")


def language_model_loss(logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Mean next-token cross entropy of each record over its own counted tokens, in nats.

    Args:
        logits: Shape [B, T, V]; position t predicts token t + 1.
        labels: Token ids aligned with the inputs (the Hugging Face convention), shape [B, T];
            ``ignore_index`` where a token is not counted.
        ignore_index: The label that carries no loss.

    Returns:
        Losses, shape [B], float32 (float64 for float64 logits). A record with no counted token has
        loss 0 and gradient 0.

    Raises:
        InvalidInputError: If the shapes do not fit.

    Guarantees:
        Row i of the result depends on row i of the arguments alone: the divisor is that record's own
        number of counted tokens, never the batch's.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise InvalidInputError(
            "labels shape",
            tuple(labels.shape),
            bound=f"[B, T] for logits of shape [B, T, V], here {list(logits.shape)}",
            remedy="Pass the input ids with the ignored positions replaced by ignore_index.",
        )
    targets_BT = _next_tokens(labels, ignore_index)
    losses = cross_entropy(
        _at_least_float32(logits).flatten(0, 1),
        targets_BT.flatten(),
        ignore_index=ignore_index,
        reduction="none",
    )
    counts_B = (targets_BT != ignore_index).sum(dim=1)
    return losses.view(labels.shape).sum(dim=1) / counts_B.clamp(min=1)


def language_model_loss_from_hidden(hidden: Tensor, head: LinearCrossEntropy, labels: Tensor) -> Tensor:
    """``language_model_loss`` of ``head(hidden)`` without the logits in memory.

    Args:
        hidden: Shape [B, T, D]; position t predicts token t + 1.
        head: Maps D to V.
        labels: As in ``language_model_loss``, with ``head.ignore_index``.

    Returns:
        Losses, shape [B], float32 (float64 for float64 weights).

    Raises:
        InvalidInputError: If the shapes do not fit, or a label is outside the vocabulary.

    Guarantees:
        Those of ``language_model_loss``.
    """
    if hidden.dim() != 3 or labels.shape != hidden.shape[:2]:
        raise InvalidInputError(
            "labels shape",
            tuple(labels.shape),
            bound=f"[B, T] for hidden states of shape [B, T, D], here {list(hidden.shape)}",
            remedy="Pass the input ids with the ignored positions replaced by ignore_index.",
        )
    losses: Tensor = head(hidden, _next_tokens(labels, head.ignore_index))
    return losses


def _next_tokens(labels: Tensor, ignore_index: int) -> Tensor:
    # The labels move, not the logits: a slice of them would be copied, B·T·V numbers.
    return pad(labels[:, 1:], (0, 1), value=ignore_index)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
