from __future__ import annotations

import json

import pytest
import torch

from dp_flash_attention.accounting import GaussianRelease, epsilon
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training.evaluation import (
    ConfusionEvaluation,
    ReleaseTerms,
    evaluate_confusion,
    read_evaluation,
)
from dp_flash_attention.training.evaluation.confusion import confusion_counts

TERMS = ReleaseTerms(epsilon=2.0, delta=1e-6, key=TestKey("confusion"))
K = 4


def classified(num_records: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(num_records) % K
    return torch.randn(num_records, K) + 3.0 * torch.nn.functional.one_hot(labels, K), labels


def test_one_record_is_one_count_in_its_own_cell() -> None:
    logits, labels = classified(60)
    whole = confusion_counts(logits, labels)
    for index in range(0, 60, 7):
        others = torch.arange(60) != index
        change = whole - confusion_counts(logits[others], labels[others])
        assert change[labels[index], logits[index].argmax()] == 1.0
        assert change.norm() == 1.0


def test_figures_are_near_the_exact_ones_and_the_noise_fits_the_price() -> None:
    logits, labels = classified(20_000)
    released = evaluate_confusion(logits, labels, TERMS)
    assert epsilon(GaussianRelease(noise_multiplier=released.noise_stddev), delta=1e-6) <= 2.0
    exact = float((logits.argmax(1) == labels).double().mean())
    assert released.accuracy == pytest.approx(exact, abs=6 * released.accuracy_standard_error)
    assert released.total == pytest.approx(20_000, abs=6 * K * released.noise_stddev)
    assert released.largest_class_share == pytest.approx(0.25, abs=0.01)


def of(counts: list[list[float]], stddev: float = 1.0) -> ConfusionEvaluation:
    return ConfusionEvaluation(
        epsilon=1.0, delta=1e-6, noise_stddev=stddev, counts=tuple(tuple(row) for row in counts)
    )


def test_the_standard_error_is_the_spread_that_noise_makes() -> None:
    base, stddev = torch.tensor([[50.0, 10, 5], [8, 60, 9], [3, 7, 40]], dtype=torch.float64), 2.0
    accuracies = [
        of((base + stddev * torch.randn(3, 3, dtype=torch.float64)).tolist()).accuracy for _ in range(3000)
    ]
    expected = of(base.tolist(), stddev).accuracy_standard_error
    assert float(torch.tensor(accuracies).std()) == pytest.approx(expected, rel=0.1)


def test_noise_that_hides_everything_gives_no_figure_out_of_range() -> None:
    hidden = of([[-5.0, 2.0, 0.0], [1.0, -3.0, 0.0], [0.0, 0.0, -1.0]])
    assert hidden.total == 1.0
    assert hidden.accuracy == 0.0
    assert 0.0 <= hidden.largest_class_share <= 1.0
    assert hidden.accuracy_standard_error <= 0.5


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3, K), torch.zeros(4, dtype=torch.long)),
    ],
)
def test_scores_that_do_not_fit_are_refused(logits: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(InvalidInputError, match="logits"):
        evaluate_confusion(logits, labels, TERMS)


def test_a_record_without_finite_logits_is_one_count_like_any_other() -> None:
    logits = torch.tensor([[torch.nan] * K, [torch.nan, 1.0, *[0.0] * (K - 2)]])
    counts = confusion_counts(logits, torch.tensor([1, 1]))
    assert (counts.sum(), counts[1, 0], counts[1, 1]) == (2, 1, 1)
    evaluate_confusion(logits, torch.tensor([1, 1]), TERMS)


def test_a_release_comes_back_from_json() -> None:
    released = evaluate_confusion(*classified(50), TERMS)
    assert read_evaluation(json.loads(json.dumps(released.to_dict()))) == released
    assert "most frequent class alone" in released.summary()
