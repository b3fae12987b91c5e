"""Tasks over texts: classify them, or model their language, with a built-in or a Hugging Face model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.training.choices import TaskDefaults
from dp_flash_attention.training.data.split import TakesIndices
from dp_flash_attention.training.data.texts import ByteTokenizer, TextDataset, Tokenizer, read_texts
from dp_flash_attention.training.evaluation import (
    Evaluation,
    ReleaseTerms,
    evaluate_language_model,
    exact_language_model,
    token_losses,
)
from dp_flash_attention.training.fused_loss import fused_language_model_loss
from dp_flash_attention.training.losses import classification_loss, language_model_loss
from dp_flash_attention.training.models import TextTransformer, TextTransformerConfig
from dp_flash_attention.training.tasks import Classification, Task, public_generator, write_model_json

BUILT_IN_DEFAULTS = TaskDefaults(
    epochs=10.0, l2_clip_norm=1.0, learning_rate=2e-3, microbatch_size=16, d_model=128, num_layers=2
)
"""A small model from scratch: narrow, because noise grows with the number of parameters."""

FINE_TUNING_DEFAULTS = TaskDefaults(epochs=3.0, l2_clip_norm=1.0, learning_rate=5e-4, microbatch_size=8)
"""For a trained model: few passes at a rate above that of ordinary fine-tuning (Li et al. 2022, section 3)."""

_DEFAULT_MAX_LENGTH = 128
_EVALUATION_ROWS = 16


def text_task(
    path: Path,
    *,
    text: str | None = None,
    label: str | None = None,
    model: Path | None = None,
    max_length: int | None = None,
) -> Task:
    """Classifies texts by their label, or without a label models their language.

    Args:
        path: See ``read_texts``.
        text: The table's column of texts.
        label: The table's column of classes; None for a language model.
        model: Directory of a Hugging Face model and tokenizer to start from; None for the built-in one.
        max_length: Tokens at which a text is cut; None takes 128, or less if the model has fewer positions.

    Raises:
        DataError: If the file cannot be used.
        InvalidInputError: If the model's directory cannot be used, or ``max_length`` does not fit.
        DependencyMissingError: If a package is missing.
    """
    texts = read_texts(path, text=text, label=label)
    length = _max_length(max_length, model)
    tokenizer, build_model, companions = _built_in(length, len(texts.classes))
    if model is not None:
        tokenizer, build_model, companions = _from_hugging_face(model, len(texts.classes))
    classes, origin = texts.classes, "the built-in bytes" if model is None else str(model)
    settings = {"tokenizer": origin, "max_length": length, "classes": list(classes)}
    common: dict[str, Any] = {
        "dataset": TextDataset(texts, tokenizer, max_length=length),
        "build_model": build_model,
        "defaults": BUILT_IN_DEFAULTS if model is None else FINE_TUNING_DEFAULTS,
        "classes": classes,
        "public_statements": _public_statements(label, classes, length, model),
        "settings": settings,
        "certified_settings": settings if model is None else {**settings, "tokenizer": model.resolve().name},
        "write_companions": companions,
    }
    if classes:
        kind = Classification(text_logits, num_classes=len(classes))
        name = f"Column '{label}' of {path.name}, from its texts"
        return Task(
            name=name,
            loss_fn=text_classification_loss,
            evaluate=kind.evaluate,
            exact_scores=kind.exact_scores,
            **common,
        )
    language_model = _LanguageModel(tokenizer.vocab_size, length)
    return Task(
        name=f"Language model of {path.name}",
        loss_fn=text_language_model_loss,
        evaluate=language_model.evaluate,
        exact_scores=language_model.exact_scores,
        **common,
    )


def text_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns the logits of encoded texts: [B, K] of a classifier, [B, T, V] of a language model."""
    out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    logits: Tensor = getattr(out, "logits", out)
    return logits


def text_classification_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Cross entropy of each text, shape [B], in nats."""
    return classification_loss(text_logits(model, inputs), inputs["label"])


def text_language_model_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean next-token cross entropy of each text, shape [B], in nats."""
    losses_B = fused_language_model_loss(model, inputs)
    return (
        losses_B
        if losses_B is not None
        else language_model_loss(text_logits(model, inputs), inputs["labels"])
    )


