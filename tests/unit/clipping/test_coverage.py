from __future__ import annotations

import pytest
from torch import nn

from dp_flash_attention.clipping.coverage import plan_recording
from dp_flash_attention.clipping.rules.linear import LinearRule
from dp_flash_attention.clipping.rules.per_module import PerModuleFallback
from dp_flash_attention.core.errors import InvalidInputError, MissingRuleError


def recorded(model: nn.Module, *fallback: str) -> dict[str, dict[str, str]]:
    return {item.name: item.parameters for item in plan_recording(model, fallback)}


def test_each_trainable_parameter_has_one_name_and_each_module_its_own() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 5, bias=False))
    model[3].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    assert recorded(model) == {
        "0": {"weight": "0.weight"},
        "1": {"weight": "1.weight"},
        "3": {"weight": "0.weight"},
    }


def test_a_fallback_takes_its_children_in_and_leaves_frozen_ones_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    model[1][1].requires_grad_(False)
    items = plan_recording(model, ["1"])
    assert [(item.name, type(item.rule)) for item in items] == [("0", LinearRule), ("1", PerModuleFallback)]
    assert items[1].parameters == {"0.weight": "1.0.weight", "0.bias": "1.0.bias"}
    model[1].requires_grad_(False)
    assert set(recorded(model, "1")) == {"0"}
    assert set(recorded(model, "")) == {""}


def test_every_parameter_without_a_rule_is_listed() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = (nn.Parameter(nn.Linear(2, 2).weight.data) for _ in range(2))

    with pytest.raises(MissingRuleError, match=r"0\.scale \(Own\), 0\.shift \(Own\)"):
        plan_recording(nn.Sequential(Own()), ())
    with pytest.raises(MissingRuleError, match=r"for scale \(Own\)"):
        plan_recording(Own(), ())


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="trainable parameter"):
        plan_recording(nn.Linear(2, 2).requires_grad_(False), ())


def test_an_unknown_fallback_without_a_near_name_says_where_names_are() -> None:
    with pytest.raises(InvalidInputError, match="named_modules"):
        plan_recording(nn.Linear(2, 2), ["encoder.block"])
