"""A local Hugging Face model and its tokenizer as the start of a private run. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dp_flash_attention.core.errors import DependencyMissingError, InvalidInputError
from dp_flash_attention.training.fused_loss import fuse_head

_HEAD_SEED = 0  # a new head's initial weights are public


@dataclass(frozen=True, kw_only=True)
class HuggingFaceTokenizer:
    """A tokenizer of the ``transformers`` library behind the ``Tokenizer`` protocol.

    Attributes:
        wrapped: The tokenizer.
        pad_id: Its padding id, or its end-of-text id if it has none.
    """

    wrapped: Any
    pad_id: int

    @property
    def vocab_size(self) -> int:
        """Number of different ids."""
        return len(self.wrapped)

    def encode(self, text: str, max_length: int) -> list[int]:
        """Returns the ids with the tokenizer's special tokens, cut to ``max_length``; at least one."""
        ids: list[int] = self.wrapped(text, truncation=True, max_length=max_length)["input_ids"]
        return ids or [self.pad_id]


def load_tokenizer(directory: Path) -> HuggingFaceTokenizer:
    """Reads a tokenizer from a local directory.

    Raises:
        InvalidInputError: If the directory holds none, or it can neither pad nor end a text.
        DependencyMissingError: If ``transformers`` is not installed.
    """
    transformers = _transformers()
    wrapped = _from_directory(transformers.AutoTokenizer, directory)
    pad_id = wrapped.pad_token_id if wrapped.pad_token_id is not None else wrapped.eos_token_id
    if pad_id is None:
        raise InvalidInputError(
            "--model",
            str(directory),
            bound="a directory whose tokenizer has a padding or an end-of-text token",
            remedy="Set pad_token in its tokenizer_config.json.",
        )
    return HuggingFaceTokenizer(wrapped=wrapped, pad_id=int(pad_id))


def load_model(directory: Path, *, pad_id: int, num_classes: int | None) -> nn.Module:
    """Reads a model from a local directory, in float32.

    Args:
        directory: As ``save_pretrained`` writes it.
        pad_id: The tokenizer's padding id.
        num_classes: K for a classifier, whose head is new unless the directory has one of that size; None for a
            language model.

    Raises:
        InvalidInputError: If the directory holds no such model.
        DependencyMissingError: If ``transformers`` is not installed.
    """
    transformers = _transformers()
    kind: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {}
    if num_classes is not None:
        kind = transformers.AutoModelForSequenceClassification
        options = {"num_labels": num_classes, "ignore_mismatched_sizes": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_HEAD_SEED)
        model: nn.Module = _from_directory(kind, directory, dtype=torch.float32, **options)
    config: Any = model.config
    config.pad_token_id = pad_id  # a classifier finds the last real token by it
    config.use_cache = False
    if num_classes is None:
        fuse_head(model)
    return model


def max_positions(directory: Path) -> int | None:
    """Returns the longest sequence the model was built for, if its configuration says so.

    Raises:
        InvalidInputError: If the directory holds no configuration.
        DependencyMissingError: If ``transformers`` is not installed.
    """
    config = _from_directory(_transformers().AutoConfig, directory)
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return None if length is None else int(length)


def _from_directory(kind: Any, directory: Path, **options: Any) -> Any:
    if not directory.is_dir():
        raise InvalidInputError(
            "--model",
            str(directory),
            bound="a local directory; nothing is downloaded",
            remedy="Save model and tokenizer there with save_pretrained.",
        )
    try:
        return kind.from_pretrained(str(directory), local_files_only=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInputError(
            "--model",
            str(directory),
            bound=f"a directory that transformers' {kind.__name__} can read ({_first_line(error)})",
            remedy="Save model and tokenizer there with save_pretrained.",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise DependencyMissingError(
            "--model needs transformers, which is not installed. Run: pip install 'dp-flash-attention[hf]'"
        ) from error
    return transformers
