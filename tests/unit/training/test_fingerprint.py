from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_attention.noise import TestKey
from dp_flash_attention.training import fingerprint
from dp_flash_attention.training.microbatches import RecordSource

KEY = TestKey("fingerprint")


def of(dataset: Any, key: TestKey = KEY) -> str:
    return fingerprint.dataset_fingerprint(RecordSource(dataset), key)


def test_any_change_of_the_data_changes_the_fingerprint() -> None:
    base = torch.arange(12.0).view(6, 2)
    changed = base.clone()
    changed[4, 1] += 1e-6
    variants = [
        base,
        changed,
        base[:5],
        base.flip(0),
        base.double(),
        base.view(6, 1, 2),
        torch.cat([base, base[:1]]),
        base.bool(),
    ]
    assert len({of(variant) for variant in variants}) == len(variants)
    assert of(base) == of(base.clone())


def test_without_the_key_a_guess_of_the_data_cannot_be_checked() -> None:
    assert of(torch.zeros(3), KEY) != of(torch.zeros(3), TestKey("other"))


def test_fields_do_not_run_into_each_other() -> None:
    class Fields:
        def __init__(self, *fields: Tensor, note: str = "") -> None:
            self.fields, self.note = fields, note

        def __len__(self) -> int:
            return 2

        def take(self, indices: Tensor) -> Any:
            return {"fields": [field[indices] for field in self.fields], "note": self.note}

    one, two = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7], [8]])
    assert of(Fields(one, two)) != of(Fields(one[:, :2], torch.cat([one[:, 2:], two], 1)))
    assert of(Fields(one, note="a")) != of(Fields(one, note="b"))


def test_more_records_than_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_ROWS_AT_ONCE", 4)
    late = torch.zeros(10)
    late[9] = 1.0
    assert of(late) != of(torch.zeros(10))


def test_the_first_difference_is_named_with_its_path() -> None:
    before = {"plan": {"epsilon": 1.0, "noise": "secure"}, "a": 1}
    assert fingerprint.first_difference(before, before) is None
    changed = {"plan": {"epsilon": 2.0, "noise": "secure"}, "a": 1}
    assert fingerprint.first_difference(before, changed) == "plan.epsilon was 1.0 and is now 2.0"
    assert fingerprint.first_difference(before, {"plan": before["plan"]}) == "a was 1 and is now None"
    assert fingerprint.first_difference({}, {"b": {}}) == "b was None and is now {}"


def test_settings_survive_json_and_tell_optimizers_apart() -> None:
    p = [nn.Parameter(torch.zeros(2))]
    settings = [
        fingerprint.optimizer_settings(optimizer)
        for optimizer in (
            torch.optim.Adam(p, lr=0.1),
            torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99)),
            torch.optim.AdamW(p, lr=0.1),
            torch.optim.Adam(p, lr=torch.tensor(0.1)),
        )
    ]
    as_text = [json.dumps(fingerprint.as_json_values(s), sort_keys=True) for s in settings]
    assert len(set(as_text)) == 4
    assert [json.loads(text) for text in as_text] == [fingerprint.as_json_values(s) for s in settings]


def test_models_are_told_apart_by_shape_dtype_and_what_is_frozen() -> None:
    frozen = nn.Linear(2, 3)
    frozen.bias.requires_grad_(False)
    models = [nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 3).double(), frozen, nn.LayerNorm((3, 2))]
    found = [json.dumps(fingerprint.model_settings(model)) for model in models]
    assert len(set(found)) == len(models)
    assert fingerprint.model_settings(nn.Linear(2, 3)) == fingerprint.model_settings(nn.Linear(2, 3))


def test_schedules_are_told_apart_by_every_value() -> None:
    constant = fingerprint.schedule_settings(lambda step: 1.0, 5)
    assert fingerprint.schedule_settings(None, 5) is None
    assert constant == fingerprint.schedule_settings(lambda step: 1, 5)
    assert constant != fingerprint.schedule_settings(lambda step: 1.0 if step < 4 else 0.5, 5)
    assert fingerprint.schedule_settings(lambda step: math.nan, 2) is not None


def loss_with(constant: float, text: str = "x") -> Any:
    def loss(value: Any, *, scale: float = 1.0) -> Any:
        wanted = {"a", "b", "c", text}
        return constant * value if value in wanted else (lambda v: v + 2)(value)

    return loss


class Loss:
    def __call__(self, value: Any) -> Any:
        return value


def test_a_function_is_known_by_what_it_does() -> None:
    def doubled(value: Any) -> Any:
        return 2.0 * value

    first = doubled

    def doubled(value: Any) -> Any:
        return 2.5 * value

    assert fingerprint.function_settings(first) != fingerprint.function_settings(doubled)
    assert fingerprint.function_settings(first).partition("#")[0].endswith("doubled")
    captured = [loss_with(1.0), loss_with(2.0), loss_with(1.0, "y")]
    assert len({fingerprint.function_settings(loss) for loss in captured}) == 3
    assert fingerprint.function_settings(loss_with(1.0)) == fingerprint.function_settings(loss_with(1.0))
    partials = [functools.partial(loss_with(1.0), scale=scale) for scale in (1.0, 2.0)]
    assert fingerprint.function_settings(partials[0]) != fingerprint.function_settings(partials[1])
    assert fingerprint.function_settings(Loss()) == fingerprint.function_settings(Loss())
    assert fingerprint.function_settings(max).startswith("builtins.max")


def test_a_function_has_the_same_settings_in_every_process() -> None:
    """Sets of texts are ordered by a seed of the process, objects lie at other addresses."""
    program = (
        "from dp_flash_attention.training.fingerprint import function_settings, model_settings\n"
        "from torch import nn\n"
        "def loss(x, y=3): return x in {'a', 'b', 'c', 'd'} or (lambda z: z)\n"
        "model = nn.Sequential(nn.Dropout(0.5))\n"
        "model.extra_repr = lambda: repr(object())\n"
        "print(function_settings(loss), model_settings(model))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_dropout_tells_models_apart() -> None:
    found = [fingerprint.model_settings(nn.Sequential(nn.Linear(2, 2), nn.Dropout(p))) for p in (0.1, 0.5)]
    assert found[0]["parameters"] == found[1]["parameters"]
    assert found[0]["modules"] != found[1]["modules"]
