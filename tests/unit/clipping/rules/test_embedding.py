from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dp_flash_attention.clipping.contributions import EmbeddingContribution
from dp_flash_attention.clipping.rules import embedding
from dp_flash_attention.clipping.rules.embedding import EmbeddingRule

V, D = 9, 4


class Scaled(nn.Embedding):
    """As in several Hugging Face models: the look-up is at the base of other code."""

    def forward(self, ids: Tensor) -> Tensor:
        return 2.5 * super().forward((ids + 1) % V)


class OutsideItsLookup(nn.Embedding):
    """Reads the table in a second way, which no rule sees."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + F.embedding(ids, self.weight[: V - 1])


@pytest.mark.parametrize("shape", [(4, 2), (4, 7), (4, 3, 5), (1, 7)])
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_repeated_tokens_and_padding_are_exact(
    check_exact: Any, shape: tuple[int, ...], padding_idx: Any
) -> None:
    ids = torch.randint(0, 5, shape)
    ids[..., -1] = V - 1  # the padding index -1
    check_exact(nn.Embedding(V, D, padding_idx=padding_idx), ids)


def test_a_subclass_that_computes_its_indices_is_exact(check_exact: Any) -> None:
    check_exact(Scaled(V, D), torch.randint(0, 5, (4, 7)))


def test_a_table_read_beside_its_look_up_is_refused(check_exact: Any) -> None:
    with pytest.raises(ValueError, match="outside the module that owns it"):
        check_exact(OutsideItsLookup(V, D), torch.randint(0, 5, (4, 7)))


def test_tokens_credited_to_other_rows_are_seen(
    check_fault_is_seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turned(*, ids_BT: Tensor, **rest: Any) -> EmbeddingContribution:
        return EmbeddingContribution(ids_BT=ids_BT.flip(1), **rest)

    monkeypatch.setattr(embedding, "EmbeddingContribution", turned)
    check_fault_is_seen(nn.Embedding(V, D), torch.randint(0, 5, (4, 7)))


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_look_ups_with_side_effects_or_batch_counts_have_no_rule(options: dict[str, Any]) -> None:
    assert not EmbeddingRule().matches(nn.Embedding(V, D, **options))
