"""Text tasks end to end on small models, built-in and from Hugging Face."""

import json
import math
from dataclasses import replace

import pytest
import torch

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training import text_tasks
from dp_flash_attention.training.choices import RunRequest
from dp_flash_attention.training.evaluation import ReleaseTerms
from dp_flash_attention.training.pipeline import run_private_training
from dp_flash_attention.training.tasks import load_built_in_model
from dp_flash_attention.training.text_tasks import text_logits, text_task

REQUEST = RunRequest(epsilon=4.0, num_steps=3, expected_batch_size=16, holdout_prob=0.2)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small = replace(text_tasks.BUILT_IN_DEFAULTS, d_model=16, num_heads=2, num_layers=1)
    monkeypatch.setattr(text_tasks, "BUILT_IN_DEFAULTS", small)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("gpt2")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={**{c: i for i, c in enumerate(letters)}, "<|end|>": 256}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    wrapped.save_pretrained(directory)
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=256, eos_token_id=256
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def test_a_built_in_classifier_of_texts(small_texts, tmp_path):
    task = text_task(small_texts, label="mood", max_length=16)
    outcome = run_private_training(task, REQUEST, out_dir=tmp_path / "run", test_key=TestKey(1))
    assert set(outcome.certificate.to_dict()["estimated"]) == {"auc", "auc_standard_error_of_noise"}
    rows = task.dataset.take(torch.arange(4))
    assert text_logits(load_built_in_model(outcome.path), rows).shape == (4, 2)


def test_a_built_in_language_model(small_texts, tmp_path):
    task = text_task(small_texts, text="text", max_length=16)
    outcome = run_private_training(task, REQUEST, out_dir=tmp_path / "run", test_key=TestKey(1))
    estimated = outcome.certificate.to_dict()["estimated"]
    # Three noisy steps from a near uniform guess: the loss is near ln 259 = 5.56, up to the release's noise.
    assert estimated["nats_per_token"] == pytest.approx(math.log(259), abs=2.5)
    rows = task.dataset.take(torch.arange(4))
    assert text_logits(load_built_in_model(outcome.path), rows).shape == (4, 16, 259)


@pytest.mark.parametrize("label", [None, "mood"])
def test_a_hugging_face_model_is_trained_and_loads_again_with_its_library(gpt2, small_texts, tmp_path, label):
    transformers = pytest.importorskip("transformers")
    task = text_task(small_texts, text="text", label=label, model=gpt2)
    outcome = run_private_training(task, REQUEST, out_dir=tmp_path / "run", test_key=TestKey(1))
    kind = (
        transformers.AutoModelForCausalLM
        if label is None
        else transformers.AutoModelForSequenceClassification
    )
    trained = kind.from_pretrained(outcome.path)
    start = task.build_model()
    rows = task.dataset.take(torch.arange(6))
    trained.eval()
    start.eval()
    # What was loaded is what was trained: it differs from the start, and predicts as the run evaluated it.
    assert not torch.allclose(text_logits(trained, rows), text_logits(start, rows))
    from safetensors.torch import load_file

    released = load_file(outcome.path / "model.safetensors")
    loaded = trained.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in released.items())
    assert transformers.AutoTokenizer.from_pretrained(outcome.path)("good")["input_ids"]
    assert any("made without these records" in line for line in outcome.certificate.to_dict()["assumed"])
    # The certificate travels: it says which model and where from, and nothing of this machine's folders.
    text = (outcome.path / "certificate.json").read_text()
    assert outcome.certificate.to_dict()["task"]["tokenizer"] == gpt2.name
    assert not [folder for folder in (gpt2.parent, tmp_path, small_texts.parent) if str(folder) in text]
    # The run's own record keeps the whole path: another model of that name does not resume it.
    assert str(gpt2) in (outcome.path / "run.json").read_text()


def test_the_new_head_of_a_classifier_is_the_same_every_time(gpt2, small_texts):
    task = text_task(small_texts, text="text", label="mood", model=gpt2)
    torch.manual_seed(1)
    first = task.build_model().state_dict()
    torch.manual_seed(2)
    second = task.build_model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_released_loss_is_that_of_the_cut_tokens_plus_noise(small_texts):
    task = text_task(small_texts, text="text", max_length=16)
    model = task.build_model()
    terms = ReleaseTerms(epsilon=1000.0, delta=0.1, key=TestKey(3))  # next to no noise
    released = task.evaluate(model, task.dataset, terms).estimates()["nats_per_token"]
    assert released == pytest.approx(task.exact_scores(model, task.dataset)["nats_per_token"], rel=2e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "nowhere"}, "nothing is downloaded"),
        ({"max_length": 1}, "at least 2"),
    ],
)
def test_wrong_options_are_named(small_texts, tmp_path, options, said):
    if "model" in options:
        options = {"model": tmp_path / options["model"]}
    with pytest.raises(InvalidInputError, match=said):
        text_task(small_texts, text="text", **options)


def test_a_directory_without_a_model_and_a_length_beyond_its_positions_are_refused(
    gpt2, small_texts, tmp_path
):
    with pytest.raises(InvalidInputError, match="can read"):
        text_task(small_texts, text="text", model=tmp_path)
    with pytest.raises(InvalidInputError, match="at most 32"):
        text_task(small_texts, text="text", model=gpt2, max_length=33)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "no such model"}))
    with pytest.raises(InvalidInputError, match="can read"):
        text_task(small_texts, text="text", model=broken)
