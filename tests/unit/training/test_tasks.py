from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training.evaluation import (
    ClassifierEvaluation,
    ConfusionEvaluation,
    ReleaseTerms,
)
from dp_flash_attention.training.tasks import load_built_in_model, table_task, tabular_logits

TERMS = ReleaseTerms(epsilon=5.0, delta=1e-6, key=TestKey("tasks"))


@pytest.mark.parametrize(("classes", "kind"), [(2, ClassifierEvaluation), (3, ConfusionEvaluation)])
def test_a_table_becomes_a_task_with_the_evaluation_that_fits(
    small_table: Any, classes: int, kind: type
) -> None:
    task = table_task(small_table(num_records=600, classes=classes), label="kind")
    assert task.classes == tuple(f"class{k}" for k in range(classes))
    assert "assumed public" in task.public_statements[0]
    assert not task.is_public_data
    model = task.build_model().train()
    assert isinstance(task.evaluate(model, task.dataset, TERMS), kind)
    assert 0.0 <= task.exact_scores(model, task.dataset)["accuracy"] <= 1.0
    assert model.training, "an evaluation leaves the mode as it was"
    rows = task.dataset.take(torch.arange(4))
    assert task.loss_fn(model, rows).shape == (4,)


def test_initial_weights_are_public_and_the_same_each_time(small_table: Any) -> None:
    task = table_task(small_table(), label="kind")
    torch.manual_seed(1)
    first = task.build_model().state_dict()
    torch.manual_seed(2)
    second = task.build_model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_companions_build_the_model_again(small_table: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_model

    task = table_task(small_table(), label="kind")
    model = task.build_model()
    with torch.no_grad():
        model.head.weight.normal_()
    save_model(model, str(tmp_path / "model.safetensors"))
    task.write_companions(tmp_path)
    rows = task.dataset.take(torch.arange(5))
    again = load_built_in_model(tmp_path)
    assert not again.training
    assert torch.equal(tabular_logits(again, rows), tabular_logits(model.eval(), rows))


@pytest.mark.parametrize("text", [None, "{", "{}", '{"architecture": "Other", "config": {}}', "[]"])
def test_another_directory_holds_no_model(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "model.json").write_text(text)
    with pytest.raises(InvalidInputError, match="run directory"):
        load_built_in_model(tmp_path)


def test_the_description_is_json(small_table: Any, tmp_path: Path) -> None:
    table_task(small_table(), label="kind").write_companions(tmp_path)
    assert json.loads((tmp_path / "model.json").read_text())["architecture"] == "TabularTransformer"
