"""Which form a norm takes: the table, its fallback, and that no choice changes a clipped sum."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from dp_flash_attention.clipping import ClippedGradientAccumulator, norms
from dp_flash_attention.clipping.contributions import (
    DenseContribution,
    LinearContribution,
    linear_contribution,
)
from dp_flash_attention.clipping.norm_forms import NormForms, NormShape, form_by_formula, forms_in_use, using
from dp_flash_attention.core.errors import InvalidInputError

SHORT = NormShape(num_rows=2, num_inputs=6, num_outputs=5)
LONG = NormShape(num_rows=9, num_inputs=6, num_outputs=5)


def test_a_gradient_may_be_formed_only_where_it_is_the_smaller_record() -> None:
    assert not SHORT.can_be_formed
    assert LONG.can_be_formed  # 30 numbers against 22 and 99
    assert SHORT.candidates == ("gram", "outer")
    assert LONG.candidates == ("gram", "outer", "formed")
    # Narrow records, float32 gradients: 120 bytes against 22 for each row.
    half = {"input_dtype": "bfloat16", "grad_dtype": "bfloat16"}
    assert not NormShape(num_rows=5, num_inputs=6, num_outputs=5, **half).can_be_formed
    assert NormShape(num_rows=6, num_inputs=6, num_outputs=5, **half).can_be_formed


def test_an_unknown_shape_is_the_formula_s_and_noted() -> None:
    forms = NormForms({SHORT: "outer"})
    assert forms.form_of(SHORT) == "outer" != form_by_formula(SHORT)
    assert forms.fallbacks == {}
    assert forms.form_of(LONG) == form_by_formula(LONG) == "formed"
    assert forms.fallbacks == {LONG: "formed"}
    assert forms.chosen == {SHORT: "outer"}


def test_the_table_survives_json_in_one_order() -> None:
    first = NormForms({SHORT: "outer", LONG: "gram"})
    second = NormForms({LONG: "gram", SHORT: "outer"})
    assert first.to_json() == second.to_json()
    assert NormForms.from_json(first.to_json()).chosen == first.chosen


@pytest.mark.parametrize(
    "change",
    [{"form": "formed"}, {"form": "fast"}, {"form": None}, {"num_rows": "x"}, {"colour": 1}],
)
def test_an_altered_record_is_refused(change: dict[str, Any]) -> None:
    [entry] = NormForms({SHORT: "outer"}).to_json()
    with pytest.raises(InvalidInputError, match="norm_forms"):
        NormForms.from_json([entry | change])


def test_a_form_that_a_shape_does_not_have_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="form"):
        NormForms({SHORT: "formed"})


def test_the_table_holds_inside_its_context_only() -> None:
    table = NormForms({SHORT: "outer"})
    with using(table):
        assert forms_in_use() is table
    assert forms_in_use().chosen == {}


class Net(nn.Module):
    """Two linear maps and a convolution, each longer or shorter than it is wide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 40)
        self.conv = nn.Conv1d(40, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.second(torch.tanh(self.first(x)))
        return self.conv(hidden.mT).square().mean((1, 2))


def clipped(x: torch.Tensor, forms: NormForms) -> tuple[Any, dict[str, torch.Tensor]]:
    model = Net()
    accumulator = ClippedGradientAccumulator(model, l2_clip_norm=1e-2)
    with using(forms):
        norms_of = accumulator.add(lambda: model(x), batch_size=len(x))
    return norms_of.norms, accumulator.sums


def test_every_choice_gives_the_same_norms_and_sums() -> None:
    x = torch.randn(3, 9, 6)
    met = NormForms()
    expected, expected_sums = clipped(x, met)
    assert len(met.fallbacks) == 3  # the convolution's as well
    shapes = list(met.fallbacks)
    tried = 0
    for choice in itertools.product(*(shape.candidates for shape in shapes)):
        table = NormForms(dict(zip(shapes, choice, strict=True)))
        found, sums = clipped(x, table)
        assert table.fallbacks == {}
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        for name, total in sums.items():
            torch.testing.assert_close(total, expected_sums[name], rtol=1e-4, atol=1e-7)
        tried += 1
    assert tried >= 8


@pytest.mark.parametrize("form", ["gram", "outer"])
def test_the_chosen_form_is_the_one_that_runs(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"gram": "outer_sq_norms", "outer": "gram_sq_norms"}[form]
    monkeypatch.setattr(norms, other, lambda *_: pytest.fail("the other form ran"))
    x, g = torch.randn(2, 9, 6), torch.randn(2, 9, 5)
    kept = linear_contribution(
        x_BTD=x, g_BTP=g, weight_shape=torch.Size((5, 6)), forms=NormForms({LONG: form})
    )
    assert isinstance(kept, LinearContribution)
    expected = torch.einsum("btp,btd->bpd", g, x).square().sum((1, 2))
    torch.testing.assert_close(kept.sq_norms(), expected)
    dropped = kept.without(torch.tensor([True, False]))
    assert dropped.form == form
    torch.testing.assert_close(dropped.sq_norms(), expected * torch.tensor([0.0, 1.0]))


def test_a_formed_gradient_is_kept_when_it_is_chosen() -> None:
    x, g = torch.randn(2, 9, 6), torch.randn(2, 9, 5)
    kept = linear_contribution(
        x_BTD=x, g_BTP=g, weight_shape=torch.Size((5, 6)), forms=NormForms({LONG: "formed"})
    )
    assert isinstance(kept, DenseContribution)
