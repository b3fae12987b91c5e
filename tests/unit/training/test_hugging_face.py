from __future__ import annotations

import builtins
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dp_flash_attention.core.errors import DependencyMissingError, InvalidInputError
from dp_flash_attention.training import hugging_face
from dp_flash_attention.training.hugging_face import HuggingFaceTokenizer, load_model, load_tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(str(path))
    return path


def test_a_new_head_has_public_weights_and_leaves_the_callers_generator_alone(saved_model: Path) -> None:
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        model: Any = load_model(saved_model, pad_id=3, num_classes=4)
        assert torch.equal(state, torch.get_rng_state())
        heads.append(model.score.weight.detach().clone())
        assert (model.config.pad_token_id, model.config.use_cache, model.dtype) == (3, False, torch.float32)
    assert heads[0].shape == (4, 8)
    assert torch.equal(*heads)


def test_the_longest_sequence_is_read_from_the_configuration(saved_model: Path) -> None:
    assert hugging_face.max_positions(saved_model) == 16


@pytest.mark.parametrize("make", [False, True])
def test_a_directory_without_a_model_is_refused_and_nothing_is_downloaded(tmp_path: Path, make: bool) -> None:
    path = tmp_path / "gpt2"
    if make:
        path.mkdir()
    for load in (
        lambda: load_model(path, pad_id=0, num_classes=None),
        lambda: load_tokenizer(path),
        lambda: hugging_face.max_positions(path),
    ):
        with pytest.raises(InvalidInputError, match="--model"):
            load()


def test_a_tokenizer_pads_with_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for pad, end, expected in ((5, 7, 5), (None, 7, 7), (0, 7, 0)):
        wrapped = SimpleNamespace(pad_token_id=pad, eos_token_id=end)
        monkeypatch.setattr(hugging_face, "_from_directory", lambda *_, w=wrapped, **__: w)
        assert load_tokenizer(tmp_path).pad_id == expected
    nothing = SimpleNamespace(pad_token_id=None, eos_token_id=None)
    monkeypatch.setattr(hugging_face, "_from_directory", lambda *_, **__: nothing)
    with pytest.raises(InvalidInputError, match="pad_token"):
        load_tokenizer(tmp_path)


def test_an_empty_text_is_one_token() -> None:
    tokenizer = HuggingFaceTokenizer(wrapped=lambda *_, **__: {"input_ids": []}, pad_id=9)
    assert tokenizer.encode("", 4) == [9]


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "transformers":
            raise ImportError
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DependencyMissingError, match=r"pip install 'dp-flash-attention\[hf\]'"):
        hugging_face._transformers()
