import math
from collections import OrderedDict, namedtuple
from enum import IntEnum, StrEnum

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.quantum.canonical import canonical_bytes

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    | st.binary(max_size=6)
)
QUERIES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=8,
)


def typed(query):
    """The query with its types, so that 1, 1.0 and True differ as they should."""
    if isinstance(query, list | tuple):
        return ("list", tuple(typed(item) for item in query))
    if isinstance(query, dict):
        return ("dict", frozenset((key, typed(item)) for key, item in query.items()))
    return (type(query).__name__, query)


@given(QUERIES, QUERIES)
def test_different_queries_never_share_their_bytes_and_equal_ones_always_do(first, second):
    assert (canonical_bytes(first) == canonical_bytes(second)) is (typed(first) == typed(second))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        ("1", 1),
        (b"a", "a"),
        (["ab"], ["a", "b"]),
        ([["a"], "b"], ["a", ["b"]]),
        ([], {}),
        (None, ""),
        ("caf\u00e9", "cafe\u0301"),
        ({"a": 1}, ["a", 1]),
        (255, -1),
    ],
)
def test_pairs_that_careless_encodings_confuse(one, other):
    assert canonical_bytes(one) != canonical_bytes(other)


def test_the_order_of_a_dict_and_the_sign_of_zero_do_not_matter():
    assert canonical_bytes({"a": 1, "b": [2]}) == canonical_bytes({"b": [2], "a": 1})
    assert canonical_bytes(-0.0) == canonical_bytes(0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, {1: 2}, {1}, complex, "\ud800", 1j], ids=repr)
def test_what_has_no_canonical_form_is_refused(bad):
    with pytest.raises(InvalidInputError, match="query"):
        canonical_bytes([bad])


def test_nesting_without_end_is_refused():
    query = []
    for _ in range(40):
        query = [query]
    with pytest.raises(InvalidInputError, match="32 deep"):
        canonical_bytes(query)


class Colour(IntEnum):
    RED = 1


class Shape(StrEnum):
    ROUND = "a"


@pytest.mark.parametrize(
    "query",
    [
        Colour.RED,
        {"column": Shape.ROUND},
        namedtuple("Count", "column")("age"),
        OrderedDict(a=1),
        np.float64(1.0),
        np.str_("a"),
    ],
    ids=["whole number", "text", "named tuple", "dict", "double", "NumPy text"],
)
def test_a_type_that_means_more_than_its_content_is_refused(query):
    """Count("age") and Sum("age") have one content: as one query they would show whether their answers are equal."""
    with pytest.raises(InvalidInputError, match="Convert it first"):
        canonical_bytes(query)
