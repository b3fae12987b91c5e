"""Exactness on the architectures of ``transformers``, small, with random weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dp_flash_attention.clipping import ClippedGradientAccumulator, check_examples_independent
from dp_flash_attention.clipping.reference import clipped_sum, per_example_gradients

transformers = pytest.importorskip("transformers")

VOCABULARY, EXAMPLES, LENGTH = 97, 5, 13  # odd length; padding differs for every example
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SMALL, "vocab_size": VOCABULARY, "intermediate_size": 40, "max_position_embeddings": 64}
GROUPED = {**DECODER, "num_key_value_heads": 2}
Loss = Callable[[dict[str, Tensor]], Tensor]


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=24, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama_tied() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True))


def mistral() -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED))


def gemma() -> nn.Module:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**GROUPED, head_dim=6))


def qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=6))


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**DECODER, **NO_DROPOUT))


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        **SMALL,
        vocab_size=VOCABULARY,
        ffn_dim=40,
        word_embed_proj_dim=24,
        max_position_embeddings=64,
        dropout=0.0,
    )
    return transformers.OPTForCausalLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        **SMALL, **NO_DROPOUT, intermediate_size=40, image_size=12, patch_size=4, num_labels=3
    )
    return transformers.ViTForImageClassification(config)


def language_loss(model: nn.Module) -> Loss:
    def loss_fn(batch: dict[str, Tensor]) -> Tensor:
        logits = model(**batch).logits[:, :-1]
        losses = F.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="none")
        mask = batch["attention_mask"][:, 1:].to(losses.dtype)
        return (losses * mask).sum(1) / mask.sum(1)

    return loss_fn


def image_loss(model: nn.Module) -> Loss:
    return lambda batch: model(**batch).logits.logsumexp(-1) + batch["pixel_values"].mean((1, 2, 3))


def text_batch(dtype: torch.dtype) -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (EXAMPLES, LENGTH))
    lengths = torch.arange(LENGTH, LENGTH - EXAMPLES, -1)
    return {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < lengths[:, None]).long()}


def image_batch(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(EXAMPLES, 3, 12, 12, dtype=dtype)}


TEXT_MODELS = [gpt2, llama_tied, mistral, gemma, qwen3, bert, opt]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("build", [*TEXT_MODELS, vit], ids=lambda build: build.__name__)
def test_norms_and_clipped_sums_are_exact(
    build: Callable[[], nn.Module], dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    model = build().to(dtype).train()
    loss_fn = image_loss(model) if build is vit else language_loss(model)
    batch = image_batch(dtype) if build is vit else text_batch(dtype)
    gradients = per_example_gradients(model, loss_fn, batch, batch_size=EXAMPLES)
    _, norms = clipped_sum(gradients, l2_clip_norm=1.0)
    clip = float(norms.median())
    expected, _ = clipped_sum(gradients, l2_clip_norm=clip)
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=clip)
    check_examples_independent(accumulator, model, loss_fn, batch)
    result = accumulator.add(lambda: loss_fn(batch), batch_size=EXAMPLES)
    assert list(accumulator.sums) == [name for name, _ in model.named_parameters()]
    assert float(((result.norms - norms) / norms).abs().max()) < tolerance
    # Relative to C: some gradients (key biases under softmax) are exactly zero in theory.
    assert max(float((accumulator.sums[k] - expected[k]).abs().max()) for k in expected) < tolerance * clip


def test_gradient_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    model = llama_tied().double().train()
    batch, loss_fn = text_batch(torch.float64), language_loss(model)
    norms = []
    for _ in range(2):
        accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1.0)
        norms.append(accumulator.add(lambda: loss_fn(batch), batch_size=EXAMPLES).norms)
        model.activation_checkpointing_enable()
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-12, atol=0.0)
