from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_flash_attention.accounting import GaussianRelease, epsilon
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.noise import TestKey
from dp_flash_attention.training.evaluation import (
    NUM_BINS,
    SCORE_BOUND,
    ClassifierEvaluation,
    ReleaseTerms,
    class_histograms,
    evaluate_classifier,
    exact_auc,
    exact_roc,
    read_evaluation,
)

TERMS = ReleaseTerms(epsilon=2.0, delta=1e-6, key=TestKey("binary"))


def scored(num_records: int, separation: float) -> tuple[Tensor, Tensor]:
    labels = torch.arange(num_records) % 2
    scores = torch.randn(num_records) + separation * (labels - 0.5)
    return torch.stack([torch.zeros(num_records), scores], 1), labels


def histogram(negatives: list[float], positives: list[float], stddev: float = 0.0) -> ClassifierEvaluation:
    return ClassifierEvaluation(
        epsilon=1.0, delta=1e-6, noise_stddev=stddev, negatives=tuple(negatives), positives=tuple(positives)
    )


def test_one_record_is_one_count_in_one_cell() -> None:
    logits, labels = scored(200, 2.0)
    scores = 10 * (logits[:, 1] - logits[:, 0])  # beyond the outer cells too
    whole = class_histograms(scores, labels)
    assert whole.sum() == 200
    for index in range(0, 200, 17):
        others = torch.arange(200) != index
        change = whole - class_histograms(scores[others], labels[others])
        assert sorted(change.flatten().tolist())[-2:] == [0.0, 1.0]
        assert change.norm() == 1.0


def test_counts_beyond_float32_are_exact() -> None:
    """In float32 one record more among 2²⁴ would change nothing, and two more would change two."""
    assert class_histograms(torch.zeros(3), torch.zeros(3, dtype=torch.long)).dtype == torch.float64


def test_scores_fall_into_the_cells_that_the_figure_draws() -> None:
    scores = torch.tensor([-SCORE_BOUND - 5, -SCORE_BOUND, -1e-6, 0.0, SCORE_BOUND - 1e-3, SCORE_BOUND + 5])
    counts = class_histograms(scores, torch.ones(6, dtype=torch.long))
    assert counts[0].sum() == 0
    half = NUM_BINS // 2
    assert {k: v for k, v in enumerate(counts[1].tolist()) if v} == {
        0: 2,
        half - 1: 1,
        half: 1,
        NUM_BINS - 1: 2,
    }


def test_the_noise_fits_the_price_and_is_as_large_as_stated() -> None:
    logits, labels = scored(400, 1.0)
    exact = class_histograms(logits[:, 1], labels).flatten()
    released = evaluate_classifier(logits, labels, TERMS)
    assert epsilon(GaussianRelease(noise_multiplier=released.noise_stddev), delta=1e-6) <= 2.0
    noise = torch.tensor([*released.negatives, *released.positives], dtype=torch.float64) - exact
    # 128 samples: the mean square lies within ±50 % but for 1 in 10⁴, and half the noise would be at 25 %.
    assert 0.5 < float(noise.square().mean()) / released.noise_stddev**2 < 1.6
    assert evaluate_classifier(logits, labels, TERMS) == released
    other = ReleaseTerms(epsilon=2.0, delta=1e-6, key=TestKey("other"))
    assert evaluate_classifier(logits, labels, other) != released


def test_figures_are_near_the_exact_ones_on_many_records() -> None:
    logits, labels = scored(40_000, 2.0)
    released, scores = evaluate_classifier(logits, labels, TERMS), logits[:, 1]
    assert released.auc == pytest.approx(exact_auc(scores, labels), abs=0.005)
    assert released.accuracy == pytest.approx(
        float(((scores > 0) == (labels == 1)).double().mean()), abs=0.01
    )
    assert released.positive_rate == pytest.approx(0.5, abs=0.01)
    assert 0.0 < released.auc_standard_error < 0.01


def test_the_area_by_hand() -> None:
    assert histogram([1, 1], [0, 2]).auc == pytest.approx(0.75)
    assert histogram([2, 0], [0, 2]).auc == 1.0
    assert histogram([0, 2], [2, 0]).auc == 0.0
    scores, labels = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1])
    assert exact_auc(scores, labels) == pytest.approx((2 + 1.5) / 4)
    assert math.isnan(exact_auc(scores, torch.ones(4)))
    assert exact_roc(scores, labels)[-1] == [1.0, 1.0]


def test_the_standard_error_is_the_spread_that_noise_makes() -> None:
    base, stddev = [40.0, 30.0, 20.0, 10.0], 2.0
    draws = torch.randn(4000, 8, dtype=torch.float64) * stddev
    areas = [
        histogram(
            [b + float(d) for b, d in zip(base, row[:4], strict=True)],
            [b + float(d) for b, d in zip(base[::-1], row[4:], strict=True)],
        ).auc
        for row in draws
    ]
    expected = histogram(base, base[::-1], stddev).auc_standard_error
    assert float(torch.tensor(areas).std()) == pytest.approx(expected, rel=0.1)


def test_noise_that_hides_a_class_gives_no_figure_out_of_range() -> None:
    for evaluation in (histogram([-5.0, 1.0], [3.0, 4.0]), histogram([-5.0, 1.0], [-3.0, 1.0])):
        assert (evaluation.auc, evaluation.auc_standard_error) == (0.5, 0.5)
        assert 0.0 <= evaluation.positive_rate <= 1.0
        assert 0.0 <= evaluation.accuracy <= 1.0
    curve = histogram([5.0, -9.0, 7.0], [-1.0, 4.0, -2.0]).roc
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(curve))
    assert (curve[0], curve[-1]) == ([0.0, 0.0], [1.0, 1.0])


def test_an_empty_hold_out_is_released_like_any_other() -> None:
    released = evaluate_classifier(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), TERMS)
    assert any(released.negatives)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.zeros(3, 3), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.long)),
    ],
)
def test_scores_that_do_not_fit_are_refused(logits: Tensor, labels: Tensor) -> None:
    with pytest.raises(InvalidInputError, match="logits"):
        evaluate_classifier(logits, labels, TERMS)


def test_a_record_without_a_finite_score_is_one_count_like_any_other() -> None:
    scores, labels = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0]), torch.tensor([0, 1, 1, 0])
    counts = class_histograms(scores, labels)
    assert counts.sum() == 4
    assert (counts[0, NUM_BINS // 2], counts[1, -1], counts[1, 0]) == (2, 1, 1)
    evaluate_classifier(torch.full((3, 2), torch.nan), torch.zeros(3, dtype=torch.long), TERMS)


def test_a_release_comes_back_from_json() -> None:
    released: Any = evaluate_classifier(*scored(50, 1.0), TERMS)
    assert read_evaluation(json.loads(json.dumps(released.to_dict()))) == released
