"""A Hugging Face language model's loss without its logits in memory, where that gives the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_attention.clipping.linear_cross_entropy import LinearCrossEntropy
from dp_flash_attention.training.losses import language_model_loss_from_hidden

LOGIT_BYTES = 512 * 2**20
"""A microbatch's float32 logits above which the loss is computed without them. Below, keeping them is faster."""

# Logits of the probe may differ by rounding only; what scales or caps them is off by a share.
_TOLERANCE = 1e-4
_PROBE_TOKENS = 8


def fuse_head(model: nn.Module) -> bool:
    """Gives a causal language model a head that can skip its logits; returns whether it could.

    The head shares the parameters of the one it replaces, so ties, names and saved weights stay as they are. It is put
    in only where the model's logits on a public probe are the head's of its last hidden states: a model that scales or
    caps them keeps its own.

    Args:
        model: As ``AutoModelForCausalLM`` makes it.
    """
    model_any: Any = model
    linear = model_any.get_output_embeddings()
    if type(linear) is not nn.Linear or getattr(model_any, "base_model", model) is model:
        return False
    head = LinearCrossEntropy.sharing(linear)
    if not _gives_the_model_s_logits(model, head):
        return False
    model_any.set_output_embeddings(head)
    return model_any.get_output_embeddings() is head


def fused_language_model_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Returns each text's mean next-token cross entropy, shape [B], in nats; None where logits are to be kept.

    That is decided by the model and by shapes alone, which are public.
    """
    model_any: Any = model
    find_head = getattr(model, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    ids = inputs["input_ids"]
    if not isinstance(head, LinearCrossEntropy) or 4 * ids.numel() * head.out_features <= LOGIT_BYTES:
        return None
    hidden: Tensor = model_any.base_model(
        input_ids=ids, attention_mask=inputs["attention_mask"]
    ).last_hidden_state
    return language_model_loss_from_hidden(hidden, head, inputs["labels"])


@torch.no_grad()
def _gives_the_model_s_logits(model: nn.Module, head: LinearCrossEntropy) -> bool:
    model_any: Any = model
    was_training = model.training
    model.eval()
    try:
        ids = torch.arange(_PROBE_TOKENS, device=head.weight.device)[None] % head.out_features
        out = model_any.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))
        hidden = getattr(out, "last_hidden_state", None)
        if hidden is None or hidden.shape != (1, _PROBE_TOKENS, head.in_features):
            return False
        logits = model_any(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        got = head(hidden)
    finally:
        model.train(was_training)
    scale = float(logits.abs().max())
    return got.shape == logits.shape and float((got - logits).abs().max()) <= _TOLERANCE * scale
