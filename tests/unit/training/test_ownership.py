from __future__ import annotations

import pytest
import torch
from torch import nn

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.training.ownership import check_same_parameters


def test_groups_and_order_do_not_matter() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [{"params": model[1].parameters()}, {"params": model[0].parameters(), "lr": 0.1}]
    check_same_parameters(model, torch.optim.SGD(groups, lr=1.0), dict(model.named_parameters()))


def test_long_lists_are_cut() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    with pytest.raises(InvalidInputError, match=r"0\.weight, 0\.bias, 1\.weight, 1\.bias and 2 more"):
        check_same_parameters(
            model, torch.optim.SGD(model[3].parameters(), lr=1.0), dict(model.named_parameters())
        )


def test_something_that_is_no_optimizer_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="takes one step for each gradient"):
        check_same_parameters(nn.Linear(2, 2), object(), {})  # type: ignore[arg-type]
