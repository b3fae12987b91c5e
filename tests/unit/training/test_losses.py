"""Per-example losses depend on their own record alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.training.losses import IGNORE_INDEX, classification_loss, language_model_loss


def _text_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (3, 7), generator=generator)
    labels[1, 3:] = IGNORE_INDEX
    labels[2, :] = IGNORE_INDEX
    return logits, labels


def test_classification_loss_equals_each_records_cross_entropy() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 2, 1, 1])
    losses = classification_loss(logits, labels)
    assert losses.shape == (4,)
    for i in range(4):
        assert losses[i].item() == pytest.approx(cross_entropy(logits[i], labels[i]).item(), rel=1e-6)


def test_language_model_loss_divides_by_the_records_own_token_count() -> None:
    logits, labels = _text_batch()
    losses = language_model_loss(logits, labels)
    # Record 1 counts its tokens 1 and 2 only.
    expected = cross_entropy(logits[1, :2], labels[1, 1:3])
    assert losses[1].item() == pytest.approx(expected.item(), rel=1e-12)
    assert losses[0].item() == pytest.approx(cross_entropy(logits[0, :-1], labels[0, 1:]).item(), rel=1e-12)


def test_record_without_counted_tokens_has_zero_loss_and_gradient() -> None:
    logits, labels = _text_batch()
    logits.requires_grad_(True)
    losses = language_model_loss(logits, labels)
    assert losses[2].item() == 0.0
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert bool((gradient[2] == 0).all())
    assert bool((gradient[0] != 0).any())


def test_language_model_loss_is_untouched_by_other_records() -> None:
    logits, labels = _text_batch()
    together = language_model_loss(logits, labels)
    changed = labels.clone()
    changed[1] = IGNORE_INDEX
    assert torch.equal(language_model_loss(logits, changed)[0], together[0])
    assert torch.equal(language_model_loss(logits[:1], labels[:1]), together[:1])


def test_half_precision_logits_give_float32_losses() -> None:
    logits, labels = _text_batch()
    assert language_model_loss(logits.bfloat16(), labels).dtype == torch.float32
    assert classification_loss(logits[:, 0].bfloat16(), torch.tensor([0, 1, 2])).dtype == torch.float32


@pytest.mark.parametrize(
    ("loss", "shape"),
    [(classification_loss, (4, 2, 3)), (language_model_loss, (4, 3))],
    ids=["class", "text"],
)
def test_wrong_shapes_are_refused(loss: object, shape: tuple[int, ...]) -> None:
    assert callable(loss)
    with pytest.raises(InvalidInputError, match="labels shape"):
        loss(torch.zeros(shape), torch.zeros(4, dtype=torch.long))