class _LanguageModel:
    """Evaluates next-token prediction. A token's loss is cut off at twice that of a uniform guess."""

    def __init__(self, vocab_size: int, max_length: int) -> None:
        self._loss_bound, self._max_tokens = 2.0 * math.log(vocab_size), max_length - 1

    def evaluate(self, model: nn.Module, dataset: TakesIndices, terms: ReleaseTerms) -> Evaluation:
        losses, counts = self._losses(model, dataset, self._loss_bound)
        return evaluate_language_model(
            losses, counts, terms, loss_bound=self._loss_bound, max_tokens=self._max_tokens
        )

    def exact_scores(self, model: nn.Module, dataset: TakesIndices) -> dict[str, Any]:
        return exact_language_model(*self._losses(model, dataset, math.inf))

    @torch.no_grad()
    def _losses(self, model: nn.Module, dataset: TakesIndices, bound: float) -> tuple[Tensor, Tensor]:
        was_training = model.training
        model.eval()
        losses, counts = [torch.empty(0)], [torch.empty(0, dtype=torch.long)]
        for start in range(0, len(dataset), _EVALUATION_ROWS):
            inputs = dataset.take(torch.arange(start, min(start + _EVALUATION_ROWS, len(dataset))))
            loss, count = token_losses(text_logits(model, inputs), inputs["labels"], loss_bound=bound)
            losses.append(loss)
            counts.append(count)
        model.train(was_training)
        return torch.cat(losses), torch.cat(counts)


def _max_length(asked: int | None, model: Path | None) -> int:
    limit = None
    if model is not None:
        from dp_flash_attention.training.hugging_face import max_positions

        limit = max_positions(model)
    length = min(_DEFAULT_MAX_LENGTH, limit or _DEFAULT_MAX_LENGTH) if asked is None else asked
    if length < 2 or (limit is not None and length > limit):
        raise InvalidInputError(
            "max_length",
            length,
            bound="at least 2" + ("" if limit is None else f" and at most {limit}, the model's positions"),
            remedy="Change --max-length.",
        )
    return length


Parts = tuple[Tokenizer, Callable[[], nn.Module], Callable[[Path], None]]


def _built_in(max_length: int, num_classes: int) -> Parts:
    config = TextTransformerConfig(
        vocab_size=ByteTokenizer.vocab_size,
        seq_len=max_length,
        d_model=BUILT_IN_DEFAULTS.d_model,
        num_heads=BUILT_IN_DEFAULTS.num_heads,
        num_layers=BUILT_IN_DEFAULTS.num_layers,
        num_classes=num_classes or None,
    )
    description = {"architecture": "TextTransformer", "config": vars(config), "tokenizer": "UTF-8 bytes"}
    return (
        ByteTokenizer(),
        lambda: TextTransformer(config, generator=public_generator()),
        lambda directory: write_model_json(directory, description),
    )


def _from_hugging_face(directory: Path, num_classes: int) -> Parts:
    from dp_flash_attention.training.hugging_face import load_model, load_tokenizer

    tokenizer = load_tokenizer(directory)

    def build() -> nn.Module:
        return load_model(directory, pad_id=tokenizer.pad_id, num_classes=num_classes or None)

    def companions(out: Path) -> None:
        # With these beside model.safetensors, from_pretrained(out) loads the trained model.
        config: Any = build().config
        config.save_pretrained(str(out))
        tokenizer.wrapped.save_pretrained(str(out))

    return tokenizer, build, companions


def _public_statements(
    label: str | None, classes: tuple[str, ...], max_length: int, model: Path | None
) -> tuple[str, ...]:
    statements = [f"A record is one text; texts are cut at {max_length} tokens, a public length."]
    if classes:
        statements.append(f"The classes {list(classes)} of '{label}' are public (assumed).")
    if model is not None:
        statements.append(
            f"Model and tokenizer in {model.resolve().name} are public, or were made without these records (assumed)."
        )
    return tuple(statements)
