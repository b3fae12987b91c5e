from __future__ import annotations

import math

import pytest
import torch

from dp_flash_attention.training.evaluation import exact_classification, exact_language_model


def test_two_classes_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 2.0], [0.0, 0.5]])
    figures = exact_classification(logits, torch.tensor([1, 0, 1, 0]))
    assert figures["accuracy"] == 0.75
    assert figures["auc"] == 1.0
    expected = sum(math.log1p(math.exp(-margin)) for margin in (1.0, 1.0, 2.0, -0.5)) / 4
    assert figures["log_loss"] == pytest.approx(expected)
    assert set(exact_classification(torch.eye(3), torch.arange(3))) == {"log_loss", "accuracy"}


def test_a_language_model_by_hand() -> None:
    figures = exact_language_model(torch.tensor([2.0, 4.0]), torch.tensor([1, 2]))
    assert figures == {"nats_per_token": 2.0, "perplexity": pytest.approx(math.e**2)}
    assert exact_language_model(torch.zeros(1), torch.zeros(1, dtype=torch.long))["nats_per_token"] == 0.0
