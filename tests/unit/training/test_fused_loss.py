"""The fused head in Hugging Face models: put in where it gives the model's numbers, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_attention.clipping import ClippedGradientAccumulator, LinearCrossEntropy
from dp_flash_attention.training import fused_loss
from dp_flash_attention.training.fused_loss import fuse_head, fused_language_model_loss
from dp_flash_attention.training.hugging_face import load_model
from dp_flash_attention.training.losses import language_model_loss, language_model_loss_from_hidden
from dp_flash_attention.training.text_tasks import text_language_model_loss, text_logits

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=32, n_embd=24, n_layer=1, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=False))


def capped() -> Any:
    # Caps its logits with a tanh after the head.
    config = transformers.Gemma2Config(
        **SMALL, head_dim=6, num_key_value_heads=2, final_logit_softcapping=0.01
    )
    return transformers.Gemma2ForCausalLM(config)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 97, (4, 11))
    mask = torch.arange(11)[None, :] < torch.tensor([11, 7, 3, 5])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_loss, "LOGIT_BYTES", 0)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("build", [gpt2, llama])
def test_losses_norms_and_sums_are_those_with_logits(build: Any) -> None:
    model, inputs = build(), batch()
    names = list(dict(model.named_parameters()))
    found = []
    for fused in (False, True):
        if fused:
            assert fuse_head(model)
            assert list(dict(model.named_parameters())) == names
            assert fused_language_model_loss(model, inputs) is not None
        accumulator = ClippedGradientAccumulator(model, l2_clip_norm=0.5)
        seen = accumulator.add(lambda: text_language_model_loss(model, inputs), batch_size=4)
        found.append((seen, accumulator.sums))
    (plain, plain_sums), (ours, our_sums) = found
    torch.testing.assert_close(ours.losses, plain.losses)
    torch.testing.assert_close(ours.norms, plain.norms, rtol=1e-4, atol=0)
    for name, total in plain_sums.items():
        torch.testing.assert_close(our_sums[name], total, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("always")
def test_a_model_that_changes_its_logits_keeps_its_head() -> None:
    model = capped()
    assert not fuse_head(model)
    assert type(model.get_output_embeddings()) is nn.Linear
    assert fused_language_model_loss(model, batch()) is None


def test_a_model_without_output_embeddings_keeps_its_loss() -> None:
    assert fused_language_model_loss(nn.Linear(2, 2), batch()) is None


def test_logits_that_fit_are_kept() -> None:
    model = gpt2()
    assert fuse_head(model)
    assert fused_language_model_loss(model, batch()) is None


@pytest.mark.usefixtures("always")
def test_a_loaded_language_model_has_it_and_saves_as_before(tmp_path: Path) -> None:
    gpt2().save_pretrained(str(tmp_path / "a"))
    model: Any = load_model(tmp_path / "a", pad_id=1, num_classes=None)
    assert type(model.lm_head) is LinearCrossEntropy
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(str(tmp_path / "b"))
    again: Any = transformers.GPT2LMHeadModel.from_pretrained(str(tmp_path / "b"))
    ids = batch()["input_ids"]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_loss_from_hidden_states_shifts_and_checks() -> None:
    head, hidden, inputs = LinearCrossEntropy(6, 97), torch.randn(4, 11, 6), batch()
    got = language_model_loss_from_hidden(hidden, head, inputs["labels"])
    torch.testing.assert_close(got, language_model_loss(head(hidden), inputs["labels"]))
    with pytest.raises(ValueError, match="labels shape"):
        language_model_loss_from_hidden(hidden, head, inputs["labels"][:, 1:])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        language_model_loss_from_hidden(hidden, head, inputs["labels"] + 97)
    assert text_logits(gpt2(), inputs).shape == (4, 11, 97)
