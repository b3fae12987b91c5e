"""Encoding: each record by itself, by public rules, and readable back."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dp_flash_attention.core.errors import DataError
from dp_flash_attention.training.data.encoding import (
    MISSING_ID,
    default_knots,
    encode_category,
    encode_numeric,
)
from dp_flash_attention.training.data.schema import (
    CategoricalField,
    Label,
    NumericField,
    Schema,
    SchemaOrigin,
)
from dp_flash_attention.training.data.tabular import TabularDataset

KNOTS = (-1.0, 0.0, 2.0, 10.0)
SCHEMA = Schema(
    fields=(
        NumericField(name="x", knots=KNOTS),
        CategoricalField(name="c", categories=("red", "blue"), num_buckets=3),
    ),
    label=Label(name="y", classes=("a", "b")),
    origin=SchemaOrigin.BUILT_IN,
)
numbers = st.one_of(st.floats(allow_nan=True, allow_infinity=True, width=32))
colours = st.sampled_from(["red", "blue", "green", "", None, "🎨", "NA"])


def encoded(xs, cs):
    columns = {"x": np.array(xs, dtype=float), "c": np.array(cs, dtype=object)}
    dataset = TabularDataset.from_columns(SCHEMA, columns, np.zeros(len(xs), dtype=np.int64))
    return dataset.take(torch.arange(len(xs)))


@given(st.floats(-1, 10))
def test_a_number_between_the_knots_can_be_read_back(x):
    ids, weights = encode_numeric(np.array([x]), KNOTS)
    lower, share = int(ids[0]) - 1, float(weights[0])
    upper = min(lower + 1, len(KNOTS) - 1)
    assert 0.0 <= share <= 1.0
    assert (1 - share) * KNOTS[lower] + share * KNOTS[upper] == pytest.approx(x, abs=1e-5)


def test_numbers_beyond_the_knots_and_missing_ones():
    ids, weights = encode_numeric(np.array([-math.inf, -5.0, 99.0, math.inf, math.nan]), KNOTS)
    assert ids.tolist() == [1, 1, 3, 3, MISSING_ID]
    assert weights.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]


def test_default_knots_are_public_and_increase():
    knots = default_knots()
    assert list(knots) == sorted(set(knots))
    assert knots == tuple(-knot for knot in reversed(knots))


def test_listed_categories_have_their_place_and_others_share_buckets():
    assert [encode_category(text, ("red", "blue"), 3) for text in ("red", "blue", "", "NA")] == [1, 2, 0, 0]
    others = [encode_category(f"colour {k}", ("red", "blue"), 3) for k in range(300)]
    assert set(others) == {3, 4, 5}
    assert min(others.count(bucket) for bucket in (3, 4, 5)) > 60


@given(st.lists(st.tuples(numbers, colours), min_size=2, max_size=8), st.data())
def test_removing_a_record_changes_no_other_record(rows, data):
    removed = data.draw(st.integers(0, len(rows) - 1))
    rest = [row for k, row in enumerate(rows) if k != removed]
    whole, less = encoded(*zip(*rows, strict=True)), encoded(*zip(*rest, strict=True))
    for name in ("ids", "mix"):
        kept = torch.cat([whole[name][:removed], whole[name][removed + 1 :]])
        assert torch.equal(kept, less[name])


@given(st.lists(st.tuples(numbers, colours), min_size=1, max_size=8))
def test_ids_lie_in_their_fields_range_and_weights_sum_to_one(rows):
    out = encoded(*zip(*rows, strict=True))
    for field, offset in enumerate(SCHEMA.offsets):
        ids = out["ids"][:, field]
        assert int(ids.min()) >= offset
        assert int(ids.max()) < offset + SCHEMA.fields[field].num_ids
    assert torch.allclose(out["mix"].sum(-1), torch.ones(len(rows), 2))
    assert int(out["ids"].max()) < SCHEMA.vocab_size


def test_no_records_is_an_error():
    with pytest.raises(DataError, match="no records"):
        encoded([], [])
